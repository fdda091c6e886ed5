"""Phases of a step: they follow each other without a gap, and collectives are taken out of those around them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from clock import Clock
from spawn import run_ranks

from place.distributed import gather_with_grad
from place.training.phases import Phases


def test_phases_sum_to_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    phases = Phases(torch.device("cpu"))
    for name, seconds in (("wait", 0.02), ("forward", 0.03), ("wait", 0.01)):
        clock.sleep(seconds)
        phases.mark(name)
    assert phases.take() == pytest.approx({"wait": 0.03, "forward": 0.03, "communication": 0.0})
    assert phases.take() == {}


def wait_for_each_other(folder: str) -> dict[str, float]:
    """Rank 1 comes 0.6 s late to a collective of the loss, and to one of the optimiser that is waited for later."""
    late, phases = 0.6 * dist.get_rank(), Phases(torch.device("cpu"))
    tensor, plain = torch.ones(4), dist.all_reduce
    dist.barrier()
    phases.mark("other")
    phases.take()
    with phases.watch_collectives():
        time.sleep(late)
        dist.all_reduce(tensor)
        phases.mark("loss")
        work = dist.all_reduce(tensor, async_op=True)
        time.sleep(late)
        work.wait()
        phases.mark("optimiser")
    assert dist.all_reduce is plain
    assert tensor.tolist() == [4.0] * 4
    assert Path(folder).is_dir()
    return phases.take()


@pytest.mark.multiprocess
def test_the_wait_for_others_is_communication_and_not_the_phase_around_it(tmp_path: Path) -> None:
    early, late = run_ranks(wait_for_each_other, 2, str(tmp_path))
    assert early["gather"] > 0.45
    assert early["loss"] < 0.1
    assert late["loss"] > 0.45
    assert late["gather"] < 0.1
    assert late["optimiser"] > 0.45
    assert early["optimiser"] < 0.1


def come_late_to_the_gradients(late_s: float) -> dict[str, float]:
    """Rank 1 comes late to the backward pass of gathered features, which waits for all ranks' gradients."""
    features_BE = torch.ones(2, 3, requires_grad=True)
    phases = Phases(torch.device("cpu"))
    with phases.watch_collectives():
        total = gather_with_grad(features_BE).sum()
        dist.barrier()
        phases.mark("loss")
        phases.take()
        time.sleep(late_s * dist.get_rank())
        total.backward()
        phases.mark("backward")
    assert features_BE.grad is not None
    assert features_BE.grad.eq(2).all()
    return phases.take()


@pytest.mark.multiprocess
def test_the_exchange_of_the_features_gradients_is_communication_and_not_backward() -> None:
    early, _ = run_ranks(come_late_to_the_gradients, 2, 1.5)
    assert early["communication"] > 0.75
    assert early["backward"] < 0.5 * early["communication"]
