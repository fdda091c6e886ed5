"""The probe is logistic regression as scikit-learn fits it, not a weaker one; everything is chosen on validation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from place.evaluation.probe import build_features, choose_penalties, fit_path, predict


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(n, 300)).astype(np.float32) + 3 for n in (120, 80))
    direction = rng.normal(size=(300, 2))
    targets = [((rows - 3) @ direction > 0).astype(float) for rows in (train, test)]
    return train, test, *targets


def test_the_dual_solution_is_the_one_of_scikit_learn(images):
    train, test, target, _ = images
    features = build_features(train, [test])
    score = predict(features[1], fit_path(features[0], target, (0.1,))[0])
    scaled = [(rows - train.mean(axis=0)) / train.std(axis=0) / np.sqrt(300) for rows in (train, test)]
    for finding in range(2):
        model = LogisticRegression(C=1 / (0.1 * len(train)), tol=1e-8, max_iter=1000).fit(scaled[0], target[:, finding])
        np.testing.assert_allclose(score[:, finding], model.decision_function(scaled[1]), atol=2e-2)
        assert np.corrcoef(score[:, finding], model.decision_function(scaled[1]))[0, 1] > 0.9999


def test_a_finding_that_pixels_tell_linearly_is_learned(images):
    train, test, target, test_target = images
    features = build_features(train, [test])
    score = predict(features[1], fit_path(features[0], target, (0.01,))[0])
    assert roc_auc_score(test_target[:, 0], score[:, 0]) > 0.65


def test_studies_without_a_label_do_not_count(images):
    train, _, target, _ = images
    features = build_features(train, [])[0]
    unknown = target.copy()
    unknown[60:, 0] = np.nan
    alone = fit_path(features[:60], target[:60, :1], (0.1,))[0]
    np.testing.assert_allclose(
        predict(features, fit_path(features, unknown, (0.1,))[0])[:, 0], predict(features, alone)[:, 0], atol=2e-2
    )


def test_the_penalty_is_chosen_by_validation_auroc():
    target = np.array([[0, 0], [1, 0]], float)
    good, bad = np.array([[0.0, 0], [1, 0]]), np.array([[1.0, 0], [0, 0]])
    assert choose_penalties([bad, good, bad], target) == [1, 1]
    assert choose_penalties([good, bad, bad], target)[0] == 0


def test_equal_images_do_not_break_the_solution():
    train = np.ones((6, 20), np.float32)
    feature = build_features(train, [])[0]
    assert np.isfinite(fit_path(feature, np.array([[0.0], [1]] * 3), (0.1,))[0]).all()
