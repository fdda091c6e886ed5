"""Detection: average precision as pycocotools has it, empty images counted, and a detector that learns."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

from place.config import DetectionConfig, EvaluationConfig, UsageError
from place.evaluation import detection
from place.evaluation.detection import choose_boxed, fit_boxes, list_boxed, run_detection
from place.evaluation.detection_metrics import (
    FIELD_IOUS,
    IOUS,
    _build_coco,
    compute_average_precision,
    judge_boxes,
    list_matches,
    match_boxes,
    read_matches,
)
from place.evaluation.detector import BoxedSplit, Boxes, Detector, SimplePyramid, train_detector
from place.evaluation.encoder import read_units
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run

NUM_FINDINGS = 3


def draw_image(rng: np.random.Generator, truth: Boxes | None) -> Boxes:
    """Random boxes; as guesses, some of them truths that were moved a little, with scores that tie now and then."""
    count = int(rng.integers(0, 4))
    corner = rng.uniform(0, 40, (count, 2))
    box = np.concatenate([corner, corner + rng.uniform(5, 25, (count, 2))], axis=1)
    finding = rng.integers(0, NUM_FINDINGS, count)
    if truth is not None:
        box = np.concatenate([box, truth.box_P4.numpy() + rng.normal(0, 1.5, (len(truth.box_P4), 4))])
        finding = np.concatenate([finding, truth.finding_P.numpy()])
    score = torch.from_numpy(rng.integers(0, 12, len(box)) / 12) if truth is not None else None
    return Boxes(torch.from_numpy(box).float(), torch.from_numpy(finding), score)


def draw_images(seed: int, count: int = 40) -> tuple[list[Boxes], list[Boxes]]:
    rng = np.random.default_rng(seed)
    truths = [draw_image(rng, None) for _ in range(count)]
    return truths, [draw_image(rng, truth) for truth in truths]


def test_rows_of_images_give_the_matches_again():
    found = match_boxes(*draw_images(0), NUM_FINDINGS)
    table = list_matches(found, ["a", "b", "c"], list(range(40)))
    for name, matches in zip("abc", found, strict=True):
        own = [row for row, finding in enumerate(table["finding"]) if finding == name]
        again = read_matches({key: np.array([column[row] for row in own], object) for key, column in table.items()})
        assert matches.hit_TD.any(axis=1).any()
        for ours, theirs in zip(again, matches, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_pycocotools(seed):
    truths, guesses = draw_images(seed)
    with redirect_stdout(io.StringIO()):
        judge = COCOeval(_build_coco(truths, NUM_FINDINGS), _build_coco(guesses, NUM_FINDINGS), "bbox")
        judge.params.iouThrs = np.array(IOUS)
        judge.evaluate()
        judge.accumulate()
    expected_TF = judge.eval["precision"][:, :, :, 0, 2].mean(axis=1)
    ones_RB = np.ones((1, len(truths)))
    found = [compute_average_precision(matches, ones_RB)[0] for matches in match_boxes(truths, guesses, NUM_FINDINGS)]
    assert np.allclose(np.stack(found, axis=1), expected_TF, atol=1e-6)
    assert 0.05 < expected_TF.mean() < 0.95


def test_the_field_s_mean_equals_torchmetrics():
    truths, guesses = draw_images(9)
    judge = MeanAveragePrecision(iou_thresholds=list(FIELD_IOUS))
    judge.update(
        [{"boxes": g.box_P4, "labels": g.finding_P, "scores": g.score_P} for g in guesses],
        [{"boxes": t.box_P4, "labels": t.finding_P} for t in truths],
    )
    ours = judge_boxes(truths, guesses, ["a", "b", "c"], np.arange(len(truths)), 0)
    assert ours["mean_ap_40_75"].value == pytest.approx(float(judge.compute()["map"]), abs=1e-6)


def test_a_patient_drawn_twice_counts_as_two_images_would():
    truths, guesses = draw_images(5, 12)
    weight_B = np.random.default_rng(1).integers(0, 3, 12)
    twice = [row for row, weight in enumerate(weight_B) for _ in range(weight)]
    copies = [[boxes[row] for row in twice] for boxes in (truths, guesses)]
    # No two guesses of different images tie, so that the order of copies cannot matter.
    for number, guess in enumerate(guesses):
        guess.score_P.add_(number * 1e-3)
    for matches, copied in zip(match_boxes(truths, guesses, 3), match_boxes(*copies, 3), strict=True):
        if copied.truths_B.sum():
            weighted_T = compute_average_precision(matches, weight_B[None])[0]
            plain_T = compute_average_precision(copied, np.ones((1, len(twice))))[0]
            assert np.allclose(weighted_T, plain_T, atol=0.02)


def test_false_alarms_on_images_without_boxes_cost_precision():
    box = torch.tensor([[2.0, 2.0, 12.0, 12.0]])
    truth, none = Boxes(box, torch.tensor([0])), Boxes(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    sure, unsure = (Boxes(box, torch.tensor([0]), torch.tensor([score])) for score in (0.9, 0.5))
    quiet = none._replace(score_P=torch.empty(0))
    units = np.arange(2)
    assert judge_boxes([truth, none], [unsure, quiet], ["a"], units, 0)["mean_ap"].value == pytest.approx(1)
    assert judge_boxes([truth, none], [unsure, sure], ["a"], units, 0)["mean_ap"].value == pytest.approx(0.5)


def test_a_resample_without_a_truth_has_no_figure():
    truths, guesses = draw_images(2, 6)
    matches = match_boxes(truths, guesses, 3)[0]
    assert np.isnan(compute_average_precision(matches, (matches.truths_B == 0)[None].astype(float))).all()


def test_the_pyramid_is_as_deep_as_the_grid_can_be_halved():
    tokens = torch.randn(2, 196, 8)
    assert [tuple(level.shape[2:]) for level in SimplePyramid(8, 14, 32)(tokens)] == [(28, 28), (14, 14), (7, 7)]
    assert [level.shape[-1] for level in SimplePyramid(8, 8, 32)(tokens[:, :64])] == [16, 8, 4, 2]
    assert len(SimplePyramid(8, 5, 32).levels) == 2


def test_the_detector_finds_what_the_tokens_tell_and_its_steps_repeat():
    config = DetectionConfig(max_steps=150, batch_size=32)
    rng = np.random.default_rng(0)
    tokens, boxes = torch.zeros(48, 16, 64), []
    for row in range(48):
        y, x = rng.integers(0, 4, 2)
        tokens[row, y * 4 + x, :8] = 3.0
        box = 8 * torch.tensor([[x, y, x + 1, y + 1]], dtype=torch.float32)
        boxes.append(Boxes(box if row % 4 else box[:0], torch.zeros(int(bool(row % 4)), dtype=torch.int64)))
        tokens[row] *= bool(row % 4)
    split = BoxedSplit(tokens, boxes)
    found, step = train_detector(split, split, 32, 1, config)
    again, same_step = train_detector(split, split, 32, 1, config)
    guesses = found.predict(tokens)
    metrics = judge_boxes(boxes, guesses, ["a"], np.arange(48), 0)
    assert metrics["mean_ap_50"].value > 0.9
    assert step == same_step
    assert all(torch.equal(a.box_P4, b.box_P4) for a, b in zip(guesses, again.predict(tokens), strict=True))
    assert torch.allclose(found.predict(tokens[1:2])[0].box_P4[0], guesses[1].box_P4[0], atol=1e-3)


def test_boxes_follow_the_image_through_crop_and_resize():
    sample = {
        "image": cv2.imencode(".png", np.zeros((72, 64), np.uint8))[1].tobytes(),
        "boxes": [
            {"finding": "effusion", "box_xyxy": [4, 40, 24, 60]},
            {"finding": "edema", "box_xyxy": [0, 0, 64, 3]},  # above the square
            {"finding": "nodule", "box_xyxy": [4, 40, 24, 60]},
        ],
    }
    boxes = fit_boxes(sample, ["edema", "effusion"], 32)
    assert boxes.box_P4.tolist() == [[2, 18, 12, 28]]
    assert boxes.finding_P.tolist() == [1]
    assert fit_boxes({"image": b"", "boxes": []}, ["edema"], 32).box_P4.shape == (0, 4)


def test_boxes_are_the_same_however_often_they_are_read():
    sample = {
        "image": cv2.imencode(".png", np.zeros((72, 64), np.uint8))[1].tobytes(),
        "boxes": [{"finding": "effusion", "box_xyxy": [4, 40, 24, 60]}],
    }
    first, second = (fit_boxes(sample, ["effusion"], 32) for _ in range(2))
    assert first.box_P4.tolist() == second.box_P4.tolist() == [[2, 18, 12, 28]]
    assert sample["boxes"] == [{"finding": "effusion", "box_xyxy": [4, 40, 24, 60]}]


def test_findings_need_boxes_in_every_split():
    there = {"train": {"a", "b"}, "val": {"a"}, "test": {"a", "b", "c"}}
    assert choose_boxed(there, []) == (["a"], {"b": "no box in split 'val'", "c": "no box in split 'train'"})
    with pytest.raises(UsageError, match="no finding asked for has boxes in every split; there are train: a, b"):
        choose_boxed(there, ["b"])


def test_the_task_finds_the_planted_box_and_draws_it(run_dir, data_dir, tmp_path):
    evaluation = EvaluationConfig(bootstrap=50, batch_size=16)
    given = TaskInput(load_run(run_dir), data_dir, {"labels": []}, "test", evaluation, folder=tmp_path)
    result = run_detection(Task(given))
    metric = result.metrics["ap_50.effusion"]
    assert metric.value > 0.5
    assert metric.low is not None
    counts = result.protocol["findings"]["effusion"]
    assert counts["boxes"] == counts["images"]
    assert counts["images"] + counts["empty"] == result.num_samples == 41
    assert cv2.imread(str(tmp_path / "detection.png")).std() > 10


def build_task(run_dir, data_dir, **options) -> Task:
    evaluation = EvaluationConfig(bootstrap=20, batch_size=16, **options)
    return Task(TaskInput(load_run(run_dir), data_dir, {"labels": []}, "test", evaluation))


def test_the_seed_changes_the_detector_and_stands_in_the_protocol_beside_what_else_was_set(run_dir, data_dir):
    settings = [DetectionConfig(max_steps=40, look_every_steps=20, seed=seed) for seed in (0, 0, 1)]
    found = [run_detection(build_task(run_dir, data_dir, detection=config)) for config in settings]
    first, same, other = (np.concatenate(result.rows["scores"]).tolist() for result in found)
    assert first == same != other
    assert [result.protocol["settings"] for result in found] == [config.model_dump() for config in settings]
    assert "at most 40 steps, a look every 20, patience of 4 looks" in found[0].protocol["stopped"]
    assert found[0].protocol["passes"] == [8.0]
    assert "notes" not in found[0].protocol


def test_a_detector_that_did_not_see_all_its_images_says_so(run_dir, data_dir):
    few = DetectionConfig(max_steps=2)
    result = run_detection(build_task(run_dir, data_dir, detection=few))
    assert result.protocol["passes"] == [0.4]
    assert result.protocol["notes"] == [
        "trained on 32 draws of 80 images, less than once through them; raise evaluation.detection.max_steps"
    ]


def test_folds_judge_every_image_once_by_a_detector_that_did_not_see_its_patient(run_dir, data_dir, monkeypatch):
    units = {key: unit for split in ("train", "val", "test") for key, unit in read_units(data_dir, split).items()}
    judged, fit = [], detection._fit

    def watch(task, train, val, test, num_findings):
        patients = [{units[key] for key in read.sample_ids} for read in (train, val, test)]
        assert len(set.union(*patients)) == sum(map(len, patients)), "a patient is on two sides"
        assert len(train.sample_ids) == 40
        guesses, training = fit(task, train, val, test, num_findings)
        judged.append((test, guesses, training.kept))
        return guesses, training

    monkeypatch.setattr(detection, "_fit", watch)
    config = DetectionConfig(max_steps=50, look_every_steps=25)
    result = run_detection(build_task(run_dir, data_dir, folds=3, max_train_images=40, detection=config))
    assert sorted(key for test, *_ in judged for key in test.sample_ids) == sorted(units)
    assert result.num_samples == len(units) == 80 + 40 + 41
    assert result.metrics["ap_50.effusion"].value > 0.5
    steps = [step for *_, step in judged]
    told = f"the others train, at most 40, first by hash; stopped at steps {steps}; boxes of all folds are ranked"
    assert result.protocol["trained_on"].startswith("3 folds of patients over splits train, val, test: one judged")
    assert told in result.protocol["trained_on"]
    # Average precision is that of all images at once, each with its own boxes.
    truths = [truth for test, *_ in judged for truth in test.split.boxes]
    guesses = [guess for _, own, _ in judged for guess in own]
    unit_B = np.array([units[key] for test, *_ in judged for key in test.sample_ids])
    expected = judge_boxes(truths, guesses, ["effusion"], unit_B, 0)["mean_ap"].value
    assert result.metrics["mean_ap"].value == pytest.approx(expected, abs=1e-6)


def test_folds_take_the_splits_that_have_boxes_and_say_where_there_are_none(run_dir, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    rows = pq.read_table(copy / "manifest.parquet").to_pylist()
    for row in rows:
        row["boxes"] = row["boxes"] if row["split"] == "test" else "[]"
    pq.write_table(pa.Table.from_pylist(rows), copy / "manifest.parquet")
    few = DetectionConfig(max_steps=2)
    result = run_detection(build_task(run_dir, copy, folds=3, detection=few))
    assert result.num_samples == 41
    assert "over splits test: one judged" in result.protocol["trained_on"]
    assert len(result.protocol["passes"]) == 3
    with pytest.raises(UsageError, match="no finding asked for has boxes in every split; there are all splits: eff"):
        run_detection(build_task(run_dir, copy, folds=3, findings=["edema"]))
    with pytest.raises(UsageError, match=r"evaluation.folds=2: expected 3 \(train, stop, judge\)"):
        run_detection(build_task(run_dir, copy, folds=2, detection=few))


def test_the_schedule_ends_where_validation_no_longer_falls():
    config = DetectionConfig(max_steps=40, look_every_steps=2, patience=1, lr=10.0)
    tokens = torch.randn(4, 16, 64)
    boxes = [Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0]))] * 4
    seen: list[int] = []
    split = BoxedSplit(tokens, boxes)
    found, step = train_detector(split, split, 32, 1, config, on_progress=seen.append)
    assert seen[-1] < 40
    assert step == seen[-1] - 2
    assert isinstance(found, Detector)
    assert not found.training


def test_a_finding_whose_boxes_lie_outside_what_the_encoder_sees_is_left_out(run_dir, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    rows = pq.read_table(copy / "manifest.parquet").to_pylist()
    boxed = [row for row in rows if row["boxes"] != "[]"]
    for row in boxed:
        box = json.loads(row["boxes"])[0]
        above = box | {"finding": "edema", "box_xyxy": [0, 0, 64, 3] if row["split"] == "test" else [0, 0, 64, 30]}
        row["boxes"] = json.dumps([box, above])
    pq.write_table(pa.Table.from_pylist(rows), copy / "manifest.parquet")
    given = TaskInput(load_run(run_dir), copy, {"labels": []}, "test", EvaluationConfig(bootstrap=0))
    there = {split: list_boxed(Task(given), split) for split in ("train", "val", "test")}
    assert choose_boxed(there, []) == (["effusion"], {"edema": "no box in split 'test'"})
