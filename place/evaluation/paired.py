"""Two evaluations of the same images, compared: every figure in the same resamples of patients, and its difference.

Rows of a TASK.parquet say what a figure was computed from, so that it can be computed again in any resample:

- `label` and `score`, perhaps of several subsets of the training labels: AUROC, average precision; with `predicted` F1;
- `rank`: recall at K, median and mean reciprocal rank;
- `truths`, `scores` and `hits` of an image and finding: average precision of boxes;
- `reference_findings` and `generated_findings` of a report: F1 of findings;
- any other numbers beside `finding`: their mean over the rows of each finding, undefined ones (NaN) left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from place.evaluation.metrics import (
    Array,
    Metric,
    compute_aurocs,
    compute_average_precisions,
    compute_f1s,
    compute_means,
    compute_medians,
    summarize,
)

RANKS = (1, 5, 10)
Columns = dict[str, Array]
Figures = dict[str, Array]
"""Of each figure its value in every resample."""


class Difference(NamedTuple):
    """A figure of both evaluations, the second less the first with its 95 % interval, and the two-sided p of it."""

    first: float
    second: float
    difference: Metric
    p: float | None


class Rows(NamedTuple):
    """Columns of a TASK.parquet, and which image, a column of the weights, each row is of."""

    columns: Columns
    image_Q: Array

    def take(self, chosen_Q: Array) -> Rows:
        """Some of the rows."""
        return Rows({name: column[chosen_Q] for name, column in self.columns.items()}, self.image_Q[chosen_Q])

    def split(self, name: str) -> dict[str, Rows]:
        """The rows of each value of a column, in the order in which they first occur."""
        values = self.columns[name].tolist()
        return {value: self.take(self.columns[name] == value) for value in dict.fromkeys(values)}


def compare_rows(first: Rows, second: Rows, weight_RB: Array) -> dict[str, Difference]:
    """Every figure that both rows tell.

    Args:
        weight_RB: how often each image is in each resample; the same for both: what pairs them.
    Source: ours.
    """
    whole_RB = np.concatenate([np.ones((1, weight_RB.shape[1]), weight_RB.dtype), weight_RB])
    ours, theirs = (compute_figures(rows, whole_RB) for rows in (first, second))
    return {name: compare(ours[name], theirs[name]) for name in ours if name in theirs}


def compare(first_R: Array, second_R: Array) -> Difference:
    """Set two figures side by side: of all images (at 0), then of each resample.

    Source: quoted (Davison and Hinkley 1997) for counting what was seen as one of the resamples; otherwise ours.
    """
    gap_R = second_R - first_R
    drawn_R = gap_R[1:][~np.isnan(gap_R[1:])]
    p = None
    if len(drawn_R):
        tails = (1 + (drawn_R <= 0).sum()) / (len(drawn_R) + 1), (1 + (drawn_R >= 0).sum()) / (len(drawn_R) + 1)
        p = min(1.0, 2 * float(min(tails)))
    return Difference(float(first_R[0]), float(second_R[0]), summarize(gap_R[0], drawn_R), p)


def compute_figures(rows: Rows, weight_RB: Array) -> Figures:
    """Every figure in every resample, by the names of TASK.json; none of rows that hold text alone."""
    for column, compute in READERS.items():
        if column in rows.columns:
            return compute(rows, weight_RB)
    return {}


def _judge_scores(rows: Rows, weight_RB: Array) -> Figures:
    """Figures at each share of the labels; of several subsets of one share their mean."""
    if "share" not in rows.columns:
        return _judge_subset(rows, weight_RB)
    figures: Figures = {}
    for share, own in rows.split("share").items():
        subsets = [_judge_subset(part, weight_RB) for part in own.split("subset").values()]
        before = "" if share == 1 else f"at_{100 * float(share):g}."
        figures |= {f"{before}{name}": np.mean([found[name] for found in subsets], axis=0) for name in subsets[0]}
    return figures


def _judge_subset(rows: Rows, weight_RB: Array) -> Figures:
    kinds: dict[str, dict[str, Array]] = {"auroc": {}, "average_precision": {}}
    for finding, (columns, image_Q) in rows.split("finding").items():
        weight_RQ, label_Q = weight_RB[:, image_Q], columns["label"]
        kinds["auroc"][finding] = compute_aurocs(columns["score"], label_Q, weight_RQ)
        kinds["average_precision"][finding] = compute_average_precisions(columns["score"], label_Q, weight_RQ)
        if "predicted" in columns:
            kinds.setdefault("f1", {})[finding] = compute_f1s(columns["predicted"], label_Q, weight_RQ)
    return _name(kinds)


def _judge_ranks(rows: Rows, weight_RB: Array) -> Figures:
    weight_RQ, rank_Q = weight_RB[:, rows.image_Q], rows.columns["rank"]
    figures = {f"r_at_{k}": compute_means((rank_Q <= k).astype(float), weight_RQ) for k in RANKS}
    figures["median_rank"] = compute_medians(rank_Q, weight_RQ).astype(float)
    figures["mrr"] = compute_means(1.0 / rank_Q, weight_RQ)
    return {f"image_to_text.{name}": values_R for name, values_R in figures.items()}


def _judge_boxes(rows: Rows, weight_RB: Array) -> Figures:
    # Here, because detection brings torch and torchvision.
    from place.evaluation.detection_metrics import KINDS, average, compute_average_precision, read_matches

    kinds: dict[str, dict[str, Array]] = {}
    for finding, (columns, image_Q) in rows.split("finding").items():
        found_RT = compute_average_precision(read_matches(columns), weight_RB[:, image_Q])
        for kind in KINDS:
            kinds.setdefault(kind, {})[finding] = average(found_RT, kind)
    return _name(kinds)


def _judge_reports(rows: Rows, weight_RB: Array) -> Figures:
    # Here, because report generation brings torch.
    from place.evaluation.generation_metrics import compute_finding_f1, unpack_findings

    said_BF, true_BF = (unpack_findings(rows.columns[f"{name}_findings"]) for name in ("generated", "reference"))
    return compute_finding_f1(said_BF, true_BF, weight_RB[:, rows.image_Q])


def _judge_values(rows: Rows, weight_RB: Array) -> Figures:
    numbers = [name for name, column in rows.columns.items() if column.dtype.kind == "f"]
    kinds: dict[str, dict[str, Array]] = {name: {} for name in numbers}
    for finding, (columns, image_Q) in rows.split("finding").items():
        for name in numbers:
            if not np.isnan(columns[name]).all():
                kinds[name][finding] = compute_means(columns[name], weight_RB[:, image_Q])
    return _name(kinds)


def _name(kinds: dict[str, dict[str, Array]]) -> Figures:
    """`mean_KIND` and `KIND.FINDING`; what stands before a kind's last dot stays before."""
    figures: Figures = {}
    for kind, found in kinds.items():
        before, dot, last = kind.rpartition(".")
        if found:
            figures[f"{before}{dot}mean_{last}"] = np.mean(list(found.values()), axis=0)
    for kind, found in kinds.items():
        figures |= {f"{kind}.{finding}": values_R for finding, values_R in found.items()}
    return figures


READERS: dict[str, Callable[[Rows, Array], Figures]] = {
    "label": _judge_scores,
    "rank": _judge_ranks,
    "truths": _judge_boxes,
    "reference_findings": _judge_reports,
    "finding": _judge_values,
}
"""How rows are read, by a column that tells them apart; the first one that is there decides."""
