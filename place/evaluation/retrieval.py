"""Retrieval between images and unique reports: does an image find its report, and a report one of its images?

Reports are unique by `report_group`: an identical report is one gallery entry, and every image that carries it is a
query of its own (image to text) or a right answer (text to image). Ranks are pessimistic: a tie counts as lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from place.evaluation.encoder import EncodedSplit
from place.evaluation.findings import build_targets
from place.evaluation.metrics import (
    Array,
    Metric,
    TaskResult,
    compute_means,
    compute_medians,
    draw_weights,
    summarize,
    summarize_mean,
)
from place.evaluation.task import Task

RANKS = (1, 5, 10)
PRECISIONS = (5, 10, 100)
MAX_CELLS = 1 << 26
NO_REPORT = -1
SCORES = {
    "instance": "cosine of image and report",
    "pathology": "mean over the report's sentences (T-PORs) of the largest cosine with an observation (V-POR)",
    "combined": "sum of the instance and the pathology score",
}


class Gallery(NamedTuple):
    """Rows of the split that take part.

    `query_Q`: rows of the images; `report_G`: row whose report stands for each unique report; `answer_Q`: which unique
    report each image carries.
    """

    query_Q: Array
    report_G: Array
    answer_Q: Array


def run_retrieval(task: Task) -> TaskResult:
    """Judge retrieval both ways in three score modes, with chance levels.

    Source: inferred (CXR-CLIP, identical texts once); pessimistic ties, intervals and the late interaction are ours.
    """
    split = task.encoded
    groups = [study.report_group if study.sentences else NO_REPORT for study in split.studies]
    gallery = build_gallery(groups, task.evaluation.gallery_size)
    wanted = task.evaluation.findings or task.labels
    # Told and not refused: findings of other tasks are those of boxes and masks.
    left_out = {name: "the data set has no such label" for name in wanted if name not in task.labels}
    names = [name for name in wanted if name not in left_out]
    label_BF = build_targets([study.labels for study in split.studies], names) if names else None
    scores = score_gallery(split, gallery)
    headline = "instance" if task.run.config.loss.instance.weight else "pathology"
    judged = {
        mode: judge_retrieval(score_QG.numpy(), gallery, split.unit_B, label_BF, task.evaluation.bootstrap)
        for mode, score_QG in scores.items()
    }
    metrics = judged.pop(headline)
    metrics |= {f"{mode}.{name}": metric for mode, other in judged.items() for name, metric in other.items()}
    rows = list_found(split, gallery, scores[headline].numpy())
    protocol = _describe(headline, gallery, label_BF)
    protocol |= {"sections": task.sections, "without_report": groups.count(NO_REPORT), "left_out": left_out}
    return TaskResult("retrieval", metrics, protocol, len(gallery.query_Q), rows)


def build_gallery(groups: list[int], size: int | None) -> Gallery:
    """Take the first unique reports by hash, and every image that carries one of them.

    Args:
        groups: report group of each study, studies in sample_id order; `NO_REPORT` takes no part.
        size: unique reports; none takes all.
    """
    group_B = np.asarray(groups)
    group_G, report_G = np.unique(group_B, return_index=True)
    is_told_G = group_G != NO_REPORT
    group_G, report_G = group_G[is_told_G][:size], report_G[is_told_G][:size]
    query_Q = np.flatnonzero(np.isin(group_B, group_G))
    return Gallery(query_Q, report_G, np.searchsorted(group_G, group_B[query_Q]))


def score_gallery(split: EncodedSplit, gallery: Gallery) -> dict[str, Tensor]:
    """Score (Q, G) of every image with every unique report in each mode."""
    images, reports = torch.from_numpy(gallery.query_Q), torch.from_numpy(gallery.report_G)
    instance_QG = split.image_BE[images] @ split.text_BE[reports].T
    pathology_QG = score_sentences(split.observations_BKE[images], split.sentences_BSE[reports], split.mask_BS[reports])
    return {"instance": instance_QG, "pathology": pathology_QG, "combined": instance_QG + pathology_QG}


def score_sentences(observations_QKE: Tensor, sentences_GSE: Tensor, mask_GS: Tensor) -> Tensor:
    """Late interaction (Q, G): mean over a report's sentences of the largest cosine with an observation."""
    sentence_ME, report_M = sentences_GSE[mask_GS], mask_GS.nonzero()[:, 0]
    count_G = mask_GS.sum(dim=1)
    step = max(1, MAX_CELLS // (observations_QKE.shape[1] * max(1, len(sentence_ME))))
    rows = []
    for observations_PKE in observations_QKE.split(step):
        best_PM = (observations_PKE @ sentence_ME.T).amax(dim=1)
        sum_PG = torch.zeros(len(best_PM), len(count_G)).index_add_(1, report_M, best_PM)
        rows.append(sum_PG / count_G.clamp(min=1))
    return torch.cat(rows)


def list_found(split: EncodedSplit, gallery: Gallery, score_QG: Array) -> dict[str, Any]:
    """Of each image: the rank of its own report, that report, and the nearest one with a study that carries it."""
    rank_Q = rank_matches(score_QG, gallery.answer_Q[:, None] == np.arange(len(gallery.report_G)))
    own = [split.studies[row] for row in gallery.query_Q]
    found = [split.studies[row] for row in gallery.report_G[score_QG.argmax(axis=1)]]
    return {
        "sample_id": [study.sample_id for study in own],
        "rank": rank_Q,
        "report": [" ".join(study.sentences) for study in own],
        "found_sample_id": [study.sample_id for study in found],
        "found": [" ".join(study.sentences) for study in found],
    }


def judge_retrieval(
    score_QG: Array, gallery: Gallery, unit_B: Array, label_BF: Array | None = None, bootstrap: int = 0
) -> dict[str, Metric]:
    """R@K, median rank and MRR both ways, and P@K by label where there are labels.

    Args:
        score_QG: image (row) against unique report (column), the higher the nearer.
        unit_B: patient of each study; queries are resampled by patient, the gallery stays.
        label_BF: 1, 0 or NaN for each study; none gives no P@K.
        bootstrap: resamples.
    Source: ours.
    """
    is_match_QG = gallery.answer_Q[:, None] == np.arange(len(gallery.report_G))
    image_weight = draw_weights(unit_B[gallery.query_Q], bootstrap)
    report_weight = draw_weights(unit_B[gallery.report_G], bootstrap)
    ways = {
        "image_to_text": _judge_ranks(rank_matches(score_QG, is_match_QG), image_weight),
        "text_to_image": _judge_ranks(rank_matches(score_QG.T, is_match_QG.T), report_weight),
    }
    if label_BF is not None:
        ways["image_to_text"] |= _judge_precision(score_QG, gallery, label_BF, image_weight)
    return {f"{way}.{name}": metric for way, metrics in ways.items() for name, metric in metrics.items()}


def rank_matches(score_QG: Array, is_match_QG: Array) -> Array:
    """Rank (from 1) of each query's best match: one more than the wrong entries that are not clearly worse.

    Not clearly worse includes equal and NaN, so a collapsed model ranks last, not first.
    """
    best_Q1 = np.where(is_match_QG, score_QG, -np.inf).max(axis=1, keepdims=True)
    return 1 + (~(score_QG < best_Q1) & ~is_match_QG).sum(axis=1)


def compute_precision(score_QG: Array, gallery: Gallery, label_BF: Array, k: int) -> Array:
    """Share (Q, F) of an image's first k *other* reports that share its positive finding; NaN where it is not positive.

    The image's own report is left out, so that P@K tells meaning, not identity. Ties are pessimistic.
    """
    label_GF, label_QF = label_BF[gallery.report_G] == 1, label_BF[gallery.query_Q] == 1
    score_QG = np.where(gallery.answer_Q[:, None] == np.arange(score_QG.shape[1]), -np.inf, score_QG)
    precision_QF = np.full(label_QF.shape, np.nan)
    for finding, relevant_G in enumerate(label_GF.T):
        rows = label_QF[:, finding]
        order = np.lexsort((np.broadcast_to(relevant_G, score_QG[rows].shape), -score_QG[rows]), axis=1)
        precision_QF[rows, finding] = relevant_G[order[:, :k]].mean(axis=1)
    return precision_QF


def compute_chance(num_entries: int, num_matches_Q: Array) -> dict[str, float]:
    """What random order would give, for queries with so many matches among the entries."""
    counts, share = np.unique(num_matches_Q, return_counts=True)
    left_R = num_entries - np.arange(num_entries + 1)
    miss_R = np.zeros(num_entries + 1)
    for matches, weight in zip(counts, share / share.sum(), strict=True):
        steps_R = np.clip((left_R[:-1] - matches) / left_R[:-1], 0, 1)
        miss_R += weight * np.concatenate([[1.0], steps_R.cumprod()])
    chance = {f"r_at_{k}": 1 - miss_R[min(k, num_entries)] for k in RANKS}
    chance["median_rank"] = float((miss_R <= 0.5 + 1e-12).argmax())
    chance["mrr"] = (-np.diff(miss_R) / np.arange(1, num_entries + 1)).sum()
    return {name: float(value) for name, value in chance.items()}


def _judge_ranks(rank_Q: Array, weight_RQ: Array) -> dict[str, Metric]:
    median = compute_medians(rank_Q, np.ones((1, len(rank_Q)), np.uint8))[0]
    metrics = {f"r_at_{k}": summarize_mean((rank_Q <= k).astype(float), weight_RQ) for k in RANKS}
    metrics["median_rank"] = summarize(median, compute_medians(rank_Q, weight_RQ).astype(float))
    return metrics | {"mrr": summarize_mean(1.0 / rank_Q, weight_RQ)}


def _judge_precision(score_QG: Array, gallery: Gallery, label_BF: Array, weight_RQ: Array) -> dict[str, Metric]:
    """Mean over the findings that some image is positive for, each the mean over these images."""
    metrics = {}
    label_BF = label_BF[:, (label_BF[gallery.query_Q] == 1).any(axis=0)]
    for k in PRECISIONS:
        if k < len(gallery.report_G) and label_BF.shape[1]:
            precision_QF = compute_precision(score_QG, gallery, label_BF, k)
            resampled_RF = np.stack([compute_means(column, weight_RQ) for column in precision_QF.T], axis=1)
            metrics[f"p_at_{k}"] = summarize(np.nanmean(precision_QF, axis=0).mean(), resampled_RF.mean(axis=1))
    return metrics


def _compute_precision_chance(gallery: Gallery, label_BF: Array) -> dict[str, float]:
    """P@K of a random order: the precision among all other reports."""
    num_others = len(gallery.report_G) - 1
    blank_QG = np.zeros((len(gallery.query_Q), num_others + 1))
    label_BF = label_BF[:, (label_BF[gallery.query_Q] == 1).any(axis=0)]
    if not label_BF.shape[1]:
        return {}
    chance = float(np.nanmean(compute_precision(blank_QG, gallery, label_BF, num_others), axis=0).mean())
    return {f"p_at_{k}": chance for k in PRECISIONS if k <= num_others}


def _describe(headline: str, gallery: Gallery, label_BF: Array | None) -> dict[str, Any]:
    images_G = np.bincount(gallery.answer_Q)
    num_images, num_reports = len(gallery.query_Q), len(images_G)
    chance = {"image_to_text": compute_chance(num_reports, np.ones(num_images, int))}
    chance["text_to_image"] = compute_chance(num_images, images_G)
    if label_BF is not None:
        chance["image_to_text"] |= _compute_precision_chance(gallery, label_BF)
    return {
        "score": f"{headline}: {SCORES[headline]}",
        "headline_rule": "instance, which is trained to retrieve, unless its loss was off",
        "other_scores": {mode: text for mode, text in SCORES.items() if mode != headline},
        "gallery": f"{num_reports} unique reports (the first by report hash), {num_images} images that carry them",
        "num_reports": num_reports,
        "num_images": num_images,
        "interval": "95 % percentile bootstrap over the patients of the queries; the gallery stays",
        "precision": "P@K: share of the first K reports, its own left out, with its finding; mean over findings",
        "ties": "pessimistic: an entry with an equal score is ahead",
        "chance": chance,
    }
