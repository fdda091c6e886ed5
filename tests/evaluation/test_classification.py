"""The linear probe: subsets of patients, choices on validation, what cannot be trained, and the task itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn

from place.config import EvaluationConfig, UsageError, check_config
from place.data.prepared import read_card
from place.evaluation.classification import judge_probe, run_classification
from place.evaluation.findings import choose_findings
from place.evaluation.frozen import FrozenEncoder, wrap_run
from place.evaluation.metrics import compute_calibration_errors, compute_f1s, draw_weights
from place.evaluation.pixel_probe import run_pixel_probe
from place.evaluation.probe import FeatureSplit, Probed, choose_threshold, draw_subsets, probe
from place.evaluation.task import Task, TaskInput
from place.model.vision import VisionTokens
from place.training.checkpoint import load_run


def build_split(count: int, seed: int, sign: int = 1) -> FeatureSplit:
    """Twelve features, of which the first says `a`, up to its sign; `b` is never positive."""
    rng = np.random.default_rng(seed)
    feature_BD = rng.normal(size=(count, 12)).astype(np.float32)
    a = sign * feature_BD[:, 0] + 0.7 * rng.normal(size=count) > 0
    return FeatureSplit(
        feature_BD,
        [{"a": int(x), "b": 0} for x in a],
        np.array([f"p{row // 2}" for row in range(count)]),
        list(range(count)),
    )


def test_subsets_are_whole_patients_of_the_asked_share_and_differ_by_seed() -> None:
    unit_B = np.array([f"p{row // 3}" for row in range(300)])
    subsets = draw_subsets(unit_B, 0.1, 3)
    for rows in subsets:
        assert len(rows) == 30
        assert set(unit_B[rows]).isdisjoint(np.delete(unit_B, rows))
    assert len({tuple(rows) for rows in subsets}) == 3
    assert len(draw_subsets(unit_B, 0.001, 1)[0]) == 3
    assert list(draw_subsets(unit_B, 1, 1)[0]) == list(range(300))


def test_the_probe_is_as_good_as_scikit_learns_logistic_regression() -> None:
    train, val, test = build_split(400, 0), build_split(200, 1), build_split(2000, 2)
    truth = [row["a"] for row in test.labels]
    ours = roc_auc_score(truth, probe(train, val, test.feature_BD, ["a"]).score_BF[:, 0])
    theirs = LogisticRegression(max_iter=1000).fit(train.feature_BD, [row["a"] for row in train.labels])
    assert ours == pytest.approx(roc_auc_score(truth, theirs.decision_function(test.feature_BD)), abs=0.01)


def test_the_penalty_and_the_threshold_come_from_validation_alone() -> None:
    train, val, test = build_split(60, 0), build_split(200, 1), build_split(50, 2)
    found = probe(train, val, test.feature_BD, ["a"])
    turned = probe(train, build_split(200, 1, sign=-1), test.feature_BD, ["a"])
    assert not np.allclose(found.score_BF, turned.score_BF)
    val = build_split(200, 1)
    of_val = probe(train, val, val.feature_BD, ["a"])
    truth = np.array([row["a"] for row in val.labels], float)
    assert found.threshold_F == of_val.threshold_F == [choose_threshold(of_val.score_BF[:, 0], truth)]
    assert found.threshold_F != turned.threshold_F
    # One image in another batch has the score it had: nothing is chosen on what is judged.
    alone = probe(train, val, test.feature_BD[:1], ["a"])
    np.testing.assert_allclose(alone.score_BF, found.score_BF[:1], rtol=1e-5)
    assert alone.predicted_BF[0, 0] == found.predicted_BF[0, 0]


def test_a_finding_without_positives_is_named_and_scores_one_half() -> None:
    found = probe(build_split(60, 0), build_split(60, 1), build_split(60, 2).feature_BD, ["a", "b"])
    assert found.untrained == ["b"]
    assert set(found.score_BF[:, 1]) == {0.0}
    assert not found.predicted_BF[:, 1].any()
    assert found.predicted_BF[:, 0].any()


def test_no_other_threshold_has_a_higher_f1() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 80).astype(float)
    score = target + rng.normal(size=80)
    target[:5] = np.nan
    known = ~np.isnan(target)
    best = max(f1_score(target[known], score[known] >= t) for t in score[known])
    assert f1_score(target[known], score[known] >= choose_threshold(score, target)) == pytest.approx(best)
    assert choose_threshold(score, np.zeros(80)) == 0


def test_the_task_on_a_run(run_dir: Path, data_dir: Path) -> None:
    run = load_run(run_dir, "latest")
    evaluation = EvaluationConfig(bootstrap=50, label_shares=(0.5, 1.0), label_subsets=2)
    task = Task(TaskInput(run, data_dir, read_card(data_dir), "test", evaluation))
    result = run_classification(task)
    assert next(iter(result.metrics)) == "mean_auroc"
    for name in ("mean_auroc", "mean_f1", "mean_brier", "at_50.mean_auroc", "at_50.mean_average_precision"):
        assert 0 <= result.metrics[name].value <= 1
    assert result.metrics["mean_auroc"].low is not None
    names = list(result.protocol["findings"])
    assert result.metrics["mean_f1"].value == pytest.approx(np.mean([result.metrics[f"f1.{n}"].value for n in names]))
    assert [len(result.protocol["shares"][share]["images"]) for share in ("100 %", "50 %")] == [1, 2]
    again = run_classification(task)
    assert again.metrics == result.metrics


class Brightness(nn.Module):
    """An encoder that sees how bright each of 8 x 8 fields is."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, image_BCYX: Tensor) -> VisionTokens:
        field_BN = nn.functional.adaptive_avg_pool2d(image_BCYX, 8).flatten(1)
        return VisionTokens(field_BN, field_BN[:, :, None])


