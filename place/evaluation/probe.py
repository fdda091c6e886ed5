"""Logistic regression on features of images: fitted on training patients, chosen on validation, scored elsewhere.

Logistic regression with an L2 penalty needs features only through their inner products (the representer theorem), so
where there are more features than images it is solved exactly on the Cholesky factor of the Gram matrix instead, all
findings in one L-BFGS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import precision_recall_curve, roc_auc_score

from place.evaluation.findings import build_targets
from place.evaluation.metrics import Array

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
MIN_STD = 1e-3


class FeatureSplit(NamedTuple):
    """Features of the images of a split (B,D) fp32, in stored order, with labels, patients, ids."""

    feature_BD: Array
    labels: list[dict[str, int | None]]
    unit_B: Array
    sample_ids: list[int]


class Probed(NamedTuple):
    """One probe: logits of the judged images (B,F), labels by the thresholds (B,F) bool, penalty and threshold of each
    finding, and findings that could not be trained; with training by steps, the step that was kept and no penalty."""

    score_BF: Array
    predicted_BF: Array
    penalty_F: list[float]
    threshold_F: list[float]
    untrained: list[str]
    step: int | None = None


def probe(train: FeatureSplit, val: FeatureSplit, feature_BD: Array, names: Sequence[str]) -> Probed:
    """Fit on training images, choose penalty and threshold of each finding on validation, score other images.

    A finding without a positive or without a negative among the training images cannot be trained: its logit is 0
    everywhere, which is an AUROC of one half, no image is labelled with it, and it is named.

    Args:
        feature_BD: images that are judged; their labels are not an argument, so nothing can be chosen on them.
    Source: ours.
    """
    train_BF, val_BF = (build_targets(split.labels, names) for split in (train, val))
    features = build_features(train.feature_BD, [val.feature_BD, feature_BD])
    fits = fit_path(features[0], train_BF, PENALTIES)
    val_scores = [predict(features[1], fit) for fit in fits]
    chosen_F = choose_penalties(val_scores, val_BF)
    score_BF = np.stack([predict(features[2], fits[c])[:, f] for f, c in enumerate(chosen_F)], axis=1)
    threshold_F = [choose_threshold(val_scores[c][:, f], val_BF[:, f]) for f, c in enumerate(chosen_F)]
    untrained = list_untrained(train_BF, names)
    is_trained_F = np.array([name not in untrained for name in names])
    predicted_BF = (score_BF >= np.array(threshold_F)) & is_trained_F
    penalty_F = [PENALTIES[c] for c in chosen_F]
    return Probed(score_BF * is_trained_F, predicted_BF, penalty_F, threshold_F, untrained)


def list_untrained(target_BF: Array, names: Sequence[str]) -> list[str]:
    """Findings without a positive or without a negative."""
    counts = [len(np.unique(column[~np.isnan(column)])) for column in target_BF.T]
    return [name for name, count in zip(names, counts, strict=True) if count < 2]


def draw_subsets(unit_B: Array, share: float, count: int) -> list[Array]:
    """Rows of `count` random subsets of whole patients, at least one, that hold a share of the patients; seeded."""
    patients = np.unique(unit_B)
    size = max(1, round(share * len(patients)))
    drawn = [np.random.default_rng(seed).permutation(patients)[:size] for seed in range(count)]
    return [np.flatnonzero(np.isin(unit_B, some)) for some in drawn]


def build_features(train_BD: Array, others: Sequence[Array]) -> list[Array]:
    """Standardise by the training images; rows longer than there are images become n features of equal inner products.

    Args:
        train_BD: training images, a row each.
        others: images of other splits.
    Returns: (B, min(D, n)) features of the training images, then of the others; n training images.
    Source: ours.
    """
    mean_D, std_D = train_BD.mean(axis=0), train_BD.std(axis=0)
    scale_D = np.maximum(std_D, MIN_STD) * np.sqrt(train_BD.shape[1])
    rows = [((part_BD - mean_D) / scale_D).astype(np.float32) for part_BD in (train_BD, *others)]
    if train_BD.shape[1] <= len(train_BD):
        return rows
    gram = rows[0] @ rows[0].T
    # The ridge keeps equal images from making the matrix singular; it is 1e-4 of an image's own inner product.
    factor = cholesky(gram.astype(np.float64) + 1e-4 * np.eye(len(gram)), lower=True)
    solved = [solve_triangular(factor, rows[0] @ other.T, lower=True).T for other in rows[1:]]
    return [feature.astype(np.float32) for feature in (factor, *solved)]


def fit_path(feature_BD: Array, target_BF: Array, penalties: tuple[float, ...]) -> list[Array]:
    """Fit logistic regression for each penalty, strong to weak, each from the one before.

    Args:
        target_BF: 1, 0, or NaN where there is no label.
        penalties: L2 strengths against the *mean* log loss.
    Returns: for each penalty weights (D + 1, F), the intercept last.
    """
    fits: list[Array] = []
    weight_DF = np.zeros((feature_BD.shape[1] + 1, target_BF.shape[1]))
    for penalty in penalties:
        weight_DF = _fit(feature_BD, target_BF, penalty, weight_DF)
        fits.append(weight_DF)
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


def choose_threshold(score_B: Array, target_B: Array) -> float:
    """The score with the highest F1 over the labelled images; 0 where there is no positive."""
    known_B = ~np.isnan(target_B)
    if not (target_B[known_B] == 1).any():
        return 0.0
    precision_T, recall_T, threshold_T = precision_recall_curve(target_B[known_B], score_B[known_B])
    f1_T = 2 * precision_T * recall_T / np.maximum(precision_T + recall_T, 1e-12)
    return float(threshold_T[int(np.argmax(f1_T[:-1]))])


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
