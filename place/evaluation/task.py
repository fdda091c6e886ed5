"""What every task is given: the encoder, the data set, how to judge, and the split encoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from place.config import DataConfig, EvaluationConfig, UsageError
from place.data.prepared import read_samples
from place.evaluation.encoder import EncodedSplit, encode_split, read_units, take
from place.evaluation.frozen import FrozenEncoder, wrap_run
from place.training.checkpoint import LoadedRun

StepProgress = Callable[[str, int, int], None]


class TaskInput(NamedTuple):
    """A run, or an image encoder alone.

    `card` is the data set's card.json; `on_progress` is told the step, what is done of it and its total;
    pictures go into `folder`, if there is one."""

    run: LoadedRun | None
    data_dir: Path
    card: dict[str, Any]
    split: str
    evaluation: EvaluationConfig
    on_progress: StepProgress | None = None
    folder: Path | None = None
    encoder: FrozenEncoder | None = None


class Task:
    """The input, and features that are computed when a task first asks for them."""

    def __init__(self, given: TaskInput):
        self._run, self.data_dir, self.card, self.split, self.evaluation, self.on_progress, self.folder, _ = given
        data = given.run.config.data if given.run else DataConfig()
        # Of the judged data set, whatever the run was trained on.
        self.train_split, self.val_split = "train", "val"
        self.sections, self.reported_sections = data.sections, self.evaluation.generation.sections or data.sections
        self.encoder = given.encoder or wrap_run(self.run, "run")
        self.labels: list[str] = list(self.card["labels"])

    @property
    def run(self) -> LoadedRun:
        """The whole model, report encoder included. Raises UsageError where there is an image encoder alone."""
        if self._run is None:
            raise UsageError(f"{self.encoder.name} has no report encoder; give --run or an export of ours")
        return self._run

    @property
    def has_reports(self) -> bool:
        """Whether there is a report encoder too."""
        return self._run is not None

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

    def read_batches(
        self, split: str, step: str, wanted: Collection[int] | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """Samples of a split, `evaluation.batch_size` at once, told about as `step`.

        Args:
            wanted: sample_ids that are read; none reads all.
        """
        total = len(read_units(self.data_dir, split)) if wanted is None else len(wanted)
        samples = read_samples(self.data_dir, split)
        chosen = (sample for sample in samples if wanted is None or sample["sample_id"] in wanted)
        done = 0
        for batch in take(chosen, self.evaluation.batch_size):
            yield batch
            done += len(batch)
            self.report(step, done, total)

    def report(self, step: str, done: int, total: int) -> None:
        """Tell whoever watches how far a step is."""
        if self.on_progress:
            self.on_progress(step, done, total)
