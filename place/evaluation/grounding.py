"""Phrase grounding: does the map of a sentence over the patches light up in the boxes that the sentence speaks of?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from place.config import UsageError
from place.data.manifest import read_manifest
from place.data.prepared import read_samples
from place.data.transforms import read_image
from place.evaluation.encoder import (
    PatchFeatures,
    encode_occluded,
    encode_patches,
    encode_reports,
    get_units,
    read_units,
    take,
)
from place.evaluation.findings import check_names
from place.evaluation.grounding_picture import Grounded, draw_grounded
from place.evaluation.localisation import THRESHOLDS, Box, fill_boxes, judge_map, move_box
from place.evaluation.metrics import Array, Metric, TaskResult, compute_means, draw_weights, summarize
from place.evaluation.task import Task
from place.model.place import TextFeatures

MAPS = {
    "patch": "cosine of each patch, through the image's projection, with the phrase read as a report",
    "attention": "attention of the observation (V-POR) that is nearest to the phrase's sentence (T-POR)",
    "occlusion": "fall of the cosine of image and phrase where the patch and those that touch it are hidden",
    "prior": "share of the finding's training boxes that cover each patch: knows the finding, never sees the image",
}
NUM_DRAWN = 8
Prior = dict[str, list[tuple[Box, int]]]
"""Training boxes of each finding, each with the side of the square that it lies in."""


class Phrase(NamedTuple):
    """A sentence of a study, the finding it tells of, and its boxes (x0, y0, x1, y1) in the pixels of the square."""

    sample_id: int
    text: str
    finding: str
    boxes: list[Box]
    side_px: int


class Judged(NamedTuple):
    """A phrase with the scores of each map."""

    phrase: Phrase
    scores: dict[str, dict[str, float]]


def run_grounding(task: Task) -> TaskResult:
    """Judge the maps of every phrase of the split that has a box; a prior that never sees the image stands beside.

    Raises:
        UsageError: no phrase with a box, or none of a finding that was asked for, or one that nobody knows.
    Source: inferred (BioViL, patch-wise cosine); attention, prior and intervals are ours.
    """
    units, boxes = read_units(task.data_dir, task.split), read_prior(task)
    prior = cache(lambda finding, side: build_prior(boxes.get(finding, []), side)) if boxes else None
    judged: list[Judged] = []
    drawn: dict[str, list[Grounded]] = {}
    for done, samples in enumerate(take(read_samples(task.data_dir, task.split), task.evaluation.batch_size)):
        for jpeg, phrase, maps in _build_batch(task, samples, prior):
            truth_YX = fill_boxes(phrase.boxes, phrase.side_px)
            judged.append(Judged(phrase, {name: judge_map(map_YX, truth_YX) for name, map_YX in maps.items()}))
            if len(drawn.setdefault(phrase.finding, [])) < NUM_DRAWN:
                drawn[phrase.finding].append(Grounded(jpeg, phrase.text, phrase.finding, phrase.boxes, maps))
        task.report("grounding", done * task.evaluation.batch_size + len(samples), len(units))
    names, left_out = choose_grounded(judged, task, boxes)
    unit_P = get_units(units, [item.phrase.sample_id for item in judged])
    if task.folder:
        # One of each finding in turn, in stored order: no score decides.
        turns = chain.from_iterable(zip_longest(*(drawn[name] for name in names)))
        subtitle = f"checkpoint at step {task.run.step}, split '{task.split}'"
        draw_grounded([item for item in turns if item][:NUM_DRAWN], task.folder / "grounding.png", subtitle)
    metrics = summarize_phrases(judged, names, unit_P, task.evaluation.bootstrap)
    num_phrases = sum(item.phrase.finding in names for item in judged)
    protocol = _describe(judged, names) | {"left_out": left_out}
    return TaskResult("grounding", metrics, protocol, num_phrases, list_judged(judged, names))


def list_judged(judged: Sequence[Judged], findings: Sequence[str]) -> dict[str, Any]:
    """Columns sample_id, finding, phrase and every score of every map, named as in the metrics: a row a phrase."""
    chosen = [item for item in judged if item.phrase.finding in findings]
    columns: dict[str, Any] = {
        "sample_id": np.array([item.phrase.sample_id for item in chosen], dtype=np.int64),
        "finding": [item.phrase.finding for item in chosen],
        "phrase": [item.phrase.text for item in chosen],
    }
    for name, kinds in chosen[0].scores.items():
        for kind in list_kinds(name, kinds):
            columns[name_score(name, kind)] = np.array([item.scores[name][kind] for item in chosen])
    return columns


def list_kinds(name: str, kinds: Iterable[str]) -> list[str]:
    """Scores of a map that count: a threshold on the cosine has no meaning for shares."""
    return [kind for kind in kinds if name == "patch" or kind != "miou_cosine"]


def name_score(name: str, kind: str) -> str:
    """What a map's score is called: the patch cosine's own name is left out."""
    return kind if name == "patch" else f"{name}.{kind}"


def list_phrases(sample: dict[str, Any]) -> Iterator[Phrase]:
    """Phrases of a stored sample, each with all of its boxes that the model sees a part of.

    A box names its phrase (`phrase`) or the place of a sentence of the report (`sentence`); others have no phrase.
    """
    shape = read_image(sample["image"]).shape if sample["boxes"] else (0, 0)
    grouped: dict[tuple[str, str], list[Box]] = {}
    for box in sample["boxes"]:
        place = box.get("sentence")
        text = box.get("phrase") or ("" if place is None else sample["sentences"][place]["text"])
        seen = move_box(box["box_xyxy"], shape)
        if text and seen:
            grouped.setdefault((text, box["finding"]), []).append(seen)
    for (text, finding), boxes in grouped.items():
        yield Phrase(sample["sample_id"], text, finding, boxes, min(shape))


def _build_batch(
    task: Task, samples: Sequence[dict[str, Any]], prior: Callable[[str, int], Array] | None
) -> Iterator[tuple[bytes, Phrase, dict[str, Array]]]:
    """Stored image, phrase and maps of each phrase of some studies."""
    found = [(row, phrase) for row, sample in enumerate(samples) for phrase in list_phrases(sample)]
    if found:
        images = encode_patches(task.run, [sample["image"] for sample in samples])
        texts = encode_reports(task.run, [[phrase.text] for _, phrase in found])
        told = sorted({row for row, _ in found}) if task.evaluation.occlusion else []
        occluded = {row: encode_occluded(task.run, samples[row]["image"], task.evaluation.batch_size) for row in told}
        for number, (row, phrase) in enumerate(found):
            maps = build_maps(images, texts, row, number)
            if occluded:
                # Without the whole image's cosine, which is the same for all patches.
                maps["occlusion"] = _to_square(-occluded[row] @ texts.text_BE[number])
            if prior:
                maps["prior"] = prior(phrase.finding, len(maps["patch"]))
            yield samples[row]["image"], phrase, maps


def build_maps(images: PatchFeatures, texts: TextFeatures, row: int, number: int) -> dict[str, Array]:
    """Maps over the patches of image `row`, as squares, for phrase `number`."""
    cosine_N = images.patches_BNE[row] @ texts.text_BE[number]
    nearest = int((images.observations_BKE[row] @ texts.sentences_BSE[number, 0]).argmax())
    return {"patch": _to_square(cosine_N), "attention": _to_square(images.attention_BKN[row, nearest])}


def _to_square(value_N: Tensor) -> Array:
    side = round(len(value_N) ** 0.5)
    return value_N.numpy().reshape(side, side)


def read_prior(task: Task) -> Prior:
    """Boxes of the training split; none where it is the split that is judged, or has no boxes."""
    split, columns = task.train_split, ["boxes", "height_px", "width_px"]
    prior: Prior = {}
    if split == task.split:
        return prior
    rows = read_manifest(task.data_dir, columns, split)
    for boxes, *shape in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        for box in json.loads(boxes):
            seen = move_box(box["box_xyxy"], tuple(shape))
            if seen:
                prior.setdefault(box["finding"], []).append((seen, min(shape)))
    return prior


def build_prior(boxes: Sequence[tuple[Box, int]], side: int) -> Array:
    """Share of the boxes that cover each patch (side, side); all zeros without a box."""
    filled = [fill_boxes([box], side, side / side_px) for box, side_px in boxes]
    return np.mean(filled, axis=0) if filled else np.zeros((side, side))


def choose_grounded(judged: Sequence[Judged], task: Task, known: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Findings that count: those asked for, or all, as far as a phrase tells of them; and why others do not.

    Args:
        known: findings that have boxes elsewhere; those asked for are among these, the labels and the phrases.
    Raises:
        UsageError: a finding that nobody knows, no phrase with a box, or none of a finding that was asked for.
    """
    there = sorted({item.phrase.finding for item in judged})
    if not there:
        raise UsageError(
            f"grounding: no sentence of split '{task.split}' has a box; take a data set with boxes, such as phantoms"
        )
    wanted = task.evaluation.findings or there
    check_names(wanted, sorted({*task.labels, *there, *known}))
    names = [name for name in wanted if name in there]
    if not names:
        raise UsageError(
            f"evaluation.findings: none of them has a box in split '{task.split}'; there are {', '.join(there)}"
        )
    reason = f"no phrase with a box in split '{task.split}'"
    return names, {name: reason for name in wanted if name not in there}


