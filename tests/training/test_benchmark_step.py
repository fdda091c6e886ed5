"""The benchmark of a whole step: what its ways compute, and its gate."""

from __future__ import annotations

import pytest
import torch
from tiny import build_tiny_config

from place.batch import Losses
from place.training.benchmark_step import build_step, check_gate, choose_loss


def test_the_ways_share_model_and_batch_and_differ_in_the_correlation_loss_alone() -> None:
    take_step = build_step(build_tiny_config(model={"text": {"vocab_size": 64}}), 4, torch.device("cpu"))
    off, eager, fused, again = (take_step(way) for way in ("off", "eager", "fused", "eager"))
    assert off.correlation == 0
    assert off.instance == eager.instance == again.instance
    assert eager.correlation == again.correlation > 0
    assert fused.correlation.item() == pytest.approx(eager.correlation.item(), rel=1e-4)


def test_the_definition_is_eager_and_the_runs_own_choice_is_fused() -> None:
    config = build_tiny_config()
    assert [choose_loss(config, way).correlation.method for way in ("eager", "fused")] == ["reference", "auto"]


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_a_way_that_computes_something_else_is_not_timed(value: float) -> None:
    zero = torch.zeros(())

    def take_step(way: str) -> Losses:
        return Losses(zero, zero, zero, torch.tensor(value if way == "fused" else 1.0), zero)

    assert check_gate(take_step) == [f"fused: correlation loss {value:.6f}, the definition's is 1.000000"]
