"""The plan: batches, steps and learning rates that follow from configuration, data and world."""

from __future__ import annotations

import pytest
from tiny import build_tiny_config

from place.config import UsageError
from place.training.plan import RunPlan, build_plan


def plan(world: int = 2, samples: int = 100, val: int = 30, **sections: dict) -> RunPlan:
    return build_plan(
        build_tiny_config(**{"train": {"global_batch": 16, "epochs": 3}, **sections}), world, samples, val
    )


def test_batches_are_shared_out_over_workers_and_chunks() -> None:
    made = plan(train={"global_batch": 16, "accumulation": 4, "epochs": 3})
    assert (made.global_batch, made.local_batch, made.micro_batch) == (16, 8, 2)
    assert (made.steps_per_epoch, made.dropped_per_epoch, made.total_steps) == (6, 4, 18)


@pytest.mark.parametrize(
    ("train", "world", "chunks"),
    [
        ({"max_micro_batch": 8}, 4, 1),
        ({"max_micro_batch": 8}, 3, 1),
        ({"max_micro_batch": 8}, 2, 2),
        ({"max_micro_batch": 5}, 2, 3),
        ({"max_micro_batch": 1}, 1, 24),
        ({"accumulation": 5}, 2, 6),
        ({"accumulation": 2, "max_micro_batch": 3}, 2, 4),
    ],
)
def test_a_worker_never_holds_more_pairs_than_allowed(train: dict, world: int, chunks: int) -> None:
    made = plan(world=world, train={"global_batch": 24, "epochs": 3, **train})
    assert made.accumulation == chunks
    assert made.micro_batch * made.accumulation * world == 24


def test_a_limit_of_steps_wins_over_epochs() -> None:
    made = plan(train={"global_batch": 16, "epochs": 50, "max_steps": 13})
    assert (made.total_steps, made.epochs) == (13, 3)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("sqrt", 2), ("linear", 4)])
def test_the_learning_rate_follows_the_global_batch(scaling: str, factor: float) -> None:
    made = plan(optim={"lr": 1e-3, "base_batch": 4, "lr_scaling": scaling})
    assert made.peak_lr == pytest.approx(1e-3 * factor)


def test_the_schedule_rises_to_the_peak_and_falls_to_its_share() -> None:
    made = plan(train={"global_batch": 16, "epochs": 20}, optim={"lr": 1e-3, "lr_scaling": "none", "warmup_ratio": 0.1})
    rates = [made.compute_lr(step, 0.01) for step in range(made.total_steps + 1)]
    top = made.warmup_steps
    assert 0 < rates[0] < rates[1]
    assert rates[top] == pytest.approx(1e-3) == max(rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)


def test_world_and_accumulation_do_not_change_the_schedule() -> None:
    one, two = plan(world=1), plan(world=2, train={"global_batch": 16, "epochs": 3, "accumulation": 2})
    assert [one.compute_lr(s, 0) for s in range(18)] == [two.compute_lr(s, 0) for s in range(18)]


def test_a_small_validation_split_makes_a_smaller_batch_and_none_makes_none() -> None:
    assert (plan(val=9).val_local_batch, plan(val=9).val_steps) == (4, 1)
    assert (plan(val=0).val_local_batch, plan(val=0).val_steps) == (0, 0)
    assert plan(val=1).val_steps == 0


@pytest.mark.parametrize("val", [5, 30, 47, 100])
def test_every_world_validates_on_the_same_pairs(val: int) -> None:
    worlds = [plan(world, 200, val, train={"global_batch": 48, "max_val_batches": 2}) for world in (1, 2, 4)]
    assert len({(made.val_local_batch * made.world, made.val_steps) for made in worlds}) == 1


def test_workers_that_cannot_share_a_small_validation_split_are_told_in_one_line() -> None:
    assert plan(3, 100, 12, train={"global_batch": 48}).val_local_batch == 4
    with pytest.raises(UsageError, match="a number of workers that divides 8") as caught:
        plan(3, 100, 11, train={"global_batch": 24})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "world", "words"),
    [
        ({"global_batch": 15}, 2, "choose a multiple of 2"),
        ({"global_batch": 16, "accumulation": 9}, 2, "more than the 8 pairs of each of 2 workers; lower it"),
        ({"global_batch": 128}, 1, "larger than the 100 samples"),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(train: dict, world: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(world=world, train=train)