def summarize_phrases(
    judged: Sequence[Judged], findings: Sequence[str], unit_P: Array, bootstrap: int
) -> dict[str, Metric]:
    """Every score of every map: mean over the phrases of each finding, and the mean of these, with intervals.

    Args:
        findings: those that count; phrases of others are left out.
        unit_P: patient of each phrase; patients are resampled.
    Returns: `mean_SCORE` and `SCORE.FINDING`, with `MAP.` before them for all maps but the patch cosine.
    Source: ours.
    """
    weight_RP = draw_weights(unit_P, bootstrap)
    finding_P = np.array([item.phrase.finding for item in judged])
    metrics: dict[str, Metric] = {}
    for name, kinds in judged[0].scores.items():
        for kind in list_kinds(name, kinds):
            value_P = np.array([item.scores[name][kind] for item in judged])
            means = _average(value_P, finding_P, weight_RP, findings)
            values, resampled = zip(*means.values(), strict=True)
            metrics[name_score(name, f"mean_{kind}")] = summarize(float(np.mean(values)), np.mean(resampled, axis=0))
            metrics |= {name_score(name, f"{kind}.{finding}"): summarize(*pair) for finding, pair in means.items()}
    return metrics


def _average(
    value_P: Array, finding_P: Array, weight_RP: Array, findings: Sequence[str]
) -> dict[str, tuple[float, Array]]:
    """Mean of each finding's phrases, plain and in each resample; an undefined score (NaN) of a phrase is left out."""
    rows = {finding: (finding_P == finding) & ~np.isnan(value_P) for finding in findings}
    return {
        finding: (value_P[own_P].mean(), compute_means(value_P[own_P], weight_RP[:, own_P]))
        for finding, own_P in rows.items()
        if own_P.any()
    }


