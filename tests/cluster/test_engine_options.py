"""What the engine section can turn: each option trains the same curve, and goes on from its own checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from curves import build_engine, run_steps
from place.cluster.deepspeed_engine import build_deepspeed_config
from spawn import run_ranks
from tiny import build_batch, build_tiny_config

from place.config import Config, UsageError
from place.distributed import World
from place.training.checkpoint import agree_on_checkpoint, read_state
from place.training.engine import LossScale
from place.training.saver import Saver

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]
SAVED_AT, STEPS = 2, 4
BF16 = {"enabled": True, "dtype": "bfloat16"}
EXACT, ROUNDED = 1e-4, 5e-2
# bf16 by DeepSpeed comes last: its autocast, once on, holds for every later engine of a process.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "reduce to the owner, 1": ({"zero_stage": 1, "gradient_reduction": "reduce"}, EXACT),
    "reduce to the owner, 2": ({"zero_stage": 2, "gradient_reduction": "reduce"}, EXACT),
    "small buckets, 1": ({"zero_stage": 1, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 5000}}}, EXACT),
    "small buckets, 3": ({"zero_stage": 3, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 5000}}}, EXACT),
    "reduce scatter, 3": ({"zero_stage": 3, "deepspeed": {"zero_optimization": {"reduce_scatter": True}}}, EXACT),
    "offload optimizer, 1": ({"zero_stage": 1, "offload": "optimizer"}, EXACT),
    "offload optimizer, 2": ({"zero_stage": 2, "offload": "optimizer"}, EXACT),
    "offload optimizer, 3": ({"zero_stage": 3, "offload": "optimizer"}, EXACT),
    "offload all, 3": ({"zero_stage": 3, "offload": "all"}, EXACT),
    "fp16, torch": ({"kind": "torch", "precision": "fp16"}, ROUNDED),
    "fp16, 1": ({"zero_stage": 1, "precision": "fp16"}, ROUNDED),
    "fp16, 2": ({"zero_stage": 2, "precision": "fp16"}, ROUNDED),
    "fp16, 3": ({"zero_stage": 3, "precision": "fp16"}, ROUNDED),
    "bf16 wire, 1": ({"zero_stage": 1, "wire_precision": "bf16"}, ROUNDED),
    "bf16 wire, 3": ({"zero_stage": 3, "wire_precision": "bf16"}, ROUNDED),
    "bf16, 2": ({"zero_stage": 2, "precision": "bf16"}, ROUNDED),
    "bf16 and wire, 0": ({"zero_stage": 0, "precision": "bf16", "wire_precision": "bf16"}, ROUNDED),
    "bf16 and wire, 2": ({"zero_stage": 2, "precision": "bf16", "wire_precision": "bf16"}, ROUNDED),
}


def build_case(options: dict[str, Any]) -> Config:
    return build_tiny_config(
        engine={"kind": "deepspeed", **options}, train={"global_batch": 8, "accumulation": 2}, optim={"clip_norm": 1.0}
    )


def run_options(folder: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A curve, and its second half as a fresh engine does it that goes on from a checkpoint."""
    config = build_case(options)
    engine = build_engine(config, 0)
    skipped = skip_a_step(engine, config) if config.engine.precision == "fp16" else {}
    first = run_steps(engine, config, 0, SAVED_AT)
    saver = Saver(Path(folder), engine, 2, 60)
    saver.save({"step": SAVED_AT})
    curve = torch.cat([first, run_steps(engine, config, SAVED_AT, STEPS)])
    with torch.no_grad():
        dtype = engine.forward(build_batch(4, 0, config), train=False).z_BNE.dtype
    saver.wait()
    torch.distributed.barrier()
    fresh = build_engine(config, 1)
    found, _ = agree_on_checkpoint(Path(folder))
    assert found is not None
    fresh.load(found, read_state(found)["numbers"])
    bits = torch.tensor(torch.finfo(dtype).bits)
    return {"curve": curve, "resumed": run_steps(fresh, config, SAVED_AT, STEPS), "bits": bits, **skipped}


def skip_a_step(engine: Any, config: Config) -> dict[str, torch.Tensor]:
    """A step whose loss scale is far too large; then one that is not."""
    before = engine.copy_share().weights
    engine.scale.value = 2.0**30
    norm = run_steps(engine, config, 0, 1)[0, -1]
    after = engine.copy_share().weights
    changed = torch.tensor(max(float((after[key] - before[key]).abs().max()) for key in before))
    halved = torch.tensor(engine.scale.value / 2.0**30)
    engine.scale.value = 128.0
    return {"skipped": torch.stack([norm, changed, halved])}


def run_all(folder: str) -> dict[str, Any]:
    plain = {"plain": run_options(f"{folder}/plain", {"kind": "torch"})}
    return plain | {name: run_options(f"{folder}/{name}", options) for name, (options, _) in CASES.items()}


