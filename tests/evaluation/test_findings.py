"""Labels: what counts, what is left out and said so."""

from __future__ import annotations

import numpy as np
import pytest

from place.config import UsageError
from place.evaluation.findings import choose_findings, describe_findings, judge_findings

LABELS = [
    {"effusion": 1, "edema": 0, "nodule": 0},
    {"effusion": 0, "edema": 1, "nodule": None},
    {"effusion": -1, "edema": 1, "nodule": 0},
    {"effusion": None, "edema": 0, "nodule": 0},
]


def test_uncertain_and_unknown_labels_are_left_out_and_counted():
    findings = choose_findings(LABELS, ["effusion", "edema", "nodule"])
    assert describe_findings(findings)["findings"]["effusion"] == {"positive": 1, "negative": 1, "no_label": 2}
    wrong_where_uncertain = np.array([[0.9, 0], [0.1, 1], [-9, 1], [9, 0]])
    assert judge_findings(wrong_where_uncertain, findings, np.arange(4), 0)["auroc.effusion"].value == 1


def test_a_finding_without_both_classes_is_listed_as_left_out():
    findings = choose_findings(LABELS, ["effusion", "edema", "nodule"])
    assert findings.names == ["effusion", "edema"]
    assert findings.left_out == {"nodule": "0 positive and 3 negative studies"}


def test_mean_is_over_the_findings_asked_for():
    findings = choose_findings(LABELS, ["effusion", "edema", "nodule"], ["edema"])
    metrics = judge_findings(np.array([[1.0], [2.0], [0.5], [0.0]]), findings, np.arange(4), 0)
    assert metrics["mean_auroc"].value == metrics["auroc.edema"].value == 0.75


def test_random_scores_are_at_chance_and_perfect_ones_at_one():
    rng = np.random.default_rng(0)
    labels = [{"edema": int(value)} for value in rng.integers(2, size=2000)]
    findings = choose_findings(labels, ["edema"])
    blind = judge_findings(rng.normal(size=(2000, 1)), findings, np.arange(2000), 200)["mean_auroc"]
    assert blind.low < 0.5 < blind.high
    assert blind.high - blind.low < 0.07
    assert judge_findings(findings.target_BF, findings, np.arange(2000), 20)["mean_auroc"] == (1, 1, 1)


def test_an_unknown_finding_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="no label 'efusion'; did you mean 'effusion'"):
        choose_findings(LABELS, ["effusion", "edema"], ["efusion"])


def test_an_unknown_finding_far_from_all_lists_the_labels():
    with pytest.raises(UsageError, match="it has effusion, edema"):
        choose_findings(LABELS, ["effusion", "edema"], ["xyz"])


def test_a_split_without_both_classes_of_anything_is_refused():
    with pytest.raises(UsageError, match="both positive and negative"):
        choose_findings(LABELS, ["nodule"])


def test_images_that_have_exactly_one_finding_have_an_accuracy_with_its_interval():
    """As in 5x200; a label that is not told is not the image's finding."""
    truth = np.arange(40) % 4
    labels = [{name: int(name == "abcd"[t]) or (None if t == 2 else 0) for name in "abcd"} for t in truth]
    findings = choose_findings(labels, list("abcd"))
    score_BF = np.eye(4)[truth]
    score_BF[:8] = 0.0, 2.0, 1.0, 0.0  # of the first eight, the two of `b` are right
    accuracy = judge_findings(score_BF, findings, np.arange(40), 200)["accuracy"]
    assert accuracy.value == 34 / 40
    assert accuracy.low < accuracy.value < accuracy.high
    labels[0] |= {"b": 1}
    assert "accuracy" not in judge_findings(score_BF, choose_findings(labels, list("abcd")), np.arange(40), 5)