def _describe(judged: Sequence[Judged], findings: Sequence[str]) -> dict[str, Any]:
    shares = {
        name: [fill_boxes(p.boxes, p.side_px).mean() for p, _ in judged if p.finding == name] for name in findings
    }
    mean_shares = {name: float(np.mean(share)) for name, share in shares.items()}
    others = [name for name in judged[0].scores if name != "patch"]
    return {
        "score": f"patch: {MAPS['patch']}",
        "other_scores": {name: MAPS[name] for name in others},
        "frame": "the centre square of the stored image, in its pixels; maps are resized to it bilinearly, boxes cut",
        "pointing_game": "the centre of the largest patch lies in the union of the phrase's boxes; no tolerance",
        "cnr": "(mean inside - mean outside) / sqrt(variance inside + variance outside) of the boxes",
        "cnr_absolute": "the published one, without the sign: above 0 for any map",
        "miou": f"mean over thresholds {THRESHOLDS} of the map scaled to 0..1; miou_cosine: of the cosine as it stands",
        "mean": "over findings, of the mean over the phrases of each",
        "interval": "95 % percentile bootstrap over patients",
        "findings": {name: {"phrases": len(shares[name]), "box_share": mean_shares[name]} for name in findings},
        "chance": {"mean_pointing_game": float(np.mean(list(mean_shares.values()))), "mean_cnr": 0.0},
        "notes": [f"{name}: pointing game of the {MAPS[name]}" for name in others],
    }
