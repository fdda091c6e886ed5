"""What every task is given: the run, the data set, how to judge, and the split encoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from place.config import EvaluationConfig
from place.evaluation.encoder import EncodedSplit, encode_split
from place.training.checkpoint import LoadedRun

StepProgress = Callable[[str, int, int], None]


class TaskInput(NamedTuple):
    """`card` is the data set's card.json; `on_progress` is told the step, what is done of it and its total;
    pictures go into `folder`, if there is one."""

    run: LoadedRun
    data_dir: Path
    card: dict[str, Any]
    split: str
    evaluation: EvaluationConfig
    on_progress: StepProgress | None = None
    folder: Path | None = None


class Task:
    """The input, and features that are computed when a task first asks for them."""

    def __init__(self, given: TaskInput):
        self.run, self.data_dir, self.card, self.split, self.evaluation, self.on_progress, self.folder = given
        self.labels: list[str] = list(self.card["labels"])

    @cached_property
    def encoded(self) -> EncodedSplit:
        """Every study of the split through both encoders."""
        return encode_split(
            self.run,
            self.data_dir,
            self.split,
            self.evaluation.batch_size,
            lambda done, total: self.report("encode", done, total),
        )

    def report(self, step: str, done: int, total: int) -> None:
        """Tell whoever watches how far a step is."""
        if self.on_progress:
            self.on_progress(step, done, total)
