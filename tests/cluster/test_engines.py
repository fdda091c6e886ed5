"""Engines and world sizes: the same curve and the same gradients as one process on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curves import GREY, LR, build_engine, take_rank
from spawn import run_ranks
from tiny import build_batch, build_tiny_config

from place.config import Config
from place.distributed import gather_objects, mean_over_ranks
from place.losses.objective import compute_losses
from place.training.gradcache import backward_contrast
from place.training.state import join_runs

pytestmark = pytest.mark.multiprocess
STEPS = 4


def read_gradients(engine: Any, config: Config) -> dict[str, torch.Tensor]:
    """The gradient of each parameter before the first optimiser step, averaged over ranks."""
    if config.engine.kind == "torch":
        return {name: mean_over_ranks(p.grad) for name, p in engine.model.named_parameters()}
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in engine.model.named_parameters()}


def read_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The whole model, joined from what each rank would save."""
    share = {key: run.tolist() for key, run in engine.copy_share().weights.items()}
    runs = [(key, torch.tensor(run)) for part in gather_objects(share) for key, run in part.items()]
    return join_runs(engine.layout, runs)


def run_curve(config: Config) -> dict[str, Any]:
    """A few steps: total losses, gradient norms and the weights after the last step."""
    engine = build_engine(config, 0)
    losses, norms = [], []
    for step in range(STEPS):
        batch = take_rank(build_batch(config.train.global_batch, step, config))
        terms, _ = backward_contrast(
            engine, batch, config.train.accumulation, lambda o, b: compute_losses(o, b, config.loss, GREY)
        )
        if step == 0:
            gradients = read_gradients(engine, config)
        losses.append(mean_over_ranks(torch.stack(terms).detach()))
        norms.append(engine.step(LR).item())
    return {
        "losses": torch.stack(losses),
        "norms": torch.tensor(norms),
        "gradients": gradients,
        "weights": read_weights(engine),
    }


def build_case(kind: str, stage: int, accumulation: int) -> Config:
    return build_tiny_config(
        engine={"kind": kind, "zero_stage": stage}, train={"accumulation": accumulation, "global_batch": 8}
    )


CASES = [
    ("torch", 0, 1),
    ("torch", 0, 2),
    *(("deepspeed", stage, accumulation) for stage in range(4) for accumulation in (1, 2, 4)),
]


def run_cases() -> dict[str, Any]:
    return {"-".join(map(str, case)): run_curve(build_case(*case)) for case in CASES}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """One process of plain torch on the joined batch."""
    return run_curve(build_case("torch", 0, 1))


@pytest.fixture(scope="module")
def double() -> dict[str, Any]:
    """Every case on two ranks; rank 0's view."""
    return run_ranks(run_cases, 2)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_workers_follow_the_curve_of_one_process(case: tuple, single: dict, double: dict) -> None:
    curve = double["-".join(map(str, case))]
    torch.testing.assert_close(curve["losses"], single["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curve["norms"], single["norms"], rtol=1e-4, atol=0)


def test_zero_three_gives_the_full_weights(double: dict) -> None:
    three, zero = (double[f"deepspeed-{stage}-1"]["weights"] for stage in (3, 0))
    assert three.keys() == zero.keys()
    for name, weight in zero.items():
        torch.testing.assert_close(three[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_no_gradient(stage: int, accumulation: int, double: dict, single: dict) -> None:
    whole, chunked = (double[f"deepspeed-{stage}-{count}"]["gradients"] for count in (1, accumulation))
    largest = max(float(gradient.abs().max()) for gradient in single["gradients"].values())
    assert whole.keys() == chunked.keys() == single["gradients"].keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)
        torch.testing.assert_close(gradient, single["gradients"][name], rtol=1e-4, atol=1e-5 * largest, msg=name)
