"""What `place plan` says: a run's memory at every ZeRO stage, its steps, time, traffic, data; what was assumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from place.cluster.budget import STAGES, Setting, compute_flops, compute_memory, compute_traffic
from place.cluster.scaling import count_work, read_model
from place.cluster.scaling_model import Model, Network, describe_network, predict_interval

from place.config import Config
from place.data.prepared import read_shard_list
from place.training.footprint import Footprint, measure_footprint
from place.training.plan import RunPlan, build_plan

GIB = 1 << 30
# Left to the CUDA context, NCCL's buffers, cuBLAS's workspace and fragmentation.
RESERVE_GIB = 3.0
# One core decodes and transforms so many 256 px JPEGs a second (an AMD EPYC core; place doctor measures yours).
PAIRS_PER_CORE = 600


class Gpu(NamedTuple):
    """Memory, and dense peak rates by precision. Source: NVIDIA's data sheets, SXM where there is a choice."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float


GPUS = {
    "a100-40": Gpu(40, 312, 19.5),
    "a100-80": Gpu(80, 312, 19.5),
    "l40s": Gpu(48, 362, 91.6),
    "h100": Gpu(80, 989, 67),
    "h200": Gpu(141, 989, 67),
}


class Question(NamedTuple):
    """What was asked: `num_samples` of train and validation pairs where data are not prepared yet; `mfu` as a share.

    `scaling`: scaling.json of a ladder, whose model says the time instead of an assumed MFU."""

    gpu: str
    memory_gib: float
    mfu: float
    num_samples: int | None
    num_val_samples: int
    scaling: Path | None = None


def build_forecast(config: Config, question: Question) -> dict[str, Any]:
    """The whole forecast, as JSON.

    Raises:
        UsageError: the model cannot be built, the batch does not fit the world, or there are no data and no count.
    """
    plan, stored = _read_plan(config, question)
    footprint = measure_footprint(config)
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else None
    own = Setting(stage, config.engine.activation_checkpointing, plan.accumulation)
    ladder = read_model(question.scaling) if question.scaling is not None else None
    return {
        "assumed": [*footprint.assumed, _say_speed(question, own, ladder), *_say_source(question)],
        "parameters": {name: part.parameters for name, part in footprint.parts.items()},
        "gflop_per_pair": {name: part.pair_flops / 1e9 for name, part in footprint.parts.items()},
        "plan": plan.model_dump(),
        "memory": [
            {**setting._asdict(), **memory, "is_own": setting == own, "fits": memory["peak_gib"] <= _usable(question)}
            for setting in list_settings(own, plan)
            for memory in [_in_gib(footprint, plan, config, setting)]
        ],
        "usable_gib": _usable(question),
        "traffic_gib": {
            str(each): {name: size / GIB for name, size in compute_traffic(footprint, plan, config, each).items()}
            for each in STAGES
        },
        "time": _compute_time(footprint, plan, config, question, ladder),
        "data": stored,
    }


def list_settings(own: Setting, plan: RunPlan) -> list[Setting]:
    """The run's own setting, every ZeRO stage of it, and what else saves memory: recomputation, more chunks."""
    stages = [own._replace(stage=stage) for stage in STAGES] if own.stage is not None else [own]
    others = [own._replace(recompute=not own.recompute)]
    chunks = [own.accumulation * times for times in (2, 4, 8)]
    others += [own._replace(accumulation=count) for count in chunks if plan.local_batch % count == 0]
    return stages + others


def _read_plan(config: Config, question: Question) -> tuple[RunPlan, dict[str, Any]]:
    """The run plan, and what is stored of the training split."""
    world = config.cluster.num_workers
    if question.num_samples is not None:
        return build_plan(config, world, question.num_samples, question.num_val_samples), {}
    from place.training.start import build_run_plan

    plan = build_run_plan(config, world)
    streams = config.data.list_streams()
    shards = [shard for stream in streams for shard in read_shard_list(stream.path, config.data.train_split)]
    stored = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
    raw = sum(shard["raw_data"]["bytes"] for shard in shards)
    return plan, {"shards": len(shards), "stored_gib": stored / GIB, "cache_gib": raw / GIB}


def _in_gib(footprint: Footprint, plan: RunPlan, config: Config, setting: Setting) -> dict[str, float]:
    memory = compute_memory(footprint, plan, config, setting)
    return {f"{name}_gib": size / GIB for name, size in memory._asdict().items()}


def _compute_time(
    footprint: Footprint, plan: RunPlan, config: Config, question: Question, ladder: tuple[list[Model], Network] | None
) -> dict[str, Any]:
    gpu = GPUS[question.gpu]
    peak = (gpu.bf16_tflops if config.engine.precision != "fp32" else gpu.fp32_tflops) * 1e12
    flops = compute_flops(footprint, plan, config)
    step_s, interval = flops / (plan.world * peak * question.mfu), None
    if ladder is not None:
        models, network = ladder
        work = count_work(config, footprint, plan.world, plan.global_batch)
        terms = describe_network(network, plan.world)
        step_s, *within = predict_interval(models, work["flop_worker"], work["bytes_worker"], *terms)["step"]
        interval = within if len(models) > 1 else None
    rate = plan.local_batch / step_s
    return {
        "tflop_per_step": flops / 1e12,
        "step_s": step_s,
        "step_s_interval": interval,
        "epoch_s": step_s * plan.steps_per_epoch,
        "run_h": step_s * plan.total_steps / 3600,
        "gpu_h": step_s * plan.total_steps * plan.world / 3600,
        "pairs_per_s_worker": rate,
        "loader_cores_worker": math.ceil(rate / PAIRS_PER_CORE),
    }


def _usable(question: Question) -> float:
    return question.memory_gib - RESERVE_GIB


def _say_speed(question: Question, own: Setting, ladder: tuple[list[Model], Network] | None) -> str:
    if ladder is None:
        again = ", in what is computed again too" if own.recompute or own.accumulation > 1 else ""
        return f"MFU {question.mfu:.0%} of {question.gpu}'s peak{again}"
    network = ladder[1]
    return (
        f"the workers and the network ({network.name}, {network.bandwidth_gbit:g} Gbit/s) that {question.scaling} was "
        "measured on"
    )


def _say_source(question: Question) -> list[str]:
    return [] if question.num_samples is None else [f"{question.num_samples:,} training pairs, as given"]
