"""Retrieval: known answers, identical reports once, ties lost, chance as random order has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_precision, retrieval_reciprocal_rank

from place.config import EvaluationConfig
from place.evaluation.retrieval import (
    NO_REPORT,
    build_gallery,
    compute_chance,
    compute_precision,
    judge_retrieval,
    rank_matches,
    run_retrieval,
    score_sentences,
)
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run


def judge(score, groups, **options):
    gallery = build_gallery(list(groups), None)
    return judge_retrieval(score, gallery, np.arange(len(groups)), **options)


def test_perfect_features_find_everything_first():
    metrics = judge(np.eye(20), range(20), bootstrap=20)
    for way in ("image_to_text", "text_to_image"):
        assert metrics[f"{way}.r_at_1"] == (1, 1, 1)
        assert metrics[f"{way}.median_rank"].value == 1


def test_random_scores_are_at_chance():
    rng = np.random.default_rng(0)
    values = [judge(rng.normal(size=(100, 100)), range(100))["image_to_text.r_at_5"].value for _ in range(40)]
    assert np.mean(values) == pytest.approx(0.05, abs=0.01)


def test_identical_reports_are_one_entry_and_any_of_their_images_is_right():
    gallery = build_gallery([7, 3, 7, 5], None)
    assert gallery.report_G.tolist() == [1, 3, 0]
    assert gallery.answer_Q.tolist() == [2, 0, 2, 1]
    score = np.array([[0.1, 0.2, 0.9], [0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.1, 0.9, 0.2]])
    metrics = judge_retrieval(score, gallery, np.arange(4))
    assert metrics["image_to_text.r_at_1"].value == 0.75
    assert metrics["text_to_image.r_at_1"].value == 1


def test_gallery_takes_the_first_reports_by_hash_whatever_the_order():
    assert build_gallery([50, 10, 40, 20, 10], 3).query_Q.tolist() == [1, 2, 3, 4]
    assert build_gallery([10, 20, 10, 50, 40], 3).query_Q.tolist() == [0, 1, 2, 4]


def test_ties_are_lost():
    metrics = judge(np.zeros((20, 20)), range(20))
    assert metrics["image_to_text.r_at_10"].value == 0
    assert metrics["image_to_text.median_rank"].value == 20


def test_features_that_are_not_numbers_rank_last():
    assert rank_matches(np.full((3, 3), np.nan), np.eye(3, dtype=bool)).tolist() == [3, 3, 3]


def test_ranks_equal_torchmetrics_where_nothing_ties():
    rng = np.random.default_rng(2)
    score, match = rng.random((30, 40)), rng.random((30, 40)) < 0.1
    match[:, 0] = True
    for rank, row, target in zip(rank_matches(score, match), torch.tensor(score), torch.tensor(match), strict=True):
        assert (rank <= 5) == bool(retrieval_hit_rate(row, target, top_k=5))
        assert 1 / rank == pytest.approx(float(retrieval_reciprocal_rank(row, target)))


def test_precision_by_label_leaves_out_the_own_report_and_equals_torchmetrics():
    rng = np.random.default_rng(3)
    score, label = rng.normal(size=(30, 30)), (rng.random((30, 2)) < 0.4).astype(float)
    gallery = build_gallery(list(range(30)), None)
    precision = compute_precision(score, gallery, label, 5)
    for query in range(30):
        others = np.arange(30) != query
        for finding in range(2):
            if label[query, finding] != 1:
                assert np.isnan(precision[query, finding])
                continue
            expected = retrieval_precision(
                torch.tensor(score[query, others]), torch.tensor(label[others, finding] == 1), top_k=5
            )
            assert precision[query, finding] == pytest.approx(float(expected))


def test_precision_is_reported_as_the_mean_over_findings():
    label = np.array([[1, 0]] * 6 + [[0, 1]] * 6, float)
    same_class = (label @ label.T) + np.eye(12)
    metrics = judge(same_class, range(12), label_BF=label, bootstrap=20)
    assert metrics["image_to_text.p_at_5"] == (1, 1, 1)
    assert metrics["image_to_text.p_at_10"].value == 0.5
    assert "image_to_text.p_at_100" not in metrics


def test_precision_at_100_is_there_where_100_other_reports_are():
    label = np.eye(2)[np.arange(102) % 2]
    metrics = judge(label @ label.T, range(102), label_BF=label, bootstrap=5)
    assert metrics["image_to_text.p_at_10"].value == 1
    assert metrics["image_to_text.p_at_100"].value == 0.5
    assert "image_to_text.p_at_100" not in judge(label[:100] @ label[:100].T, range(100), label_BF=label[:100])


def test_a_finding_that_is_no_label_is_told_and_changes_nothing(run_dir, data_dir):
    def run(*findings):
        evaluation = EvaluationConfig(bootstrap=5, batch_size=16, findings=list(findings))
        card = {"labels": ["effusion", "edema"]}
        return run_retrieval(Task(TaskInput(load_run(run_dir), data_dir, card, "test", evaluation)))

    mistyped, right = run("edema", "efusion"), run("edema")
    assert mistyped.protocol["left_out"] == {"efusion": "the data set has no such label"}
    assert right.protocol["left_out"] == {}
    assert mistyped.metrics == right.metrics
    assert "image_to_text.p_at_5" in right.metrics
    assert not any("p_at" in name for name in run("lungs").metrics)


@pytest.mark.parametrize("matches", [1, 3])
def test_chance_is_what_random_order_gives(matches):
    rng = np.random.default_rng(0)
    rank = rng.random((4000, 40)).argsort(axis=1)[:, :matches].min(axis=1) + 1
    chance = compute_chance(40, np.full(10, matches))
    assert chance["r_at_5"] == pytest.approx((rank <= 5).mean(), abs=0.03)
    assert chance["mrr"] == pytest.approx((1 / rank).mean(), abs=0.02)
    assert chance["median_rank"] == pytest.approx(np.median(rank), abs=2)


def test_chance_of_one_match_is_k_of_n():
    assert compute_chance(200, np.ones(5, int))["r_at_5"] == pytest.approx(5 / 200)
    assert compute_chance(3, np.ones(5, int))["r_at_10"] == pytest.approx(1)


def test_late_interaction_is_the_mean_over_sentences_of_the_best_observation(monkeypatch):
    torch.manual_seed(0)
    observations, sentences = torch.randn(5, 3, 8), torch.randn(4, 2, 8)
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    expected = torch.zeros(5, 4)
    for image in range(5):
        for report in range(4):
            best = [(observations[image] @ sentence).max() for sentence in sentences[report][mask[report]]]
            expected[image, report] = torch.stack(best).mean()
    torch.testing.assert_close(score_sentences(observations, sentences, mask), expected)
    monkeypatch.setattr("place.evaluation.retrieval.MAX_CELLS", 1)
    torch.testing.assert_close(score_sentences(observations, sentences, mask), expected)


def test_an_image_without_a_report_takes_no_part():
    gallery = build_gallery([5, NO_REPORT, 3, NO_REPORT, 5], 2)
    assert gallery.query_Q.tolist() == [0, 2, 4]
    assert gallery.report_G.tolist() == [2, 0]
    assert gallery.answer_Q.tolist() == [1, 0, 1]
