"""Average precision of boxes: matched by pycocotools, resampled by patient."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from place.evaluation.detector import Boxes
from place.evaluation.metrics import Array, Metric, draw_weights, summarize

COCO_IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
FIELD_IOUS = tuple(round(0.4 + 0.05 * step, 2) for step in range(8))
IOUS = tuple(sorted({*COCO_IOUS, *FIELD_IOUS}))
KINDS = {"ap": COCO_IOUS, "ap_40_75": FIELD_IOUS, "ap_50": (0.5,)}
"""Average precision over COCO's thresholds of intersection over union, over the field's (RSNA, MGCA), and at 0.5."""
RECALLS = np.linspace(0, 1, 101)


class Matches(NamedTuple):
    """Guesses of one finding, the surest first: score, image, and at each threshold whether it hit; truths an image."""

    score_D: Array
    image_D: Array
    hit_TD: Array
    truths_B: Array


def match_boxes(truths: Sequence[Boxes], guesses: Sequence[Boxes], num_findings: int) -> list[Matches]:
    """Matches of each finding over all images, at each threshold of `IOUS`. Source: quoted (COCO, pycocotools)."""
    with redirect_stdout(io.StringIO()):
        judge = COCOeval(_build_coco(truths, num_findings), _build_coco(guesses, num_findings), "bbox")
        judge.params.iouThrs = np.array(IOUS)
        judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [[0, 1e10]], ["all"], [100]
        judge.evaluate()
    count = len(truths)
    return [_join(judge.evalImgs[number * count : (number + 1) * count]) for number in range(num_findings)]


def compute_average_precision(matches: Matches, weight_RB: Array) -> Array:
    """Average precision (R,T) in each resample: precision at 101 recalls, each the best at that recall or a higher one.

    NaN where a resample has no truth. Source: quoted (COCO, pycocotools), with weights; equal to it where they are 1.
    """
    weight_RD = weight_RB[:, matches.image_D].astype(float)
    total_R = weight_RB @ matches.truths_B.astype(float)
    result_RT = np.full((len(weight_RB), len(IOUS)), np.nan)
    for threshold, hit_D in enumerate(matches.hit_TD):
        hits_RD, all_RD = (weight_RD * hit_D).cumsum(axis=1), weight_RD.cumsum(axis=1)
        precision_RD = hits_RD / np.maximum(all_RD, 1)
        best_RD = np.maximum.accumulate(precision_RD[:, ::-1], axis=1)[:, ::-1]
        for row in np.flatnonzero(total_R):
            at = np.searchsorted(hits_RD[row] / total_R[row], RECALLS)
            reached = at < len(hit_D)
            result_RT[row, threshold] = best_RD[row, at[reached]].sum() / len(RECALLS)
    return result_RT


def judge_boxes(
    truths: Sequence[Boxes], guesses: Sequence[Boxes], names: Sequence[str], unit_B: Array, bootstrap: int
) -> dict[str, Metric]:
    """Every kind of average precision of each finding and the mean of these, with intervals.

    Args:
        names: findings, by the numbers in the boxes.
        unit_B: patient of each image; patients are resampled.
    Source: ours, images without boxes included: what is found there is a false alarm.
    """
    return judge_matches(match_boxes(truths, guesses, len(names)), names, unit_B, bootstrap)


def judge_matches(found: Sequence[Matches], names: Sequence[str], unit_B: Array, bootstrap: int) -> dict[str, Metric]:
    """`judge_boxes` of what was matched already."""
    weight_RB = np.concatenate([np.ones((1, len(unit_B))), draw_weights(unit_B, bootstrap)])
    result_FRT = [compute_average_precision(matches, weight_RB) for matches in found]
    metrics: dict[str, Metric] = {}
    for kind in KINDS:
        value_FR = np.stack([average(result_RT, kind) for result_RT in result_FRT])
        mean_R = value_FR.mean(axis=0)
        metrics[f"mean_{kind}"] = summarize(float(mean_R[0]), mean_R[1:])
        metrics |= {f"{kind}.{name}": summarize(float(v[0]), v[1:]) for name, v in zip(names, value_FR, strict=True)}
    return metrics


def average(result_RT: Array, kind: str) -> Array:
    """Mean over the thresholds of a kind."""
    return result_RT[:, [IOUS.index(iou) for iou in KINDS[kind]]].mean(axis=1)


def list_matches(found: Sequence[Matches], names: Sequence[str], sample_ids: Sequence[int]) -> dict[str, Any]:
    """Columns sample_id, finding, truths, scores, hits: a row an image and finding.

    Scores are of its guesses, the surest first; bit t of a guess's hits says whether it hit at threshold t of `IOUS`.
    """
    rows = []
    for name, (score_D, image_D, hit_TD, truths_B) in zip(names, found, strict=True):
        bits_D = (hit_TD.T << np.arange(len(IOUS))).sum(axis=1).astype(np.uint16)
        for image, truths in enumerate(truths_B.tolist()):
            own_D = image_D == image
            rows.append((sample_ids[image], name, truths, score_D[own_D], bits_D[own_D]))
    return dict(zip(("sample_id", "finding", "truths", "scores", "hits"), map(list, zip(*rows)), strict=True))


def read_matches(columns: dict[str, Array]) -> Matches:
    """The matches of one finding back from its rows of `list_matches`; images by the number of their row."""
    counts = [len(scores) for scores in columns["scores"]]
    score_D = np.concatenate([np.empty(0), *columns["scores"]])
    bits_D = np.concatenate([np.empty(0, np.uint16), *columns["hits"]]).astype(np.uint16)
    image_D = np.repeat(np.arange(len(counts)), counts)
    order_D = np.argsort(-score_D, kind="mergesort")
    hit_TD = (bits_D >> np.arange(len(IOUS))[:, None] & 1).astype(bool)
    return Matches(score_D[order_D], image_D[order_D], hit_TD[:, order_D], columns["truths"])


def _build_coco(images: Sequence[Boxes], num_findings: int) -> COCO:
    coco, rows = COCO(), list[dict[str, Any]]()
    for image, boxes in enumerate(images):
        scores = [1.0] * len(boxes.box_P4) if boxes.score_P is None else boxes.score_P.tolist()
        for (x0, y0, x1, y1), finding, score in zip(boxes.box_P4.tolist(), boxes.finding_P.tolist(), scores):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0, "score": score}
            # COCOeval takes a match with id 0 for none.
            rows.append(box | {"id": len(rows) + 1, "image_id": image, "category_id": finding})
    coco.dataset = {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": finding} for finding in range(num_findings)],
        "annotations": rows,
    }
    coco.createIndex()
    return coco


def _join(images: Sequence[dict | None]) -> Matches:
    """What pycocotools says of one finding, image by image; None stands for an image with neither truth nor guess."""
    scores, places, hits = [np.empty(0)], [np.empty(0, int)], [np.empty((len(IOUS), 0), bool)]
    truths_B = np.zeros(len(images), int)
    for image, found in enumerate(images):
        if found is not None:
            scores.append(np.array(found["dtScores"], float))
            places.append(np.full(len(found["dtScores"]), image))
            hits.append(np.asarray(found["dtMatches"]) > 0)
            truths_B[image] = len(found["gtIds"])
    score_D = np.concatenate(scores)
    order_D = np.argsort(-score_D, kind="mergesort")
    return Matches(
        score_D[order_D], np.concatenate(places)[order_D], np.concatenate(hits, axis=1)[:, order_D], truths_B
    )
