"""Figures with their bootstrap intervals: resampled patients are weights, so 1,000 resamples are one matrix product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MAX_CELLS = 1 << 23
NUM_BINS = 15
MIN_RESAMPLES, MAX_NOTED = 0.95, 4
"""Share of the resamples that an interval is of unless a note says otherwise, and how many figures a note names."""


class Metric(NamedTuple):
    """A figure and its 95 % bootstrap interval; none where no resample could tell."""

    value: float
    low: float | None = None
    high: float | None = None


class CountedMetric(Metric):
    """A figure that knows how many resamples its interval is of: those that lack a class of some finding tell none."""

    resamples: int = 0


class TaskResult(NamedTuple):
    """What one task found.

    `metrics` by name, the headline first; `protocol` says how they came about, chance levels included; `num_samples`
    counts the images that were judged, or the phrases. `rows` are columns of what each figure was computed from,
    written as TASK.parquet: with sample_id, finding, label and score the page draws curves.
    """

    task: str
    metrics: dict[str, Metric]
    protocol: dict[str, Any]
    num_samples: int
    rows: dict[str, Any] | None = None


def draw_weights(unit_B: Array, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw bootstrap resamples of whole units (patients) and say how often each row is in each of them.

    Args:
        unit_B: unit of each row; rows of one unit come and go together.
        count: resamples R; 0 gives an empty matrix, hence no intervals.
        seed: of the resampling.
    Returns: weight_RB, uint8.
    Source: ours.
    """
    unit_B = np.unique(unit_B, return_inverse=True)[1].ravel()
    num_units = int(unit_B.max()) + 1
    rng = np.random.default_rng(seed)
    weight_RB = np.empty((count, len(unit_B)), np.uint8)
    for row in range(count):
        picks = rng.integers(num_units, size=num_units)
        weight_RB[row] = np.bincount(picks, minlength=num_units)[unit_B]
    return weight_RB


def summarize(value: float, resampled_R: Array) -> Metric:
    """Put the 2.5 and 97.5 percentiles of the resamples beside a figure; undefined resamples (NaN) are left out."""
    resampled_R = resampled_R[~np.isnan(resampled_R)]
    ends = np.percentile(resampled_R, [2.5, 97.5]).tolist() if len(resampled_R) else ()
    metric = CountedMetric(float(value), *ends)
    metric.resamples = len(resampled_R)
    return metric


def count_resamples(metrics: Mapping[str, Metric], bootstrap: int) -> dict[str, int]:
    """Of each figure whose interval is of fewer resamples than were drawn: of how many."""
    counted = {name: metric.resamples for name, metric in metrics.items() if isinstance(metric, CountedMetric)}
    return {name: count for name, count in counted.items() if count < bootstrap}


def note_resamples(used: Mapping[str, int], bootstrap: int) -> list[str]:
    """A line on intervals that are of too few resamples; none where all are of enough."""
    few = [f"{name} {count}" for name, count in used.items() if count < MIN_RESAMPLES * bootstrap]
    if not few:
        return []
    shown, more = ", ".join(few[:MAX_NOTED]), f" and {len(few) - MAX_NOTED} more" if len(few) > MAX_NOTED else ""
    why = "in the others some finding has no positive or no negative image"
    return [f"intervals of fewer than the {bootstrap} resamples, as {why}: {shown}{more}"]


def summarize_mean(value_Q: Array, weight_RQ: Array) -> Metric:
    """Mean of a per-query figure, with its interval."""
    return summarize(value_Q.mean(), compute_means(value_Q, weight_RQ))


def compute_means(value_Q: Array, weight_RQ: Array) -> Array:
    """Weighted mean in each resample; NaN values of a query are left out."""
    known_Q = ~np.isnan(value_Q)
    with np.errstate(invalid="ignore"):
        return weight_RQ @ np.where(known_Q, value_Q, 0.0) / (weight_RQ @ known_Q.astype(float))


