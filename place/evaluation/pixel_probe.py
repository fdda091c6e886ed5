"""The baseline to beat: what logistic regression on raw pixels makes of the same findings.

Logistic regression with an L2 penalty needs pixels only through their inner products (the representer theorem), so it
is solved exactly on the Cholesky factor of the n x n Gram matrix instead of on n x pixels, all findings in one L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from place.config import UsageError
from place.data.prepared import read_samples
from place.data.transforms import eval_transform, read_image
from place.evaluation.encoder import get_units, read_units
from place.evaluation.findings import (
    Findings,
    build_targets,
    choose_findings,
    describe_findings,
    judge_findings,
    list_scores,
)
from place.evaluation.metrics import Array, TaskResult
from place.evaluation.task import Task

PENALTIES = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
MAX_SIDE_PX = 96
MAX_TRAIN = 4000


class Pixels(NamedTuple):
    """Grey images of a split, a row each, in stored order."""

    pixel_BP: Array
    labels: list[dict[str, int | None]]
    unit_B: Array
    sample_ids: list[int]


def run_pixel_probe(task: Task) -> TaskResult:
    """Train the probe on the training split, choose its penalty per finding on the validation split, judge it.

    Raises:
        UsageError: the data set has no training or no validation split.
    Source: ours.
    """
    data = task.run.config.data
    train, val = (_read_pixels(task, name, MAX_TRAIN) for name in (data.train_split, data.val_split))
    test = _read_pixels(task, task.split)
    findings = choose_findings(test.labels, task.labels, task.evaluation.findings)
    features = build_features(train.pixel_BP, [val.pixel_BP, test.pixel_BP])
    train_BF, val_BF = (build_targets(split.labels, findings.names) for split in (train, val))
    fits = fit_path(features[0], train_BF, PENALTIES, lambda done: task.report("pixel probe", done, len(PENALTIES)))
    chosen_F = choose_penalties([predict(features[1], fit) for fit in fits], val_BF)
    score_BF = np.stack([predict(features[2], fits[c])[:, f] for f, c in enumerate(chosen_F)], axis=1)
    metrics = judge_findings(score_BF, findings, test.unit_B, task.evaluation.bootstrap)
    protocol = _describe(task, findings, chosen_F, len(train.labels))
    rows = list_scores(test.sample_ids, score_BF, findings)
    return TaskResult("pixel_probe", metrics, protocol, len(test.labels), rows)


def build_features(train_BP: Array, others: list[Array]) -> list[Array]:
    """Standardise each pixel by the training images and turn rows into features with the same inner products.

    Args:
        train_BP: training images, a row each.
        others: images of other splits.
    Returns: (B, n) features of the training images, then of the others; n training images.
    Source: ours.
    """
    mean_P, std_P = train_BP.mean(axis=0), train_BP.std(axis=0)
    rows = [
        (pixel_BP - mean_P) / np.maximum(std_P, 1e-3) / np.sqrt(train_BP.shape[1]) for pixel_BP in (train_BP, *others)
    ]
    gram = rows[0] @ rows[0].T
    # The ridge keeps equal images from making the matrix singular; it is 1e-4 of an image's own inner product.
    factor = cholesky(gram.astype(np.float64) + 1e-4 * np.eye(len(gram)), lower=True)
    solved = [solve_triangular(factor, rows[0] @ other.T, lower=True).T for other in rows[1:]]
    return [feature.astype(np.float32) for feature in (factor, *solved)]


def fit_path(
    feature_BD: Array, target_BF: Array, penalties: tuple[float, ...], on_progress: Callable[[int], None] | None = None
) -> list[Array]:
    """Fit logistic regression for each penalty, strong to weak, each from the one before.

    Args:
        target_BF: 1, 0, or NaN where there is no label.
        penalties: L2 strengths against the *mean* log loss.
    Returns: for each penalty weights (D + 1, F), the intercept last.
    """
    fits: list[Array] = []
    weight_DF = np.zeros((feature_BD.shape[1] + 1, target_BF.shape[1]))
    for done, penalty in enumerate(penalties, start=1):
        weight_DF = _fit(feature_BD, target_BF, penalty, weight_DF)
        fits.append(weight_DF)
        if on_progress:
            on_progress(done)
    return fits


def predict(feature_BD: Array, weight_DF: Array) -> Array:
    """Logits (B, F)."""
    return feature_BD @ weight_DF[:-1].astype(feature_BD.dtype) + weight_DF[-1]


def choose_penalties(scores: list[Array], target_BF: Array) -> list[int]:
    """Index of the penalty with the highest AUROC of each finding; the middle one where validation has one class."""
    chosen = []
    for finding, target_B in enumerate(target_BF.T):
        known_B = ~np.isnan(target_B)
        if len(np.unique(target_B[known_B])) < 2:
            chosen.append(len(scores) // 2)
            continue
        chosen.append(int(np.argmax([roc_auc_score(target_B[known_B], score[known_B, finding]) for score in scores])))
    return chosen


def _fit(feature_BD: Array, target_BF: Array, penalty: float, start_DF: Array) -> Array:
    known_BF = ~np.isnan(target_BF)
    share_BF = known_BF / np.maximum(known_BF.sum(axis=0), 1)
    target_BF = np.nan_to_num(target_BF)

    def compute(flat: Array) -> tuple[float, Array]:
        weight_DF = flat.reshape(start_DF.shape)
        logit_BF = predict(feature_BD, weight_DF)
        error_BF = share_BF * (expit(logit_BF) - target_BF)
        loss = (share_BF * (np.logaddexp(0, logit_BF) - target_BF * logit_BF)).sum() + penalty / 2 * (
            weight_DF[:-1] ** 2
        ).sum()
        gradient_DF = np.concatenate(
            [feature_BD.T @ error_BF.astype(feature_BD.dtype), error_BF.sum(axis=0, keepdims=True)]
        )
        gradient_DF[:-1] += penalty * weight_DF[:-1]
        return float(loss), gradient_DF.ravel().astype(np.float64)

    options = {"maxiter": 200, "gtol": 1e-5, "ftol": 1e-9}
    return minimize(compute, start_DF.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(start_DF.shape)


def _read_pixels(task: Task, split: str, limit: int | None = None) -> Pixels:
    """Read at most `limit` images of a split, the first by sample_id, which is a hash."""
    units = read_units(task.data_dir, split)
    if not units:
        raise UsageError(
            f"pixel_probe: the data set has no split '{split}'; prepare it with train, val and test patients"
        )
    wanted, data = set(sorted(units)[:limit]), task.run.config.data
    side_px = min(data.image_size_px, MAX_SIDE_PX)
    rows, labels, ids = [], [], []
    for sample in read_samples(task.data_dir, split):
        if sample["sample_id"] in wanted:
            image = eval_transform(read_image(sample["image"]), side_px, task.run.mean, task.run.std)
            rows.append(image.numpy().ravel())
            labels.append(sample["labels"])
            ids.append(sample["sample_id"])
            task.report(f"read {split} pixels", len(ids), len(wanted))
    return Pixels(np.stack(rows), labels, get_units(units, ids), ids)


def _describe(task: Task, findings: Findings, chosen_F: list[int], num_train: int) -> dict[str, Any]:
    side_px = min(task.run.config.data.image_size_px, MAX_SIDE_PX)
    return {
        "score": f"L2 logistic regression on {side_px} x {side_px} standardised pixels",
        "solver": "exact in the dual: L-BFGS on the Cholesky factor of the Gram matrix",
        "trained_on": f"{num_train} images of '{task.run.config.data.train_split}'",
        "penalty": {name: PENALTIES[index] for name, index in zip(findings.names, chosen_F, strict=True)},
        "penalty_rule": f"of {PENALTIES} on the mean log loss, by AUROC on '{task.run.config.data.val_split}'",
        "chance": {"mean_auroc": 0.5},
        "interval": "95 % percentile bootstrap over patients",
    } | describe_findings(findings)
