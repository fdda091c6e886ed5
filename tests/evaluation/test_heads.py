"""Settings of the heads reach what they set; no fold has more images that stop than asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from place.config import DetectionConfig, EvaluationConfig, SegmentationConfig
from place.evaluation import detector, setr
from place.evaluation.detector import BoxedSplit, Boxes, train_detector
from place.evaluation.folds import list_folds
from place.evaluation.heads import Schedule, Training, build_schedule, build_seeded, describe_passes, train_on_tokens
from place.evaluation.setr import MaskedSplit, train_head


def test_every_setting_is_in_the_schedule():
    settings = {"max_steps": 7, "look_every_steps": 3, "patience": 2, "batch_size": 5, "lr": 0.5, "weight_decay": 0.25}
    for section in (SegmentationConfig, DetectionConfig):
        assert build_schedule(section(**settings)) == Schedule(7, 3, 2, 5, 0.5, 0.25)


@pytest.mark.parametrize(("pull", "lr", "decay", "left"), [(1.0, 0.1, 0.0, 0.9), (0.0, 0.1, 0.5, 0.95)])
def test_a_step_is_as_long_as_the_rate_and_weights_decay_as_asked(pull, lr, decay, left):
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    schedule = Schedule(1, 1, 1, 1, lr, decay)
    train_on_tokens(head, lambda rows: pull * head.weight.sum(), lambda: 0.0, 1, schedule, seed=0)
    assert head.weight.item() == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "kept", "steps"), [([3, 2, 1, 0], 7, 7), ([1, 2, 3, 4], 2, 6), ([2, 1, 3, 3], 4, 7)]
)
def test_the_steps_that_were_taken_follow_from_the_one_that_was_kept(losses, kept, steps):
    head, told, batches = nn.Linear(1, 1), iter(losses), []

    def compute_loss(rows: Tensor) -> Tensor:
        batches.append(rows)
        return head.weight.sum()

    schedule = Schedule(7, 2, 2, 4, 0.1, 0.0)
    _, step = train_on_tokens(head, compute_loss, lambda: next(told), 3, schedule, seed=0)
    training = Training(schedule, 3, step)
    assert (step, len(batches)) == (kept, steps)
    assert training.count_draws() == sum(map(len, batches)) == 3 * steps


@pytest.mark.parametrize(
    ("training", "passes", "notes"),
    [
        (
            Training(Schedule(400, 50, 4, 16, 1e-3, 1e-4), 16_000, 400),
            [0.4],
            "trained on 6,400 draws of 16,000 images, less than once through them; "
            "raise evaluation.detection.max_steps",
        ),
        (
            Training(Schedule(5000, 50, 4, 16, 1e-3, 1e-4), 16_000, 150),
            [0.35],
            "trained on 5,600 draws of 16,000 images, less than once through them; raise evaluation.detection.patience",
        ),
        (Training(Schedule(400, 50, 4, 16, 1e-3, 1e-4), 2_000, 400), [3.2], None),
        (Training(Schedule(400, 50, 4, 16, 1e-3, 1e-4), 6_400, 400), [1.0], None),
    ],
)
def test_a_training_that_did_not_go_through_its_images_says_so(training, passes, notes):
    assert describe_passes([training], "detection") == {"passes": passes} | ({"notes": [notes]} if notes else {})


def test_of_several_trainings_the_one_with_the_fewest_passes_is_told():
    schedule = Schedule(10, 5, 4, 4, 1e-3, 1e-4)
    told = describe_passes([Training(schedule, count, 10) for count in (30, 90, 60)], "segmentation")
    assert told["passes"] == [1.33, 0.44, 0.67]
    assert told["notes"] == [
        "trained on 40 draws of 90 images, less than once through them; raise evaluation.segmentation.max_steps"
    ]


def train_segmentation(seed: int, **settings) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    split = MaskedSplit(
        torch.randn(8, 4, 8, generator=rng), torch.rand(8, 1, 16, 16, generator=rng) > 0.5, torch.ones(8, 1).bool()
    )
    config = SegmentationConfig(max_steps=1, batch_size=2, seed=seed, **settings)
    head, _ = train_head(split, split, 8, config)
    return torch.cat([part.detach().flatten() for part in head.parameters()])


def train_detection(seed: int, **settings) -> Tensor:
    tokens = torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(0))
    boxes = [Boxes(torch.tensor([[2.0, 2, 9 + n, 9]]), torch.zeros(1).long(), torch.ones(1)) for n in range(8)]
    split = BoxedSplit(tokens, boxes)
    config = DetectionConfig(max_steps=1, batch_size=2, seed=seed, **settings)
    head, _ = train_detector(split, split, 32, 1, config)
    return torch.cat([part.detach().flatten() for part in head.parameters()])


@pytest.mark.parametrize(("module", "train"), [(setr, train_segmentation), (detector, train_detection)])
def test_the_seed_is_that_of_weights_and_that_of_batches(module, train, monkeypatch):
    still = {"lr": 1e-12, "weight_decay": 0.0}
    assert torch.equal(train(0, **still), train(0, **still))
    assert not torch.allclose(train(0, **still), train(1, **still)), "weights do not depend on the seed"
    monkeypatch.setattr(module, "build_seeded", lambda build, seed: build_seeded(build, 0))
    assert torch.allclose(train(0, **still), train(1, **still))
    assert not torch.allclose(train(0), train(1)), "batches do not depend on the seed"


def test_no_fold_has_more_images_that_stop_than_asked():
    unit_B = np.array([f"p{row // 2}" for row in range(24)])
    ids = [(row * 7) % 24 for row in range(24)]
    for most in (3, 100):
        folds = list(list_folds(ids, unit_B, EvaluationConfig(folds=3), most))
        assert [len(fold.val) for fold in folds] == [min(most, 8)] * 3
        assert sorted(row for fold in folds for row in fold.test) == list(range(24))
    # The first by sample_id, which is a hash.
    (fold, *_) = list_folds(ids, unit_B, EvaluationConfig(folds=3), 3)
    (whole, *_) = list_folds(ids, unit_B, EvaluationConfig(folds=3), 100)
    assert sorted(ids[row] for row in fold.val) == sorted(ids[row] for row in whole.val)[:3]