def test_features_that_show_the_findings_score_high(data_dir: Path) -> None:
    encoder = FrozenEncoder("brightness", Brightness(), 32, 1, (0.4,), (0.12,), 4)
    evaluation = EvaluationConfig(bootstrap=0, batch_size=16, label_shares=(1.0,))
    task = Task(TaskInput(None, data_dir, read_card(data_dir), "test", evaluation, encoder=encoder))
    metrics = run_classification(task).metrics
    assert metrics["auroc.effusion"].value > 0.95
    assert metrics["auroc.edema"].value > 0.95


def test_pixels_are_probed_with_the_same_images_and_figures(run_dir: Path, data_dir: Path) -> None:
    evaluation = EvaluationConfig(bootstrap=20, label_shares=(0.2, 1.0), label_subsets=2)
    task = Task(TaskInput(load_run(run_dir, "latest"), data_dir, read_card(data_dir), "test", evaluation))
    pixels, encoder = run_pixel_probe(task), run_classification(task)
    assert list(pixels.metrics) == list(encoder.metrics)
    assert pixels.protocol["findings"] == encoder.protocol["findings"]
    for share in ("100 %", "20 %"):
        shares = pixels.protocol["shares"][share], encoder.protocol["shares"][share]
        assert shares[0]["images"] == shares[1]["images"]


def test_figures_are_those_of_scikit_learn_and_count_known_labels_alone() -> None:
    rng = np.random.default_rng(0)
    score_BF = rng.normal(size=(50, 1))
    labels = [{"a": None if row < 5 else int(x)} for row, x in enumerate(score_BF[:, 0] + rng.normal(size=50) > 0)]
    findings = choose_findings(labels, ["a"])
    weight_RB = draw_weights(np.arange(50), 20)
    figures = judge_probe(Probed(score_BF, score_BF > 0.3, [1.0], [0.3], []), findings, weight_RB)
    truth, known = findings.target_BF[5:, 0], score_BF[5:, 0]
    assert figures["f1.a"][0] == pytest.approx(f1_score(truth, known > 0.3))
    assert figures["brier.a"][0] == pytest.approx(np.mean((1 / (1 + np.exp(-known)) - truth) ** 2))
    resampled = [f1_score(truth, known > 0.3, sample_weight=weight_B) for weight_B in weight_RB[:, 5:]]
    np.testing.assert_allclose(figures["f1.a"][1], resampled, atol=1e-12)
    # Fifteen bins of equal width, by hand.
    share = 1 / (1 + np.exp(-known))
    place = np.minimum((share * 15).astype(int), 14)
    gaps = [abs((share[place == b] - truth[place == b]).sum()) for b in range(15)]
    assert figures["calibration_error.a"][0] == pytest.approx(sum(gaps) / 45, abs=1e-6)
    errors_R = compute_calibration_errors(share, truth, weight_RB[:, 5:])
    np.testing.assert_allclose(figures["calibration_error.a"][1], errors_R)
    np.testing.assert_allclose(figures["mean_calibration_error"][1], errors_R)


def test_f1_is_zero_without_positives_and_predictions() -> None:
    np.testing.assert_array_equal(compute_f1s(np.zeros(4), np.zeros(4), draw_weights(np.arange(4), 3)), np.zeros(3))


@pytest.mark.parametrize(("known", "is_there"), [(True, True), (False, False)])
def test_images_of_exactly_one_class_have_an_accuracy(known: bool, is_there: bool) -> None:
    truth = np.arange(30) % 3
    labels: list[dict[str, int | None]] = [{name: int("abc"[t] == name) for name in "abc"} for t in truth]
    if not known:
        labels[3] = {"a": 1, "b": None, "c": 0}
    score_BF = np.eye(3)[truth]
    score_BF[:6] = 0.0, 0.1, 0.0  # of the first six, the two of class b are right
    figures = judge_probe(
        Probed(score_BF, score_BF > 0, [1.0] * 3, [0.0] * 3, []),
        choose_findings(labels, ["a", "b", "c"]),
        draw_weights(np.arange(30), 5),
    )
    assert ("accuracy" in figures) is is_there
    if is_there:
        assert figures["accuracy"][0] == pytest.approx(26 / 30)


def test_pooled_features_are_those_the_model_projects(run_dir: Path, data_dir: Path) -> None:
    from place.data.prepared import read_samples
    from place.evaluation.encoder import encode_images

    run = load_run(run_dir, "latest")
    jpegs = [sample["image"] for sample in read_samples(data_dir, "test")][:4]
    projected = run.model.project_image(wrap_run(run, "run").encode_images(jpegs).clone()).detach()
    np.testing.assert_allclose(projected, encode_images(run, jpegs).image_BE, atol=1e-6)


@pytest.mark.parametrize("shares", [[], [0.0], [1.5]])
def test_shares_out_of_range_are_wrong_use(shares: list[float]) -> None:
    with pytest.raises(UsageError, match=r"evaluation.label_shares.*above 0 and up to 1"):
        check_config({"evaluation": {"label_shares": shares}})
