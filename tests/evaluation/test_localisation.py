"""Scores of maps: against hand-made cases, scikit-learn's IoU, and the definition of CNR written out."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from place.data.transforms import eval_transform
from place.evaluation.localisation import (
    THRESHOLDS,
    compute_cnr,
    compute_miou,
    compute_pointing,
    fill_boxes,
    judge_map,
    move_box,
    scale_map,
)


@pytest.mark.parametrize(("height", "width"), [(120, 80), (80, 120), (80, 80)])
def test_a_bright_square_and_its_box_stay_together_through_crop_and_resize(height, width):
    image_YX = np.zeros((height, width), np.uint8)
    x0, y0, x1, y1 = 30, 36, 50, 60
    image_YX[y0:y1, x0:x1] = 255
    size_px, side = 40, min(height, width)
    shown_YX = eval_transform(image_YX, size_px, 0.0, 1.0)[0].numpy() > 0.5
    moved = move_box((x0, y0, x1, y1), image_YX.shape)
    assert np.array_equal(fill_boxes([moved], size_px, size_px / side), shown_YX)


def test_boxes_are_cut_to_what_the_model_sees():
    assert move_box((0, 0, 30, 100), (100, 60)) == (0, 0, 30, 60)
    assert move_box((0, 0, 30, 20), (100, 60)) is None
    assert move_box((55, 10, 80, 20), (60, 100)) == (35, 10, 60, 20)


def test_several_boxes_are_one_truth_and_a_thin_one_keeps_a_pixel():
    mask_YX = fill_boxes([(0, 0, 4, 2), (2, 1, 6, 3), (7.6, 7.6, 7.9, 7.9)], 8)
    assert mask_YX.sum() == 8 + 8 - 2 + 1
    assert mask_YX[7, 7]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_their_definitions_on_random_maps(seed):
    rng = np.random.default_rng(seed)
    heat_YX, truth_YX = rng.uniform(-0.2, 0.9, (24, 24)), rng.random((24, 24)) < 0.3
    inside, outside = heat_YX[truth_YX], heat_YX[~truth_YX]
    cnr = (inside.mean() - outside.mean()) / (inside.var() + outside.var()) ** 0.5
    assert compute_cnr(heat_YX, truth_YX) == pytest.approx(cnr, abs=1e-6)
    ious = [jaccard_score(truth_YX.ravel(), heat_YX.ravel() >= threshold) for threshold in THRESHOLDS]
    assert compute_miou(heat_YX, truth_YX) == pytest.approx(np.mean(ious), abs=1e-6)


def test_a_map_that_finds_the_box_scores_above_one_that_avoids_it():
    truth_YX = fill_boxes([(0, 0, 16, 16)], 32)
    map_YX = np.kron([[1.0, 0.0], [0.0, 0.0]], np.ones((4, 4)))
    found, missed = judge_map(map_YX, truth_YX), judge_map(-map_YX, truth_YX)
    assert found["pointing_game"] == 1
    assert missed["pointing_game"] == 0
    assert found["cnr"] > 3
    assert missed["cnr"] == pytest.approx(-found["cnr"])
    assert missed["cnr_absolute"] == found["cnr_absolute"]
    assert found["miou"] > 0.8 > 0.3 > missed["miou"]


def test_the_map_is_resized_bilinearly_to_the_truth():
    map_YX = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    truth_YX = fill_boxes([(3, 5, 20, 19)], 32)
    heat_YX = cv2.resize(map_YX, (32, 32), interpolation=cv2.INTER_LINEAR)
    scores = judge_map(map_YX, truth_YX)
    assert scores["cnr"] == compute_cnr(heat_YX, truth_YX)
    assert scores["miou"] == compute_miou(scale_map(heat_YX), truth_YX)
    assert scores["miou_cosine"] == compute_miou(heat_YX, truth_YX)


def test_an_even_map_is_at_chance_not_at_luck():
    truth_YX = fill_boxes([(0, 0, 16, 32)], 32)
    scores = judge_map(np.full((4, 4), 0.3), truth_YX)
    assert scores["pointing_game"] == 0.5
    assert scores["cnr"] == scores["miou"] == 0


def test_the_point_is_the_centre_of_the_largest_patch():
    map_YX = np.zeros((4, 4))
    map_YX[3, 0] = 1
    assert compute_pointing(map_YX, fill_boxes([(3, 27, 6, 30)], 32)) == 1  # the centre is at (4, 28)
    assert compute_pointing(map_YX, fill_boxes([(0, 24, 4, 28)], 32)) == 0


def test_a_box_around_everything_has_no_contrast():
    assert np.isnan(compute_cnr(np.ones((4, 4)), np.ones((4, 4), bool)))
