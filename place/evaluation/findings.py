"""Labels to figures per finding: which findings can be judged, and AUROC and average precision of their scores."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from place.config import UsageError
from place.evaluation.metrics import (
    Array,
    Metric,
    compute_aurocs,
    compute_average_precisions,
    compute_means,
    draw_weights,
    summarize,
)


class Findings(NamedTuple):
    """Findings that can be judged, their labels, and why others cannot.

    `target_BF`: 1 positive, 0 negative, NaN uncertain or unknown; `left_out`: finding to reason.
    """

    names: list[str]
    target_BF: Array
    left_out: dict[str, str]


def choose_findings(
    labels: Sequence[dict[str, int | None]], known: Sequence[str], wanted: Sequence[str] = ()
) -> Findings:
    """Take the findings that have positives and negatives among the studies; uncertain (-1) and null are no label.

    Args:
        labels: of each study.
        known: label names of the data set.
        wanted: findings asked for; empty takes all known ones.
    Raises:
        UsageError: a finding the data set does not have, or none that can be judged.
    Source: ours.
    """
    check_names(wanted, known)
    names = list(wanted or known)
    target_BF = build_targets(labels, names)
    positives_F, negatives_F = (target_BF == 1).sum(axis=0), (target_BF == 0).sum(axis=0)
    left_out = {
        name: f"{positives} positive and {negatives} negative studies"
        for name, positives, negatives in zip(names, positives_F, negatives_F, strict=True)
        if not (positives and negatives)
    }
    if len(left_out) == len(names):
        raise UsageError(
            "no label of the data set has both positive and negative studies in this split; use another split"
        )
    keep_F = np.array([name not in left_out for name in names])
    return Findings([name for name in names if name not in left_out], target_BF[:, keep_F], left_out)


def check_names(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a finding of `evaluation.findings` that the data set does not have. Raises UsageError."""
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UsageError(
                f"evaluation.findings: the data set has no label '{name}'"
                + (f"; did you mean '{near[0]}'?" if near else f"; it has {', '.join(known)}")
            )


def build_targets(labels: Sequence[dict[str, int | None]], names: Sequence[str]) -> Array:
    """Label matrix (B, F): 1, 0, and NaN for uncertain and unknown."""
    rows = [[row.get(name) for name in names] for row in labels]
    target_BF = np.array([[np.nan if cell is None else float(cell) for cell in row] for row in rows])
    return np.where(target_BF == -1, np.nan, target_BF)


def judge_findings(
    score_BF: Array, findings: Findings, unit_B: Array, bootstrap: int, seed: int = 0
) -> dict[str, Metric]:
    """AUROC and average precision per finding and their means, each with its bootstrap interval.

    Args:
        score_BF: the higher, the more positive.
        findings: from `choose_findings`.
        unit_B: patient of each study; patients are resampled.
        bootstrap: resamples; 0 gives no intervals.
    Returns: `mean_auroc`, `mean_average_precision`, then `auroc.NAME` and `average_precision.NAME`, and `accuracy`
        where each image is positive for exactly one of the findings, of three or more (5x200).
    Source: ours.
    """
    weight_RB = draw_weights(unit_B, bootstrap, seed)
    resampled = resample_findings(score_BF, findings, weight_RB)
    if is_one_of_many(findings.target_BF == 1):
        resampled["accuracy"] = resample_accuracy(score_BF, findings.target_BF == 1, weight_RB)
    return {name: summarize(*pair) for name, pair in resampled.items()}


def resample_findings(score_BF: Array, findings: Findings, weight_RB: Array) -> dict[str, tuple[float, Array]]:
    """The figures of `judge_findings`, each with its value in every resample."""
    values: dict[str, list[tuple[float, Array]]] = {"auroc": [], "average_precision": []}
    for score_B, target_B in zip(score_BF.T, findings.target_BF.T, strict=True):
        known_B = ~np.isnan(target_B)
        score, target, weight = score_B[known_B], target_B[known_B], weight_RB[:, known_B]
        values["auroc"].append((roc_auc_score(target, score), compute_aurocs(score, target, weight)))
        values["average_precision"].append(
            (average_precision_score(target, score), compute_average_precisions(score, target, weight))
        )
    figures = {f"mean_{kind}": _mean(pairs) for kind, pairs in values.items()}
    for kind, pairs in values.items():
        figures |= {f"{kind}.{name}": pair for name, pair in zip(findings.names, pairs, strict=True)}
    return figures


def is_one_of_many(target_BF: Array) -> bool:
    """Whether the findings are classes: three or more, each image known to be of exactly one."""
    return target_BF.shape[1] > 2 and not np.isnan(target_BF).any() and bool((target_BF.sum(axis=1) == 1).all())


def resample_accuracy(score_BF: Array, target_BF: Array, weight_RB: Array) -> tuple[float, Array]:
    """Share of images whose class has the highest score, and that share in every resample."""
    truth_B, guess_B = target_BF.argmax(axis=1), score_BF.argmax(axis=1)
    return accuracy_score(truth_B, guess_B), compute_means((truth_B == guess_B).astype(float), weight_RB)


def list_scores(sample_ids: Sequence[int], score_BF: Array, findings: Findings) -> dict[str, Any]:
    """Columns sample_id, finding, label (1 or 0) and score: a row an image and finding, where there is a label."""
    known_FB = ~np.isnan(findings.target_BF.T)
    place_F, row_B = known_FB.nonzero()
    return {
        "sample_id": np.array(sample_ids, dtype=np.int64)[row_B],
        "finding": [findings.names[place] for place in place_F],
        "label": findings.target_BF.T[known_FB].astype(np.int8),
        "score": score_BF.T[known_FB],
    }


def describe_findings(findings: Findings) -> dict[str, Any]:
    """Counts of each judged finding, and the findings left out with the reason, for the protocol."""
    counts = {
        name: {
            "positive": int((column == 1).sum()),
            "negative": int((column == 0).sum()),
            "no_label": int(np.isnan(column).sum()),
        }
        for name, column in zip(findings.names, findings.target_BF.T, strict=True)
    }
    return {"findings": counts, "left_out": findings.left_out}


def _mean(pairs: list[tuple[float, Array]]) -> tuple[float, Array]:
    """A resample without a class of some finding has no mean over the same findings: its NaN drops it."""
    return float(np.mean([value for value, _ in pairs])), np.mean([resampled for _, resampled in pairs], axis=0)
