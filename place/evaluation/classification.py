"""Linear probe: what logistic regression on the frozen image encoder's features makes of few and of many labels.

Peers' protocol (MGCA, CXR-CLIP): 1, 10 and 100 % of the training labels. Subsets are whole patients; penalty and
thresholds are chosen on the validation split, per finding, and the judged split is used once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit
from sklearn.metrics import brier_score_loss, f1_score
from torch import Tensor

from place.config import UsageError
from place.evaluation.encoder import get_units, read_units
from place.evaluation.findings import (
    Findings,
    choose_findings,
    describe_findings,
    is_one_of_many,
    list_scores,
    resample_accuracy,
    resample_findings,
)
from place.evaluation.metrics import (
    Array,
    Metric,
    TaskResult,
    compute_calibration_errors,
    compute_f1s,
    compute_means,
    draw_weights,
    summarize,
)
from place.evaluation.probe import FeatureSplit, Probed, draw_subsets, probe
from place.evaluation.task import Task

Figures = dict[str, tuple[float, Array]]
"""Of each figure its value, and its value in every resample of patients."""


Fit = Callable[[Array, list[str]], Probed]
"""Trains on rows of the training split for some findings."""


class Labelled(NamedTuple):
    """Labels, patients and ids of the images of a split."""

    labels: list[dict[str, int | None]]
    unit_B: Array
    sample_ids: list[int]


class Judged(NamedTuple):
    """Figures of all shares of the labels, what was judged, how each share was trained; the scores of every probe."""

    metrics: dict[str, Metric]
    findings: Findings
    shares: dict[str, Any]
    num_images: int
    rows: dict[str, Any]


def run_classification(task: Task) -> TaskResult:
    """Probe the frozen encoder at each share of the training labels.

    Returns: `mean_auroc` and `auroc.FINDING` (likewise average_precision, f1, brier, calibration_error) with all
        labels, with fewer the same after `at_PERCENT.`, as means over subsets; `accuracy` where there are classes.
    Raises:
        UsageError: the data set has no training or no validation split.
    Source: quoted (Wang et al. 2022, MGCA) for the shares of labels; the rest is ours.
    """
    train, val, test = (read_features(task, name) for name in (task.train_split, task.val_split, task.split))
    judged = judge_probes(task, train, val, test)
    protocol = describe_probe(task, judged) | {
        "score": f"L2 logistic regression on the frozen image encoder's {train.feature_BD.shape[1]} pooled features",
        "trained_on": f"{len(train.labels)} images of '{task.train_split}'",
    }
    return TaskResult("classification", judged.metrics, protocol, judged.num_images, judged.rows)


def judge_probes(task: Task, train: FeatureSplit, val: FeatureSplit, test: FeatureSplit) -> Judged:
    """Probe at each share of the training patients."""
    return judge_shares(
        task,
        train.unit_B,
        Labelled(test.labels, test.unit_B, test.sample_ids),
        lambda rows, names: probe(_pick(train, rows), val, test.feature_BD, names),
    )


def judge_shares(task: Task, train_unit_B: Array, test: Labelled, fit: Fit) -> Judged:
    """Train with each share of the training patients, the largest first; shares below 1 over several subsets.

    Args:
        fit: trains on rows of the training split for findings, and scores the images of `test`.
    """
    evaluation = task.evaluation
    findings = choose_findings(test.labels, task.labels, evaluation.findings)
    weight_RB = draw_weights(test.unit_B, evaluation.bootstrap)
    metrics: dict[str, Metric] = {}
    shares: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for share in sorted(evaluation.label_shares, reverse=True):
        subsets = draw_subsets(train_unit_B, share, 1 if share == 1 else evaluation.label_subsets)
        probes = []
        for number, subset in enumerate(subsets, start=1):
            probes.append(fit(subset, findings.names))
            rows.append(list_probe(test.sample_ids, probes[-1], findings, share, number - 1))
            task.report(f"train with {share:.3g} of the labels", number, len(subsets))
        before = "" if share == 1 else f"at_{100 * share:g}."
        figures = [judge_probe(item, findings, weight_RB) for item in probes]
        metrics |= {before + name: metric for name, metric in _average(figures).items()}
        shares[f"{100 * share:g} %"] = _describe_share(train_unit_B, subsets, probes, findings.names)
    joined = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    return Judged(metrics, findings, shares, len(test.labels), joined)


def list_probe(
    sample_ids: Sequence[int], item: Probed, findings: Findings, share: float, subset: int
) -> dict[str, Any]:
    """Rows of `list_scores` with `predicted` by the threshold, the share of the labels and the number of the subset."""
    rows = list_scores(sample_ids, item.score_BF, findings)
    known_FB = ~np.isnan(findings.target_BF.T)
    count = len(rows["sample_id"])
    return rows | {
        "predicted": item.predicted_BF.T[known_FB].astype(np.int8),
        "share": np.full(count, share),
        "subset": np.full(count, subset, np.int16),
    }


def judge_probe(item: Probed, findings: Findings, weight_RB: Array) -> Figures:
    """Every figure of one probe; unknown and uncertain labels count nowhere.

    Source: ours; scikit-learn's AUROC, average precision, F1, Brier score and accuracy, torchmetrics' calibration error
        (15 bins of equal width, of the probability of the finding).
    """
    figures = resample_findings(item.score_BF, findings, weight_RB)
    found: dict[str, list[tuple[float, Array]]] = {"f1": [], "brier": [], "calibration_error": []}
    for score_B, predicted_B, target_B in zip(item.score_BF.T, item.predicted_BF.T, findings.target_BF.T, strict=True):
        known_B = ~np.isnan(target_B)
        target, predicted, weight = target_B[known_B], predicted_B[known_B], weight_RB[:, known_B]
        share = expit(score_B[known_B])
        found["f1"].append((f1_score(target, predicted, zero_division=0), compute_f1s(predicted, target, weight)))
        found["brier"].append((brier_score_loss(target, share), compute_means((share - target) ** 2, weight)))
        whole_RB = np.concatenate([np.ones((1, len(target)), np.uint8), weight])
        errors_R = compute_calibration_errors(share, target, whole_RB)
        found["calibration_error"].append((errors_R[0], errors_R[1:]))
    for kind, pairs in found.items():
        values, resampled = zip(*pairs, strict=True)
        figures[f"mean_{kind}"] = float(np.mean(values)), np.mean(resampled, axis=0)
        figures |= {f"{kind}.{name}": pair for name, pair in zip(findings.names, pairs, strict=True)}
    if is_one_of_many(findings.target_BF):
        figures["accuracy"] = resample_accuracy(item.score_BF, findings.target_BF, weight_RB)
    return figures


def read_features(task: Task, split: str) -> FeatureSplit:
    """Pooled features of every image of a split."""
    units = require_units(task, "classification", split)
    features: list[Tensor] = []
    labels, ids = [], []
    for samples in task.read_batches(split, f"encode {split}"):
        features.append(task.encoder.encode_images([sample["image"] for sample in samples]))
        labels += [sample["labels"] for sample in samples]
        ids += [sample["sample_id"] for sample in samples]
    return FeatureSplit(torch.cat(features).numpy(), labels, get_units(units, ids), ids)


def require_units(task: Task, name: str, split: str) -> dict[int, str]:
    """Patients of a split that a task cannot do without. Raises UsageError."""
    units = read_units(task.data_dir, split)
    if not units:
        raise UsageError(f"{name}: the data set has no split '{split}'; prepare it with train, val and test patients")
    return units


def describe_probe(task: Task, judged: Judged) -> dict[str, Any]:
    """How a probe was trained and judged."""
    return {
        "shares": judged.shares,
        "subsets": "whole patients, drawn with seeds 0, 1, ...",
        "chosen_on": f"penalty by AUROC and threshold by F1, each per finding, on '{task.val_split}'",
        "classes": "one-against-rest logits, the highest wins" if "accuracy" in judged.metrics else None,
        "chance": {"mean_auroc": 0.5},
        "interval": "95 % percentile bootstrap over patients; means over subsets are resampled with the subsets fixed",
    } | describe_findings(judged.findings)


def _describe_share(
    train_unit_B: Array, subsets: Sequence[Array], probes: Sequence[Probed], names: Sequence[str]
) -> dict[str, Any]:
    if probes[0].step is None:
        chosen: dict[str, Any] = {"penalty": [dict(zip(names, item.penalty_F, strict=True)) for item in probes]}
    else:
        chosen = {"step": [item.step for item in probes]}
    return {
        "images": [len(rows) for rows in subsets],
        "patients": [len(np.unique(train_unit_B[rows])) for rows in subsets],
        "untrained": [item.untrained for item in probes],
        **chosen,
        "threshold": [dict(zip(names, item.threshold_F, strict=True)) for item in probes],
    }


def _average(figures: Sequence[Figures]) -> dict[str, Metric]:
    """Means over probes; intervals are over patients, with the probes as they are."""
    metrics = {}
    for name in figures[0]:
        values, resampled = zip(*(found[name] for found in figures), strict=True)
        metrics[name] = summarize(float(np.mean(values)), np.mean(resampled, axis=0))
    return metrics


def _pick(split: FeatureSplit, rows: Array) -> FeatureSplit:
    labels, ids = ([part[row] for row in rows] for part in (split.labels, split.sample_ids))
    return FeatureSplit(split.feature_BD[rows], labels, split.unit_B[rows], ids)
