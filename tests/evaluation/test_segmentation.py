"""Segmentation: Dice and IoU as torchmetrics has them, empties apart, unknown masks nowhere, and a head that learns."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.functional.segmentation import dice_score, mean_iou

from place.config import EvaluationConfig, RunError, SegmentationConfig, UsageError
from place.evaluation.folds import deal_folds
from place.evaluation.heads import Schedule, Training, build_schedule
from place.evaluation.segmentation import (
    Way,
    choose_classes,
    compute_overlaps,
    fit_mask,
    is_known,
    judge_masks,
    judge_way,
    run_segmentation,
)
from place.evaluation.setr import MaskedSplit, SetrPup, compute_loss, predict, train_head
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run


def build_task(run_dir, data_dir, folder=None, **options) -> Task:
    evaluation = EvaluationConfig(bootstrap=50, batch_size=16, **options)
    return Task(TaskInput(load_run(run_dir), data_dir, {"labels": []}, "test", evaluation, folder=folder))


@pytest.fixture(scope="module")
def result(run_dir, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation")
    return run_segmentation(build_task(run_dir, data_dir, folder)), folder


@pytest.mark.parametrize("seed", range(3))
def test_dice_and_iou_equal_torchmetrics_on_random_masks(seed):
    rng = np.random.default_rng(seed)
    shown, mask = (rng.random((5, 3, 16, 16)) < share for share in (0.4, 0.3))
    ours = compute_overlaps(shown, mask)
    tensors = torch.from_numpy(shown).int(), torch.from_numpy(mask).int()
    dice = dice_score(*tensors, num_classes=3, average="none", input_format="one-hot")
    iou = mean_iou(*tensors, num_classes=3, per_class=True, input_format="one-hot")
    assert np.allclose(ours["dice"], dice.numpy(), atol=1e-6)
    assert np.allclose(ours["iou"], iou.numpy(), atol=1e-6)
    assert np.isnan(ours["empty_kept"]).all()


def test_an_empty_truth_has_no_dice_and_is_counted_apart():
    mask = np.zeros((3, 1, 4, 4), bool)
    shown = mask.copy()
    mask[0, 0, :2] = shown[1, 0, 0, 0] = True
    metrics = judge_masks(shown, mask, np.ones((3, 1), bool), ["a"], np.arange(3), 0)
    assert metrics["dice.a"].value == metrics["iou.a"].value == metrics["mean_dice"].value == 0
    assert metrics["empty_kept.a"].value == 0.5


def test_an_image_that_was_not_looked_at_counts_nowhere():
    mask = np.ones((2, 1, 4, 4), bool)
    shown = mask.copy()
    shown[1] = False
    known = np.array([[True], [False]])
    assert judge_masks(shown, mask, known, ["a"], np.arange(2), 0)["dice.a"].value == 1
    logits = torch.randn(2, 1, 4, 4)
    changed = torch.cat([logits[:1], -logits[1:]])
    masks = torch.from_numpy(mask)
    assert compute_loss(logits, masks, torch.tensor(known)) == compute_loss(changed, masks, torch.tensor(known))


def test_masks_follow_the_image_through_crop_and_resize():
    mask_YX = np.zeros((72, 64), bool)
    mask_YX[40:60, 4:24] = True
    expected_YX = np.zeros((32, 32), bool)
    expected_YX[18:28, 2:12] = True
    assert np.array_equal(fit_mask(mask_YX, 32), expected_YX)
    assert not fit_mask(None, 32).any()


def test_a_finding_is_known_where_it_was_looked_for_and_something_is_left_to_see():
    there, gone = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    assert is_known({"a": there}, "a", there)
    assert is_known({"a": None}, "a", gone)
    assert not is_known({"a": there}, "a", gone)
    assert not is_known({}, "a", gone)


def test_the_head_finds_what_the_tokens_tell_and_its_steps_repeat():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(48, 16, 6, generator=generator)
    mask = (tokens[:, :, 0] > 0).unflatten(1, (4, 4))[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
    split = MaskedSplit(tokens, mask, torch.ones(48, 1, dtype=torch.bool))
    head, step = train_head(split, split, 4, SegmentationConfig())
    again, same_step = train_head(split, split, 4, SegmentationConfig())
    shown = predict(head, tokens, 16) > 0
    assert compute_overlaps(shown.numpy(), mask.numpy())["dice"].mean() > 0.85
    assert step == same_step
    assert torch.equal(predict(head, tokens, 16), predict(again, tokens, 16))
    assert torch.allclose(predict(head, tokens[:1], 16), predict(head, tokens, 16)[:1], atol=1e-5)


def test_a_head_that_diverges_is_refused_in_one_line():
    tokens = torch.randn(4, 16, 6)
    split = MaskedSplit(tokens, torch.ones(4, 1, 16, 16, dtype=torch.bool), torch.ones(4, 1, dtype=torch.bool))
    config = SegmentationConfig(max_steps=7, look_every_steps=5, lr=float("inf"))
    told = "^the head: training diverged, no finite validation loss in 7 steps; lower its learning rate, lr in its "
    with pytest.raises(RunError, match=f"{told}section of evaluation$"):
        train_head(split, split, 4, config)


def test_a_head_is_looked_at_after_its_last_step_too():
    tokens = torch.randn(8, 16, 6)
    mask = (tokens[:, :, 0] > 0).unflatten(1, (4, 4))[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
    split, seen = MaskedSplit(tokens, mask, torch.ones(8, 1, dtype=torch.bool)), []
    _, step = train_head(split, split, 4, SegmentationConfig(max_steps=14, look_every_steps=5), seen.append)
    assert seen == [5, 10, 14]
    assert step == 14


def test_a_head_gives_the_size_asked_for_whatever_the_patch():
    assert SetrPup(8, 2, 14)(torch.randn(2, 9, 8), 42).shape == (2, 2, 42, 42)


def test_the_task_learns_the_planted_square_and_draws_it(result):
    found, folder = result
    assert found.metrics["dice.effusion"].value > 0.5
    assert found.metrics["empty_kept.effusion"].value > 0.5
    assert found.metrics["dice.effusion"].low < found.metrics["dice.effusion"].value
    assert found.protocol["left_out"] == {"edema": "no mask in split 'train'"}
    counts = found.protocol["findings"]["effusion"]
    assert counts["images"] + counts["empty"] == found.num_samples == 41
    picture = cv2.imread(str(folder / "segmentation.png"))
    assert picture.std() > 10


def test_the_upernet_head_learns_it_too(run_dir, data_dir):
    config = SegmentationConfig(max_steps=100, look_every_steps=25)
    found = run_segmentation(build_task(run_dir, data_dir, segmentation_head="upernet", segmentation=config))
    assert found.metrics["dice.effusion"].value > 0.5
    assert found.protocol["score"].startswith("UperNet head over a simple feature pyramid on the frozen encoder's")


def test_the_seed_changes_the_head_and_stands_in_the_protocol_beside_what_else_was_set(run_dir, data_dir):
    settings = [SegmentationConfig(max_steps=5, seed=seed) for seed in (0, 0, 1)]
    found = [run_segmentation(build_task(run_dir, data_dir, segmentation=config)) for config in settings]
    first, same, other = (result.metrics["dice.effusion"].value for result in found)
    assert first == same != other
    assert [result.protocol["settings"] for result in found] == [config.model_dump() for config in settings]
    assert "at most 5 steps, a look every 5, patience of 4 looks" in found[0].protocol["stopped"]


def test_the_schedules_of_the_heads_are_what_they_were_before_they_were_settings():
    evaluation = EvaluationConfig()
    assert build_schedule(evaluation.segmentation) == Schedule(600, 50, 4, 32, 1e-3, 1e-4)
    assert build_schedule(evaluation.detection) == Schedule(400, 50, 4, 16, 1e-3, 1e-4)
    assert evaluation.segmentation.seed == evaluation.detection.seed == 0


def test_findings_without_masks_are_told(run_dir, data_dir):
    with pytest.raises(UsageError, match="no finding asked for has masks to train"):
        run_segmentation(build_task(run_dir, data_dir, findings=["edema"]))


def test_cross_validation_judges_every_image_once_with_no_patient_on_two_sides(run_dir, data_dir):
    found = run_segmentation(build_task(run_dir, data_dir, folds=3, segmentation=SegmentationConfig(max_steps=150)))
    assert found.num_samples == 80 + 40 + 41
    assert found.metrics["dice.effusion"].value > 0.5
    unit_B = np.array(["c", "a", "b", "a", "c", "d"])
    fold_B = deal_folds(unit_B, 3)
    assert fold_B.tolist() == [2, 0, 1, 0, 2, 0]
    with pytest.raises(UsageError, match=r"expected 3 \(train, stop, judge\) to 4"):
        deal_folds(unit_B, 5)


def test_a_finding_whose_masks_lie_outside_what_the_encoder_sees_is_left_out():
    seen, unseen = np.zeros((72, 64), bool), np.zeros((72, 64), bool)
    seen[40:60, 4:24] = unseen[:3] = True
    masks = {"train": {1: {"a": seen, "b": seen}}, "test": {2: {"a": seen, "b": unseen}}}
    names, left_out = choose_classes(masks, [], ("test", "train"), 32)
    assert (names, left_out) == (["a"], {"b": "no mask in split 'test'"})


def test_each_fold_trains_on_at_most_so_many_images(run_dir, data_dir):
    sizes = []

    def fit(task, train, val, test):
        sizes.append(len(train.sample_ids))
        training = Training(Schedule(1, 1, 1, 9, 0.1, 0.0), len(train.sample_ids), 1)
        return torch.zeros(test.split.mask_BFYX.shape, dtype=torch.bool), training

    way = Way("segmentation", "", "", {}, "segmentation", True, fit)
    found = judge_way(build_task(run_dir, data_dir, folds=3, max_train_images=30), way)
    assert sizes == [30] * 3
    assert found.protocol["passes"] == [0.3] * 3
    assert found.protocol["notes"] == [
        "trained on 9 draws of 30 images, less than once through them; raise evaluation.segmentation.max_steps"
    ]
    assert found.num_samples == 161
    assert "at most 30, first by hash" in found.protocol["trained_on"]
