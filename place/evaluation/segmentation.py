"""Segmentation: what a small head on the frozen encoder's patch tokens makes of the findings' true masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from place.config import UsageError
from place.data.identity import SPLITS
from place.data.masks import Mask, read_masks, resize_mask
from place.data.transforms import find_square
from place.evaluation.encoder import get_units, read_units
from place.evaluation.folds import describe_folds, describe_splits, list_folds
from place.evaluation.heads import Training, build_schedule, describe_passes
from place.evaluation.metrics import Array, Metric, TaskResult, compute_means, draw_weights, summarize
from place.evaluation.segmentation_picture import draw_masks
from place.evaluation.setr import HEAD_NAMES, MaskedSplit, predict, train_head
from place.evaluation.task import Task

MAX_VAL = 400


class Judged(NamedTuple):
    """Images with masks, predictions (B,F,Y,X) bool, findings, reasons of those left out, patients, and how it was
    trained."""

    test: Read
    shown_BFYX: Array
    names: list[str]
    left_out: dict[str, str]
    unit_B: Array
    trained_on: str
    trainings: list[Training]


class Read(NamedTuple):
    """A split with its masks: sample_id, stored JPEG and, in its pixels, masks of each image beside them."""

    split: MaskedSplit
    sample_ids: list[int]
    jpegs: list[bytes]
    stored: list[list[Mask | None]]


class Way(NamedTuple):
    """How masks are learned: name of the task, what is trained and when it stops in words, settings and the section of
    `evaluation` that they are of, and how."""

    name: str
    what: str
    stopped: str
    settings: dict[str, Any]
    section: str
    reads_tokens: bool
    fit: Callable[[Task, Read, Read, Read], tuple[Tensor, Training]]
    """From images that train, stop and are judged: predictions (B,F,Y,X) bool of the latter, and how it was trained."""


def run_segmentation(task: Task) -> TaskResult:
    """Train the head on the training split, stop it on the validation split, judge it; or the same in folds.

    Raises:
        UsageError: a split without masks, or no finding with a mask in the training and the judged split.
    Source: inferred (MGCA: frozen encoder with SETR-PUP; BenchX: UperNet); empties apart and intervals are ours.
    """
    what, config = "the frozen encoder's patch tokens", task.evaluation.segmentation
    stopped = build_schedule(config).describe()
    return judge_way(task, Way("segmentation", what, stopped, config.model_dump(), "segmentation", True, _fit_head))


def judge_way(task: Task, way: Way) -> TaskResult:
    """Learn masks in one of two ways, on one split or in folds, and judge them. Raises as `run_segmentation`."""
    judged = _cross_validate(task, way) if task.evaluation.folds else _train_and_judge(task, way)
    test, shown_BFYX, names = judged.test, judged.shown_BFYX, judged.names
    mask_BFYX, known_BF = test.split.mask_BFYX.numpy(), test.split.known_BF.numpy()
    metrics = judge_masks(shown_BFYX, mask_BFYX, known_BF, names, judged.unit_B, task.evaluation.bootstrap)
    if task.folder:
        draw_masks(test.jpegs, mask_BFYX, shown_BFYX, names, task.folder / f"{way.name}.png")
    protocol = _describe(task, way, judged)
    rows = list_overlaps(shown_BFYX, mask_BFYX, known_BF, names, test.sample_ids)
    return TaskResult(way.name, metrics, protocol, len(test.sample_ids), rows)


def _fit_head(task: Task, train: Read, val: Read, test: Read) -> tuple[Tensor, Training]:
    config = task.evaluation.segmentation
    head, step = train_head(
        train.split,
        val.split,
        task.encoder.patch_px,
        config,
        on_progress=lambda at: task.report("segmentation head", at, config.max_steps),
        kind=task.evaluation.segmentation_head,
        device=task.encoder.device,
    )
    training = Training(build_schedule(config), len(train.sample_ids), step)
    return predict(head, test.split.tokens_BND, task.encoder.size_px) > 0, training


def _train_and_judge(task: Task, way: Way) -> Judged:
    """One head, trained on the training split, stopped on the validation split."""
    masks = {name: read_masks(task.data_dir, name) for name in (task.train_split, task.val_split, task.split)}
    need, size_px = (task.split, task.train_split), task.encoder.size_px
    names, left_out = choose_classes(masks, task.evaluation.findings, need, size_px)
    most = task.evaluation.max_train_images
    train, val, test = (
        _read_split(task, split, masks[split], names, limit, way.reads_tokens)
        for split, limit in ((task.train_split, most), (task.val_split, MAX_VAL), (task.split, None))
    )
    shown, training = way.fit(task, train, val, test)
    trained_on = describe_splits(task, training.num_images, training.kept)
    units = get_units(read_units(task.data_dir, task.split), test.sample_ids)
    return Judged(test, shown.numpy(), names, left_out, units, trained_on, [training])


def _cross_validate(task: Task, way: Way) -> Judged:
    """A head a fold: a fold of patients is judged, the next one stops the head, the others train it."""
    splits = [name for name in SPLITS if read_masks(task.data_dir, name)]
    masks = {name: read_masks(task.data_dir, name) for name in splits}
    pooled = {"all splits": {key: study for studies in masks.values() for key, study in studies.items()}}
    names, left_out = choose_classes(pooled, task.evaluation.findings, tuple(pooled), task.encoder.size_px)
    reads = [_read_split(task, name, masks[name], names, None, way.reads_tokens) for name in splits]
    whole = Read(
        MaskedSplit(*(torch.cat(parts) for parts in zip(*(read.split for read in reads), strict=True))),
        *([item for part in parts for item in part] for parts in list(zip(*reads, strict=True))[1:]),
    )
    units = {key: unit for name in splits for key, unit in read_units(task.data_dir, name).items()}
    unit_B = get_units(units, whole.sample_ids)
    shown_BFYX = torch.zeros_like(whole.split.mask_BFYX)
    trainings: list[Training] = []
    for fold in list_folds(whole.sample_ids, unit_B, task.evaluation, MAX_VAL):
        train, val, test = (_take_rows(whole, rows) for rows in fold)
        shown_BFYX[torch.tensor(fold.test)], training = way.fit(task, train, val, test)
        trainings.append(training)
        task.report("segmentation folds", len(trainings), task.evaluation.folds)
    trained_on = describe_folds(task.evaluation, splits, [training.kept for training in trainings])
    return Judged(whole, shown_BFYX.numpy(), names, left_out, unit_B, trained_on, trainings)


def _take_rows(read: Read, rows: list[int]) -> Read:
    split = MaskedSplit(*(part[torch.tensor(rows)] for part in read.split))
    ids, jpegs, stored = read.sample_ids, read.jpegs, read.stored
    return Read(split, [ids[row] for row in rows], [jpegs[row] for row in rows], [stored[row] for row in rows])


def choose_classes(
    masks: dict[str, dict[int, dict[str, Mask | None]]], findings: Sequence[str], need: Sequence[str], size_px: int
) -> tuple[list[str], dict[str, str]]:
    """Findings that are judged, and why others are not.

    Args:
        need: splits in each of which a finding needs a mask that the encoder, which sees `size_px`, sees a part of.
    Raises:
        UsageError: a split without masks, or no finding is left.
    """
    for split, studies in masks.items():
        if not studies:
            raise UsageError(f"segmentation: split '{split}' has no masks; it takes train, val and test patients")
    counts = {split: _count(studies.values(), size_px) for split, studies in masks.items()}
    there = sorted({name for found in counts.values() for name in found})
    wanted = findings or there
    empty = {name: split for name in wanted for split in need if not counts[split].get(name)}
    names = [name for name in wanted if name not in empty]
    if not names:
        raise UsageError(f"segmentation: no finding asked for has masks to train and to judge; there are {there}")
    return names, {name: f"no mask in split '{split}'" for name, split in empty.items()}


def _count(studies: Iterable[dict[str, Mask | None]], size_px: int) -> dict[str, int]:
    """Images of each finding whose mask is not empty as the encoder sees it."""
    counts: dict[str, int] = {}
    for study in studies:
        for name, mask_YX in study.items():
            counts[name] = counts.get(name, 0) + bool(fit_mask(mask_YX, size_px).any())
    return counts


def _read_split(
    task: Task,
    split: str,
    masks: dict[int, dict[str, Mask | None]],
    names: Sequence[str],
    limit: int | None,
    with_tokens: bool,
) -> Read:
    """The first `limit` studies with masks, by sample_id, which is a hash."""
    wanted, size_px = set(sorted(masks)[:limit]), task.encoder.size_px
    tokens, targets, known, ids, jpegs, stored = [], [], [], [], [], []
    for samples in task.read_batches(split, f"read {split} masks", wanted):
        images = [sample["image"] for sample in samples]
        tokens.append(task.encoder.encode_patches(images) if with_tokens else torch.zeros(len(images), 0, 0))
        for sample in samples:
            study = masks[sample["sample_id"]]
            targets.append(np.stack([fit_mask(study.get(name), size_px) for name in names]))
            known.append([is_known(study, name, mask) for name, mask in zip(names, targets[-1], strict=True)])
            ids.append(sample["sample_id"])
            jpegs.append(sample["image"])
            stored.append([study.get(name) for name in names])
    mask_BFYX = torch.from_numpy(np.stack(targets))
    return Read(MaskedSplit(torch.cat(tokens), mask_BFYX, torch.tensor(known)), ids, jpegs, stored)


def fit_mask(mask_YX: Mask | None, size_px: int) -> Mask:
    """A stored mask as the model sees its image: centre square, resized; no mask is all false."""
    if mask_YX is None:
        return np.zeros((size_px, size_px), bool)
    side, top, left = find_square(mask_YX.shape)
    return resize_mask(mask_YX[top : top + side, left : left + side], (size_px, size_px))


def is_known(study: dict[str, Mask | None], name: str, fitted_YX: Mask) -> bool:
    """Whether an image can be judged for a finding: looked at for it, and if it is there, something is left to see."""
    return name in study and (study[name] is None or bool(fitted_YX.any()))


def compute_overlaps(shown_BFYX: Array, mask_BFYX: Array) -> dict[str, Array]:
    """Dice, intersection over union and emptiness of each image and finding (B,F).

    Returns: `dice` = 2 |A and B| / (|A| + |B|) and `iou` = |A and B| / |A or B|, both NaN where the truth is empty;
        `empty_kept`, 1 where an empty truth has an empty prediction, else 0, NaN where the truth is not empty.
    Source: quoted (Dice 1945, Jaccard 1912); empties apart is ours: as Dice 1.0 they would lift the mean.
    """
    both, shown, mask = (x.sum((2, 3)).astype(float) for x in (shown_BFYX & mask_BFYX, shown_BFYX, mask_BFYX))
    is_empty = mask == 0
    with np.errstate(invalid="ignore"):
        dice, iou = 2 * both / (shown + mask), both / (shown + mask - both)
    return {
        "dice": np.where(is_empty, np.nan, dice),
        "iou": np.where(is_empty, np.nan, iou),
        "empty_kept": np.where(is_empty, (shown == 0).astype(float), np.nan),
    }


def list_overlaps(
    shown_BFYX: Array, mask_BFYX: Array, known_BF: Array, names: Sequence[str], sample_ids: Sequence[int]
) -> dict[str, Any]:
    """Columns sample_id, finding and the scores of `compute_overlaps`: a row an image and finding that counts."""
    place_F, row_B = known_BF.T.nonzero()
    columns = {"sample_id": np.array(sample_ids, dtype=np.int64)[row_B], "finding": [names[place] for place in place_F]}
    overlaps = compute_overlaps(shown_BFYX, mask_BFYX)
    return columns | {kind: value_BF[row_B, place_F] for kind, value_BF in overlaps.items()}


def judge_masks(
    shown_BFYX: Array, mask_BFYX: Array, known_BF: Array, names: Sequence[str], unit_B: Array, bootstrap: int
) -> dict[str, Metric]:
    """Mean of each score over the images of each finding, and the mean of these, with intervals.

    Args:
        known_BF: images that count for a finding.
        unit_B: patient of each image; patients are resampled.
    Source: ours.
    """
    weight_RB, metrics = draw_weights(unit_B, bootstrap), {}
    for kind, value_BF in compute_overlaps(shown_BFYX, mask_BFYX).items():
        value_BF = np.where(known_BF, value_BF, np.nan)
        pairs = {
            name: (np.nanmean(value_B), compute_means(value_B, weight_RB))
            for name, value_B in zip(names, value_BF.T, strict=True)
            if not np.isnan(value_B).all()
        }
        if pairs:
            values, resampled = zip(*pairs.values(), strict=True)
            metrics[f"mean_{kind}"] = summarize(float(np.mean(values)), np.mean(resampled, axis=0))
        metrics |= {f"{kind}.{name}": summarize(*pair) for name, pair in pairs.items()}
    return metrics


def _describe(task: Task, way: Way, judged: Judged) -> dict[str, Any]:
    split, size_px = judged.test.split, task.encoder.size_px
    head = HEAD_NAMES[task.evaluation.segmentation_head]
    known_BF, full_BF = split.known_BF.numpy(), split.mask_BFYX.numpy().any((2, 3))
    return {
        "score": f"{head} on {way.what}, at {size_px} x {size_px} px",
        "trained_on": judged.trained_on,
        "stopped": way.stopped,
        "settings": way.settings,
        "threshold": "probability 0.5, fixed",
        "dice": "per image, over the images whose true mask is not empty; mean over findings",
        "empty_kept": "share of images without the finding whose prediction is empty too: counted apart from Dice",
        "interval": "95 % percentile bootstrap over patients",
        "findings": {
            name: {
                "images": int((known & full).sum()),
                "empty": int((known & ~full).sum()),
                "unknown": int((~known).sum()),
            }
            for name, known, full in zip(judged.names, known_BF.T, full_BF.T, strict=True)
        },
        "left_out": judged.left_out,
    } | describe_passes(judged.trainings, way.section)