def compute_f1s(predicted_B: Array, target_B: Array, weight_RB: Array) -> Array:
    """F1 of 0 or 1 predictions in each resample; 0 where there is neither a positive nor a prediction of one.

    Source: ours; equals scikit-learn's `f1_score` with `sample_weight` and `zero_division=0`, which a test shows.
    """
    hits_R = weight_RB @ (predicted_B * target_B).astype(float)
    sums_R = weight_RB @ (predicted_B.astype(float) + target_B)
    return 2 * hits_R / np.maximum(sums_R, 1)


def compute_calibration_errors(share_B: Array, target_B: Array, weight_RB: Array) -> Array:
    """Expected calibration error in each resample: of each bin of equal width the gap of probability and truth.

    Args:
        share_B: probability of the positive class.
        target_B: 0 or 1.
        weight_RB: resamples from `draw_weights`; NaN for one without a row.
    Source: ours; equals torchmetrics' `binary_calibration_error` of the rows that were drawn, which a test shows.
    """
    bin_B = np.digitize(share_B, np.linspace(0, 1, NUM_BINS + 1)) - 1
    gap_BN = np.where(bin_B[:, None] == np.arange(NUM_BINS + 1), (share_B - target_B)[:, None], 0.0)
    with np.errstate(invalid="ignore"):
        return np.abs(weight_RB @ gap_BN).sum(axis=1) / weight_RB.sum(axis=1, dtype=float)


def compute_medians(rank_Q: Array, weight_RQ: Array) -> Array:
    """Smallest rank that at least half of each resample reaches."""
    order_Q = np.argsort(rank_Q, kind="stable")
    reached_RQ = weight_RQ[:, order_Q].astype(np.int64).cumsum(axis=1)
    return rank_Q[order_Q][(2 * reached_RQ >= reached_RQ[:, -1:]).argmax(axis=1)]


def compute_aurocs(score_B: Array, target_B: Array, weight_RB: Array) -> Array:
    """AUROC in each resample, ties count half; NaN where a resample lacks a class.

    Args:
        score_B: the higher, the more positive.
        target_B: 0 or 1.
        weight_RB: resamples from `draw_weights`.
    Source: ours; equals scikit-learn's `roc_auc_score` with `sample_weight`, which a test shows.
    """

    def compute(positive_RT: Array, negative_RT: Array) -> Array:
        below_RT = negative_RT.cumsum(axis=1) - negative_RT
        wins_R = (positive_RT * (below_RT + negative_RT / 2)).sum(axis=1)
        return wins_R / (positive_RT.sum(axis=1) * negative_RT.sum(axis=1))

    return _over_ties(compute, score_B, target_B, weight_RB)


def compute_average_precisions(score_B: Array, target_B: Array, weight_RB: Array) -> Array:
    """Average precision in each resample; arguments, NaN and source as `compute_aurocs`."""

    def compute(positive_RT: Array, negative_RT: Array) -> Array:
        hit_RT = positive_RT[:, ::-1].cumsum(axis=1)
        miss_RT = negative_RT[:, ::-1].cumsum(axis=1)
        precision_RT = hit_RT / np.maximum(hit_RT + miss_RT, 1)
        return (positive_RT[:, ::-1] * precision_RT).sum(axis=1) / hit_RT[:, -1]

    return _over_ties(compute, score_B, target_B, weight_RB)


def _over_ties(compute: Callable[[Array, Array], Array], score_B: Array, target_B: Array, weight_RB: Array) -> Array:
    """Weight of positives and negatives at each distinct score T, rising, handed over in pieces that fit memory."""
    order_B = np.argsort(score_B, kind="stable")
    starts_T = np.flatnonzero(np.diff(score_B[order_B], prepend=-np.inf))
    target_B = target_B[order_B].astype(np.float64)
    step = max(1, MAX_CELLS // len(score_B))
    parts = [np.empty(0)]
    for first in range(0, len(weight_RB), step):
        weight_PB = weight_RB[first : first + step, order_B].astype(np.float64)
        positive_PT = np.add.reduceat(weight_PB * target_B, starts_T, axis=1)
        with np.errstate(invalid="ignore"):
            parts.append(compute(positive_PT, np.add.reduceat(weight_PB, starts_T, axis=1) - positive_PT))
    return np.concatenate(parts)
