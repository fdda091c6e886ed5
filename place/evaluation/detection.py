"""Detection: what a small detector on the frozen encoder's patch tokens makes of the findings' true boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from place.config import UsageError
from place.data.identity import SPLITS
from place.data.manifest import read_manifest
from place.data.transforms import read_image
from place.evaluation.detection_metrics import COCO_IOUS, FIELD_IOUS, judge_matches, list_matches, match_boxes
from place.evaluation.detection_picture import draw_boxes
from place.evaluation.detector import BoxedSplit, Boxes, train_detector
from place.evaluation.encoder import get_units, read_units
from place.evaluation.folds import describe_folds, describe_splits, list_folds
from place.evaluation.heads import Training, build_schedule, describe_passes
from place.evaluation.localisation import move_box
from place.evaluation.metrics import Array, TaskResult
from place.evaluation.task import Task

MAX_VAL = 400


class Read(NamedTuple):
    """A split with its boxes, in pixels of the image that the encoder sees; sample_id and stored JPEG of each image."""

    split: BoxedSplit
    sample_ids: list[int]
    jpegs: list[bytes]


class Judged(NamedTuple):
    """Images with boxes, guesses of each, findings, reasons of those left out, patients, and how it was trained."""

    test: Read
    guesses: list[Boxes]
    names: list[str]
    left_out: dict[str, str]
    unit_B: Array
    trained_on: str
    trainings: list[Training]


def run_detection(task: Task) -> TaskResult:
    """Train the detector on the training split, stop it on the validation split, judge it; or the same in folds.

    Returns: `mean_ap` over COCO's thresholds, `mean_ap_40_75` over the field's, `mean_ap_50`, and each of a finding as
        `ap.FINDING`.
    Raises:
        UsageError: no finding with a box in the training, the validation and the judged split, or in folds anywhere.
    Source: inferred (MGCA: frozen encoder, detector trained on top); pyramid, detector and intervals as their modules.
    """
    judged = _cross_validate(task) if task.evaluation.folds else _train_and_judge(task)
    test, guesses, names, left_out, unit_B, trained_on, trainings = judged
    config = task.evaluation.detection
    task.report("judge boxes", 0, 1)
    matches = match_boxes(test.split.boxes, guesses, len(names))
    metrics = judge_matches(matches, names, unit_B, task.evaluation.bootstrap)
    if task.folder:
        draw_boxes(test.jpegs, test.split.boxes, guesses, names, task.encoder.size_px, task.folder / "detection.png")
    protocol = {
        "score": f"FCOS on a simple feature pyramid over the frozen encoder's tokens, {task.encoder.size_px} px",
        "trained_on": trained_on,
        "stopped": build_schedule(config).describe(),
        "settings": config.model_dump(),
        "frame": "the centre square of the stored image; boxes are cut to it",
        "ap": f"mean over intersection over union {COCO_IOUS[0]} to {COCO_IOUS[-1]}, as COCO",
        "ap_40_75": f"mean over intersection over union {FIELD_IOUS[0]} to {FIELD_IOUS[-1]}, as the field has it",
        "images_without_boxes": "judged: whatever is found there is a false alarm",
        "interval": "95 % percentile bootstrap over patients",
        "findings": _count(test.split.boxes, names),
        "left_out": left_out,
    } | describe_passes(trainings, "detection")
    return TaskResult("detection", metrics, protocol, len(test.jpegs), list_matches(matches, names, test.sample_ids))


def _train_and_judge(task: Task) -> Judged:
    """One detector, trained on the training split, stopped on the validation split."""
    there = {split: list_boxed(task, split) for split in (task.train_split, task.val_split, task.split)}
    names, left_out = choose_boxed(there, task.evaluation.findings)
    most = task.evaluation.max_train_images
    train, val, test = (
        _read_split(task, split, names, limit)
        for split, limit in ((task.train_split, most), (task.val_split, MAX_VAL), (task.split, None))
    )
    guesses, training = _fit(task, train, val, test, len(names))
    trained_on = describe_splits(task, training.num_images, training.kept)
    units = get_units(read_units(task.data_dir, task.split), test.sample_ids)
    return Judged(test, guesses, names, left_out, units, trained_on, [training])


def _cross_validate(task: Task) -> Judged:
    """A detector a fold of the patients of all splits that have boxes; what all of them find is judged at once."""
    there = {name: boxed for name in SPLITS if (boxed := list_boxed(task, name))}
    names, left_out = choose_boxed({"all splits": set[str]().union(*there.values())}, task.evaluation.findings)
    reads = [_read_split(task, name, names, None) for name in there]
    boxes = [truth for read in reads for truth in read.split.boxes]
    split = BoxedSplit(torch.cat([read.split.tokens_BND for read in reads]), boxes)
    ids, jpegs = [key for read in reads for key in read.sample_ids], [jpeg for read in reads for jpeg in read.jpegs]
    whole = Read(split, ids, jpegs)
    units = {key: unit for name in there for key, unit in read_units(task.data_dir, name).items()}
    unit_B = get_units(units, whole.sample_ids)
    found: dict[int, Boxes] = {}
    trainings: list[Training] = []
    for fold in list_folds(whole.sample_ids, unit_B, task.evaluation, MAX_VAL):
        train, val, test = (_take_rows(whole, rows) for rows in fold)
        guesses, training = _fit(task, train, val, test, len(names))
        found |= dict(zip(fold.test, guesses, strict=True))
        trainings.append(training)
        task.report("detection folds", len(trainings), task.evaluation.folds)
    trained_on = describe_folds(task.evaluation, [*there], [training.kept for training in trainings])
    trained_on += "; boxes of all folds are ranked together"
    return Judged(whole, [found[row] for row in range(len(unit_B))], names, left_out, unit_B, trained_on, trainings)


def _fit(task: Task, train: Read, val: Read, test: Read, num_findings: int) -> tuple[list[Boxes], Training]:
    """Guesses of a detector for the images that are judged, and how it was trained."""
    config = task.evaluation.detection
    detector, step = train_detector(
        train.split,
        val.split,
        task.encoder.size_px,
        num_findings,
        config,
        on_progress=lambda at: task.report("detector", at, config.max_steps),
        device=task.encoder.device,
    )
    return detector.predict(test.split.tokens_BND), Training(build_schedule(config), len(train.sample_ids), step)


def _take_rows(read: Read, rows: list[int]) -> Read:
    split = BoxedSplit(read.split.tokens_BND[torch.tensor(rows)], [read.split.boxes[row] for row in rows])
    return Read(split, [read.sample_ids[row] for row in rows], [read.jpegs[row] for row in rows])


def list_boxed(task: Task, split: str) -> set[str]:
    """Findings with a box in a split that the encoder sees a part of."""
    columns = ["boxes", "height_px", "width_px"]
    rows = read_manifest(task.data_dir, columns, split)
    return {
        box["finding"]
        for cell, *shape in zip(*(rows[name].to_pylist() for name in columns), strict=True)
        for box in json.loads(cell)
        if move_box(box["box_xyxy"], tuple(shape))
    }


def choose_boxed(there: dict[str, set[str]], wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Findings that are judged, and why others are not: each needs a box in every split. Raises UsageError."""
    asked = list(wanted) or sorted(set.union(*there.values()))
    missing = {name: [split for split, found in there.items() if name not in found] for name in asked}
    names = [name for name in asked if not missing[name]]
    if not names:
        counted = "; ".join(f"{split}: {', '.join(sorted(found)) or 'none'}" for split, found in there.items())
        raise UsageError(f"detection: no finding asked for has boxes in every split; there are {counted}")
    return names, {name: f"no box in split '{splits[0]}'" for name, splits in missing.items() if splits}


