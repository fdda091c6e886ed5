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

from place.config import EvaluationConfig, UsageError
from place.evaluation import detector
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
from place.evaluation.heads import Schedule
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


def test_the_detector_finds_what_the_tokens_tell_and_its_steps_repeat(monkeypatch):
    monkeypatch.setattr(detector, "SCHEDULE", Schedule(max_steps=150))
    rng = np.random.default_rng(0)
    tokens, boxes = torch.zeros(48, 16, 64), []
    for row in range(48):
        y, x = rng.integers(0, 4, 2)
        tokens[row, y * 4 + x, :8] = 3.0
        box = 8 * torch.tensor([[x, y, x + 1, y + 1]], dtype=torch.float32)
        boxes.append(Boxes(box if row % 4 else box[:0], torch.zeros(int(bool(row % 4)), dtype=torch.int64)))
        tokens[row] *= bool(row % 4)
    split = BoxedSplit(tokens, boxes)
    found, step = train_detector(split, split, 32, 1)
    again, same_step = train_detector(split, split, 32, 1)
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


def test_the_schedule_ends_where_validation_no_longer_falls(monkeypatch):
    monkeypatch.setattr(detector, "SCHEDULE", Schedule(max_steps=40, every=2, patience=1, lr=10.0))
    tokens = torch.randn(4, 16, 64)
    boxes = [Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0]))] * 4
    seen: list[int] = []
    found, step = train_detector(BoxedSplit(tokens, boxes), BoxedSplit(tokens, boxes), 32, 1, on_progress=seen.append)
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
