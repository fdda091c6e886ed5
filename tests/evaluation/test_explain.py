"""The picture shows what it says: the model's view, its boxes, the pairing, attention above an even spread."""

from __future__ import annotations

import numpy as np
import pytest

from place.config import EvaluationConfig
from place.data.prepared import read_samples
from place.evaluation.explain import choose_samples, crop_square, explain_sample, smooth_attention
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run


@pytest.fixture(scope="module")
def task(run_dir, data_dir):
    return Task(TaskInput(load_run(run_dir), data_dir, {"labels": []}, "test", EvaluationConfig()))


def test_boxes_move_with_the_centre_square():
    image, boxes = crop_square(np.zeros((10, 6)), [{"finding": "nodule", "box_xyxy": [1, 4, 3, 6]}])
    assert image.shape == (6, 6)
    assert boxes == [{"finding": "nodule", "box_xyxy": [1, 2, 3, 4]}]


def test_attention_is_shown_above_an_even_spread_and_peaks_where_it_is_largest():
    attention = np.full((4, 4), 0.05)
    attention[3, 0] = 0.25
    shown = smooth_attention(attention, 64)
    assert shown.max() == 1
    assert shown[60, 3] > 0.9
    assert shown[:16, 32:].max() == 0


def test_even_attention_shows_nothing():
    assert smooth_attention(np.full((4, 4), 1 / 16), 64).max() == 0


def test_studies_are_chosen_by_labels_and_sentences_alone():
    labels = [{"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 1, "b": 0}, {"a": 0, "b": 1}]
    samples = [{"labels": row, "sentences": ["s"] * (n + 1), "sample_id": n} for n, row in enumerate(labels)]
    assert [sample["sample_id"] for sample in choose_samples(samples, 3)] == [3, 2, 1]
    assert len(choose_samples(samples, 9)) == 4


def test_sentences_and_observations_are_paired_one_to_one_those_with_boxes_first(task, data_dir):
    for sample in [item for item in read_samples(data_dir, "test") if item["boxes"]][:8]:
        explained = explain_sample(task, sample)
        assert explained.pairings[0].text == sample["sentences"][0]["text"]
        assert [len(pairing.boxes) for pairing in explained.pairings] == [1, 0, 0]
        maps = [tuple(pairing.attention_YX.ravel()) for pairing in explained.pairings]
        assert len(set(maps)) == 3
        assert all(sum(values) == pytest.approx(1, abs=1e-4) for values in maps)