def _read_split(task: Task, split: str, names: Sequence[str], limit: int | None) -> Read:
    """The first `limit` studies by sample_id, which is a hash, with boxes or without."""
    wanted = set(sorted(read_units(task.data_dir, split))[:limit])
    tokens, boxes, ids, jpegs = [], [], [], []
    for samples in task.read_batches(split, f"read {split} boxes", wanted):
        tokens.append(task.encoder.encode_patches([sample["image"] for sample in samples]))
        boxes += [fit_boxes(sample, names, task.encoder.size_px) for sample in samples]
        ids += [sample["sample_id"] for sample in samples]
        jpegs += [sample["image"] for sample in samples]
    return Read(BoxedSplit(torch.cat(tokens), boxes), ids, jpegs)


def fit_boxes(sample: dict[str, Any], names: Sequence[str], size_px: int) -> Boxes:
    """Boxes of an image as the model sees it: cut to the centre square and scaled; of `names` only."""
    shape = read_image(sample["image"]).shape if sample["boxes"] else (size_px, size_px)
    scale = size_px / min(shape)
    rows, findings = [], []
    for box in sample["boxes"]:
        seen = move_box(box["box_xyxy"], shape) if box["finding"] in names else None
        if seen:
            rows.append([value * scale for value in seen])
            findings.append(names.index(box["finding"]))
    return Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4), torch.tensor(findings, dtype=torch.int64))


def _count(boxes: Sequence[Boxes], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Boxes of each finding, images with one, and images without."""
    counts = np.array([np.bincount(truth.finding_P.numpy(), minlength=len(names)) for truth in boxes])
    return {
        name: {"boxes": int(own_B.sum()), "images": int((own_B > 0).sum()), "empty": int((own_B == 0).sum())}
        for name, own_B in zip(names, counts.T, strict=True)
    }