def run_two_nodes(folder: str) -> dict[str, Any]:
    """Four ranks that believe they are two nodes of two GPUs."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    assert "zero_hpz_partition_size" in build_deepspeed_config(
        build_case({"zero_stage": 3}), World(0, 4, 0, 2)
    )["zero_optimization"]  # fmt: skip
    return run_options(folder, {"zero_stage": 3})


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("options")
    made = run_ranks(run_all, 2, str(folder))[0]
    made["hierarchical gather"] = run_ranks(run_two_nodes, 4, str(folder / "nodes"))[0]
    return made


@pytest.mark.parametrize("name", [*CASES, "hierarchical gather"])
def test_an_option_trains_the_same_curve(name: str, curves: dict[str, Any]) -> None:
    tolerance = CASES.get(name, ({}, EXACT))[1]
    torch.testing.assert_close(curves[name]["curve"], curves["plain"]["curve"], rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("name", [*CASES, "hierarchical gather"])
def test_an_option_goes_on_from_its_checkpoint(name: str, curves: dict[str, Any]) -> None:
    tolerance = 1e-5 if CASES.get(name, ({}, EXACT))[1] == EXACT else 1e-3
    torch.testing.assert_close(
        curves[name]["resumed"], curves[name]["curve"][SAVED_AT:], rtol=tolerance, atol=tolerance / 10
    )


@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_in_the_precision_that_is_asked_for(name: str, curves: dict[str, Any]) -> None:
    assert curves[name]["bits"] == (32 if CASES[name][0].get("precision", "fp32") == "fp32" else 16)


HOST = {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"precision": "bf16"}, {"torch_autocast": BF16 | {"lower_precision_safe_modules": []}}),
        ({"precision": "bf16", "wire_precision": "bf16"}, {"torch_autocast": BF16}),
        (
            {"precision": "bf16", "wire_precision": "bf16", "zero_stage": 0},
            {"torch_autocast": BF16, "communication_data_type": "bf16"},
        ),
        ({"wire_precision": "bf16"}, {"communication_data_type": "bf16"}),
        ({"gradient_reduction": "reduce"}, {"use_multi_rank_bucket_allreduce": False}),
        ({"gradient_reduction": "all_reduce"}, {"use_multi_rank_bucket_allreduce": True}),
        ({"bucket_mib": 7}, {"reduce_bucket_size": 7 << 18, "stage3_prefetch_bucket_size": 7 << 18}),
        ({"offload": "optimizer"}, {"offload_optimizer": HOST}),
        ({"offload": "all", "zero_stage": 3}, {"offload_optimizer": HOST, "offload_param": HOST}),
    ],
    ids=str,
)
def test_each_option_reaches_deepspeed_and_nothing_else_changes(options: dict[str, Any], asked: dict[str, Any]) -> None:
    stage = options.get("zero_stage", 2)
    made, plain = (
        build_deepspeed_config(build_case({"zero_stage": stage} | words), World(0, 2, 0, 2)) for words in (options, {})
    )
    made, plain = (config.pop("zero_optimization") | config for config in (made, plain))
    assert made == plain | asked


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("fp16")])
def test_an_overflow_leaves_the_step_out_on_all_ranks(name: str, curves: dict[str, Any]) -> None:
    assert curves[name]["skipped"].tolist() == [0, 0, 0.5]


def test_the_loss_scale_falls_at_an_overflow_and_rises_after_2000_good_steps() -> None:
    scale = LossScale(True)
    assert scale.update(torch.tensor(float("inf"))) == 0
    assert scale.value == 2.0**15
    for _ in range(2000):
        assert scale.update(torch.tensor(3.0)) == 3
    assert scale.value == 2.0**16
    other = LossScale(True)
    other.load(scale.read_numbers())
    assert (other.value, other.age) == (2.0**16, 0)


def test_a_loss_scale_that_cannot_fall_reports_the_overflow() -> None:
    scale = LossScale(True)
    scale.value = 1.0
    assert scale.update(torch.tensor(float("nan"))).isnan()
    assert LossScale(False).update(torch.tensor(float("inf"))).isinf()


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"kind": "deepspeed", "zero_stage": 0, "offload": "optimizer"}, "zero_stage=1"),
        ({"kind": "deepspeed", "zero_stage": 2, "offload": "all"}, "zero_stage=3"),
        ({"kind": "torch", "offload": "optimizer"}, "kind=deepspeed"),
        ({"kind": "deepspeed", "zero_stage": 0, "precision": "fp16"}, "zero_stage=1 to 3"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "set engine.precision instead of the raw key bf16"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "set engine.zero_stage instead"),
    ],
)
def test_options_that_do_not_fit_are_one_line(engine: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_tiny_config(engine=engine)


def test_raw_keys_are_merged_not_replaced() -> None:
    raw = {"zero_optimization": {"round_robin_gradients": True}, "wall_clock_breakdown": True}
    made = build_deepspeed_config(build_case({"zero_stage": 2, "deepspeed": raw}), World(0, 2, 0, 2))
    assert made["wall_clock_breakdown"]
    assert made["zero_optimization"]["round_robin_gradients"]
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 100 << 18
