"""The baseline to beat: what the same probe as of `classification` makes of raw pixels."""

from __future__ import annotations

import numpy as np

from place.data.transforms import eval_transform, read_image
from place.evaluation.classification import describe_probe, judge_probes, require_units
from place.evaluation.encoder import get_units
from place.evaluation.metrics import TaskResult
from place.evaluation.probe import FeatureSplit
from place.evaluation.task import Task

MAX_SIDE_PX = 96
MAX_TRAIN = 8000


def run_pixel_probe(task: Task) -> TaskResult:
    """Probe standardised pixels with the choices and figures of `run_classification`.

    Shares are of the first `MAX_TRAIN` training images, and subsets those of `run_classification` where these are all.

    Raises:
        UsageError: the data set has no training or no validation split.
    Source: ours.
    """
    train, val = (_read_pixels(task, name, MAX_TRAIN) for name in (task.train_split, task.val_split))
    judged = judge_probes(task, train, val, _read_pixels(task, task.split))
    side_px = min(task.encoder.size_px, MAX_SIDE_PX)
    protocol = describe_probe(task, judged) | {
        "score": f"L2 logistic regression on {side_px} x {side_px} standardised pixels",
        "trained_on": f"{len(train.labels)} images of '{task.train_split}', at most {MAX_TRAIN}, first by hash",
    }
    total = len(require_units(task, "pixel_probe", task.train_split))
    if total > MAX_TRAIN:
        protocol["notes"] = [f"pixels: shares are of {MAX_TRAIN} training images, of {total} that the encoder's are of"]
    return TaskResult("pixel_probe", judged.metrics, protocol, judged.num_images, judged.rows)


def _read_pixels(task: Task, split: str, limit: int | None = None) -> FeatureSplit:
    """Read at most `limit` images of a split, the first by sample_id, which is a hash."""
    units = require_units(task, "pixel_probe", split)
    wanted = set(sorted(units)[:limit])
    side_px = min(task.encoder.size_px, MAX_SIDE_PX)
    rows, labels, ids = [], [], []
    for samples in task.read_batches(split, f"read {split} pixels", wanted):
        images = (eval_transform(read_image(sample["image"]), side_px, 0.0, 1.0) for sample in samples)
        rows += [image.numpy().ravel() for image in images]
        labels += [sample["labels"] for sample in samples]
        ids += [sample["sample_id"] for sample in samples]
    return FeatureSplit(np.stack(rows), labels, get_units(units, ids), ids)
