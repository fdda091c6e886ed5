"""Report scores: equal to the reference packages on random texts, known by hand on small ones, resampled by patient."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from place.config import UsageError
from place.evaluation.generation_metrics import (
    compute_bleu,
    compute_cider,
    compute_finding_f1,
    compute_meteor,
    compute_rouge_l,
    count_ngrams,
    label_reports,
    score_reports,
    tokenize,
)
from place.evaluation.labeler import COMPETITION, OBSERVATIONS

WORDS = ["no", "left", "right", "small", "large", "effusion", "pneumothorax", "opacity", "the", "heart", "is", "normal"]
FIVE = [OBSERVATIONS.index(name) for name in COMPETITION]


def draw_texts(rng, count):
    return [[WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(1, 20))] for _ in range(count)]


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return draw_texts(rng, 30), draw_texts(rng, 30)


def as_coco(side):
    return {key: [" ".join(words)] for key, words in enumerate(side)}


def test_tokens_keep_numbers_and_drop_punctuation():
    assert tokenize("A 2.5 cm X-ray, (left).") == ["a", "2.5", "cm", "x-ray", "left"]


@pytest.mark.parametrize("cut", [1.0, 0.5])
def test_bleu_is_pycocoevalcaps(texts, cut):
    from pycocoevalcap.bleu.bleu import Bleu

    generated = [words[: max(1, int(cut * len(words)))] for words in texts[0]]
    expected, _ = Bleu(4).compute_score(as_coco(texts[1]), as_coco(generated), verbose=0)
    found = compute_bleu(count_ngrams(generated, texts[1]), np.ones((1, 30)))
    assert [found[f"bleu_{n}"][0] for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-6)


def test_a_weight_of_two_is_a_report_that_is_there_twice(texts):
    from pycocoevalcap.bleu.bleu import Bleu

    weight_RB = np.ones((1, 30))
    weight_RB[0, 3] = 2
    twice = [[*side, side[3]] for side in texts]
    expected, _ = Bleu(4).compute_score(as_coco(twice[1]), as_coco(twice[0]), verbose=0)
    found = compute_bleu(count_ngrams(*texts), weight_RB)
    assert [found[f"bleu_{n}"][0] for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-6)


def test_rouge_and_cider_are_pycocoevalcaps(texts):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    arguments = as_coco(texts[1]), as_coco(texts[0])
    assert compute_rouge_l(*texts) == pytest.approx(Rouge().compute_score(*arguments)[1], abs=1e-6)
    assert compute_cider(*texts) == pytest.approx(Cider().compute_score(*arguments)[1], abs=1e-6)


def test_bleu_by_hand():
    found = compute_bleu(count_ngrams([["a", "b", "c"]], [["a", "b", "d", "e"]]), np.ones((1, 1)))
    brevity = np.exp(1 - 4 / 3)
    assert found["bleu_1"][0] == pytest.approx(brevity * 2 / 3)
    assert found["bleu_2"][0] == pytest.approx(brevity * np.sqrt(2 / 3 * 1 / 2))


def test_rouge_by_hand():
    precision, recall = 2 / 3, 2 / 4
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert compute_rouge_l([["a", "x", "b"]], [["a", "b", "c", "d"]])[0] == pytest.approx(expected)


def test_meteor_by_hand_matches_stems_and_no_synonyms():
    # Three of three words match in one chunk: penalty 0.5 * (1/3) ** 3.
    stems = compute_meteor([["small", "effusion", "seen"]], [["small", "effusions", "seen"]])[0]
    assert stems == pytest.approx(1 - 0.5 / 27)
    assert compute_meteor([["large"]], [["big"]])[0] == 0


def test_cider_of_equal_texts_is_ten_and_of_disjoint_ones_nothing():
    texts = [["a", "b", "c", "d", "e"], ["f", "g", "h", "i", "j"]]
    assert compute_cider(texts, texts) == pytest.approx([10, 10])
    assert compute_cider(texts, texts[::-1]) == pytest.approx([0, 0])


def test_empty_reports_score_nothing():
    metrics = score_reports(["", ""], ["No effusion.", "Cardiomegaly."], np.arange(2), 0)
    assert all(metric.value == pytest.approx(0, abs=1e-6) for metric in metrics.values())


def test_finding_f1_is_scikit_learns():
    rng = np.random.default_rng(1)
    said, true = rng.random((50, 14)) < 0.3, rng.random((50, 14)) < 0.3
    true[:, 2] = False
    found = compute_finding_f1(said, true, np.ones((1, 50)))
    known = true.any(axis=0)
    known_five = [column for column in FIVE if known[column]]
    assert found["f1_micro_14"][0] == pytest.approx(f1_score(true, said, average="micro"))
    assert found["f1_macro_14"][0] == pytest.approx(f1_score(true[:, known], said[:, known], average="macro"))
    assert found["f1_micro_5"][0] == pytest.approx(f1_score(true[:, FIVE], said[:, FIVE], average="micro"))
    assert found["f1_macro_5"][0] == pytest.approx(f1_score(true[:, known_five], said[:, known_five], average="macro"))


def test_findings_are_those_that_a_report_has_for_sure():
    labels = label_reports(["Left effusion. Possible pneumonia.", "No effusion."])
    assert [OBSERVATIONS[i] for i in np.flatnonzero(labels[0])] == ["Pleural Effusion"]
    assert [OBSERVATIONS[i] for i in np.flatnonzero(labels[1])] == ["No Finding"]


def test_intervals_hold_the_figure_and_resample_patients_whole():
    rng = np.random.default_rng(2)
    references = [". ".join(" ".join(words) for words in draw_texts(rng, 3)) for _ in range(40)]
    generated = references[:20] + references[:20]
    metrics = score_reports(generated, references, np.arange(40), 200)
    assert all(metric.low <= metric.value <= metric.high for metric in metrics.values())
    one = score_reports(generated, references, np.zeros(40), 20)
    assert all(metric.low == pytest.approx(metric.value) == metric.high for metric in one.values())


def test_the_same_reports_score_best():
    texts = ["There is a small left pleural effusion.", "The heart is enlarged without any edema."]
    metrics = score_reports(texts, texts, np.arange(2), 0)
    assert metrics["bleu_4"].value == pytest.approx(1, abs=1e-6)
    assert metrics["rouge_l"].value == metrics["f1_micro_14"].value == metrics["f1_macro_5"].value == 1
    assert metrics["bleu_4"].low is None


@pytest.mark.parametrize(("generated", "references"), [(["a"], ["a", "b"]), (["a"], ["a"])])
def test_reports_that_cannot_be_judged_are_refused(generated, references):
    with pytest.raises(UsageError, match="give as many of both, two or more"):
        score_reports(generated, references, np.arange(len(references)), 0)
