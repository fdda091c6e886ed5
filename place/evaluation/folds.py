"""What trains, stops and is judged: a split each, or folds of patients, by which each image is judged once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from place.config import EvaluationConfig, UsageError
from place.evaluation.heads import describe_limit
from place.evaluation.metrics import Array
from place.evaluation.task import Task


class Fold(NamedTuple):
    """Rows of the images that train, of those that stop and of those that are judged."""

    train: list[int]
    val: list[int]
    test: list[int]


def list_folds(sample_ids: Sequence[int], unit_B: Array, evaluation: EvaluationConfig, max_val: int) -> Iterator[Fold]:
    """A fold of patients is judged, the next one stops, the others train.

    Args:
        sample_ids: of each image; where only some train or stop, these are the first by it, which is a hash.
        unit_B: patient of each image.
        max_val: most images that stop.
    Raises:
        UsageError: as `deal_folds`.
    Source: ours.
    """
    fold_B = deal_folds(unit_B, evaluation.folds)
    for fold in range(evaluation.folds):
        test_B, val_B = fold_B == fold, fold_B == (fold + 1) % evaluation.folds
        limits = ((~val_B & ~test_B, evaluation.max_train_images), (val_B, max_val), (test_B, None))
        yield Fold(*(_choose_rows(sample_ids, rows_B, limit) for rows_B, limit in limits))


def deal_folds(unit_B: Array, folds: int) -> Array:
    """Fold of each image: patients in the order of their hash, dealt out in turn, so that none is in two folds.

    Raises:
        UsageError: fewer than three folds, or fewer patients than folds.
    """
    patients, number_B = np.unique(unit_B, return_inverse=True)
    if not 3 <= folds <= len(patients):
        raise UsageError(
            f"evaluation.folds={folds}: expected 3 (train, stop, judge) to {len(patients)}, the patients there are"
        )
    return number_B.ravel() % folds


def describe_splits(task: Task, num_train: int, step: int) -> str:
    """What was trained on what without folds, in words: images that trained, and the step that was kept."""
    return (
        f"{num_train} images of '{task.train_split}', {describe_limit(task.evaluation.max_train_images)}; "
        f"stopped on '{task.val_split}' at step {step}"
    )


def describe_folds(evaluation: EvaluationConfig, splits: Sequence[str], steps: Sequence[int]) -> str:
    """What was trained on what, in words.

    Args:
        splits: whose images were dealt out.
        steps: that was kept, of each fold.
    """
    return (
        f"{evaluation.folds} folds of patients over splits {', '.join(splits)}: one judged, the next one stops, "
        f"the others train, {describe_limit(evaluation.max_train_images)}; stopped at steps {list(steps)}"
    )


def _choose_rows(sample_ids: Sequence[int], rows_B: Array, limit: int | None) -> list[int]:
    """The first `limit` of some images by sample_id, in the order that they are in."""
    rows = rows_B.nonzero()[0].tolist()
    return sorted(sorted(rows, key=lambda row: sample_ids[row])[:limit])
