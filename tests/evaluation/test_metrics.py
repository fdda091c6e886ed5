"""Intervals: the vectorised figures equal scikit-learn's, and patients are what is resampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from place.compat import patch_torchvision
from place.evaluation.metrics import (
    compute_aurocs,
    compute_average_precisions,
    compute_calibration_errors,
    compute_means,
    compute_medians,
    count_resamples,
    draw_weights,
    note_resamples,
    summarize,
    summarize_mean,
)


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    target = rng.integers(2, size=97)
    return np.round(rng.normal(size=97) + target, 1), target, draw_weights(np.arange(97), 20)


@pytest.mark.parametrize(
    ("compute", "reference"), [(compute_aurocs, roc_auc_score), (compute_average_precisions, average_precision_score)]
)
def test_resampled_figures_equal_scikit_learn_with_weights_and_ties(compute, reference, scores):
    score, target, weight = scores
    expected = [reference(target, score, sample_weight=row) for row in weight]
    np.testing.assert_allclose(compute(score, target, weight), expected, rtol=1e-9)


def test_resampled_calibration_errors_equal_torchmetrics_of_the_rows_that_were_drawn(scores):
    patch_torchvision()
    from torchmetrics.functional.classification import binary_calibration_error

    score, target, weight = scores
    share = 1 / (1 + np.exp(-score))
    share[:2] = 0, 1
    expected = [
        float(binary_calibration_error(*(torch.tensor(np.repeat(part, row)) for part in (share, target)), n_bins=15))
        for row in weight
    ]
    np.testing.assert_allclose(compute_calibration_errors(share, target, weight), expected, atol=1e-6)


def test_pieces_of_the_resamples_give_what_the_whole_gives(monkeypatch, scores):
    whole = compute_aurocs(*scores)
    monkeypatch.setattr("place.evaluation.metrics.MAX_CELLS", 200)
    np.testing.assert_array_equal(compute_aurocs(*scores), whole)


def test_a_resample_without_positives_is_undefined_and_left_out():
    weight = np.array([[0, 1, 1], [1, 1, 1]], np.uint8)
    figures = compute_aurocs(np.array([0.9, 0.1, 0.2]), np.array([1, 0, 0]), weight)
    assert np.isnan(figures[0])
    assert figures[1] == 1
    metric = summarize(1.0, figures)
    assert metric == (1.0, 1.0, 1.0)
    used = count_resamples({"auroc": metric, "mean": summarize(1.0, np.ones(2))}, 2)
    assert used == {"auroc": 1}
    assert note_resamples(used, 2)[0].endswith("no negative image: auroc 1")
    assert count_resamples({"auroc": summarize(1.0, np.full(2, np.nan))}, 2) == {"auroc": 0}
    assert count_resamples({"auroc": summarize(1.0, np.empty(0))}, 0) == {}


def test_few_resamples_are_told_from_95_per_cent_down_and_four_figures_are_named():
    assert note_resamples({"a": 95, "b": 99}, 100) == []
    (note,) = note_resamples({"a": 95, "b": 94, "c": 2, "d": 93, "e": 92, "f": 91}, 100)
    assert note.endswith(": b 94, c 2, d 93, e 92 and 1 more")


def test_rows_of_a_patient_come_and_go_together():
    weight = draw_weights(np.array(["a", "b", "a", "b", "c"]), 50)
    assert (weight[:, 0] == weight[:, 2]).all()
    assert (weight[:, 1] == weight[:, 3]).all()
    assert (weight[:, [0, 1, 4]].sum(axis=1) == 3).all()


def test_interval_holds_the_value_and_shrinks_with_more_patients():
    rng = np.random.default_rng(0)
    widths = []
    for count in (50, 5000):
        value = rng.random(count)
        metric = summarize_mean(value, draw_weights(np.arange(count), 500))
        assert metric.low < metric.value < metric.high
        widths.append(metric.high - metric.low)
    assert widths[1] < widths[0] / 5


def test_resampling_is_seeded():
    units = np.arange(30)
    assert (draw_weights(units, 5, seed=3) == draw_weights(units, 5, seed=3)).all()
    assert (draw_weights(units, 5, seed=3) != draw_weights(units, 5, seed=4)).any()


def test_without_resamples_there_is_no_interval():
    assert summarize_mean(np.array([1.0, 0.0]), draw_weights(np.arange(2), 0)) == (0.5, None, None)


def test_median_is_the_smallest_rank_that_half_of_the_queries_reach():
    rank, weight = np.array([9, 1, 4, 2]), np.array([[1, 1, 1, 1], [3, 1, 1, 0]], np.uint8)
    assert compute_medians(rank, weight).tolist() == [2, 9]


def test_means_leave_unknown_values_out():
    assert compute_means(np.array([1.0, np.nan, 0.0]), np.array([[1, 5, 1]], np.uint8)).tolist() == [0.5]
