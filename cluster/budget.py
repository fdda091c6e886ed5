"""Memory, traffic and FLOPs of a run before it costs anything: arithmetic on a measured footprint."""

from __future__ import annotations

from typing import Any, NamedTuple

from place.cluster.deepspeed_engine import build_deepspeed_config
from place.kernels.contrast import TILE_COLUMNS, TILE_ROWS, TILED_FROM_PAIRS

from place.config import Config
from place.distributed import World
from place.training.footprint import Footprint
from place.training.plan import RunPlan

FP32 = 4
STAGES = (0, 1, 2, 3)
# DeepSpeed 0.19.8, runtime/zero/config.py, in elements: a bucket; at stage 3 fetched ahead, kept live, kept whole.
DEFAULT_BUCKET, DEFAULT_PREFETCH, DEFAULT_LIVE, DEFAULT_PERSISTENT = 500_000_000, 50_000_000, 1_000_000_000, 100_000
# A matrix of logits with its mask, log-softmax and their gradients, in both directions: bytes a pair of row and column.
LOGIT_BYTES = 32


class Setting(NamedTuple):
    """What memory depends on beside the model: ZeRO stage (None: torch engine), recomputation, chunks of a share."""

    stage: int | None
    recompute: bool
    accumulation: int
    on_gpu: bool = True


class Memory(NamedTuple):
    """Bytes of a worker by what holds them, and the largest sum that is held at one moment."""

    weights: int
    master: int
    optimiser: int
    gradients: int
    buckets: int
    activations: int
    features: int
    losses: int
    working: int
    peak: int


def compute_memory(footprint: Footprint, plan: RunPlan, config: Config, setting: Setting) -> Memory:
    """Memory of one worker; the peak is the largest of a step's moments, not the sum of the columns.

    Source: ours; what the engines hold is read from TorchEngine and from DeepSpeed 0.19.8 (engine.py,
        runtime/zero/stage_1_and_2.py, stage3.py); tests/cluster/test_memory_plan.py measures.
    """
    stage, chunked = setting.stage, setting.accumulation > 1
    size = FP32 * footprint.parameters
    share = size // plan.world if stage else size
    micro = plan.local_batch // setting.accumulation
    held = {name: part.count_held(micro) for name, part in footprint.parts.items()}
    # On a GPU the next batch is copied while this one trains.
    inputs = plan.local_batch * footprint.input_bytes * (2 if setting.on_gpu else 1)
    parts = {
        "weights": share + _count_gathered(footprint, config, plan) if stage == 3 else size,
        "master": share if stage else 0,
        "optimiser": 2 * share,
        # Stage 1 sends gradients with the last chunk only, and so long holds all of them.
        "gradients": share if stage in (2, 3) or (stage == 1 and not chunked) else size,
        "buckets": _count_buckets(footprint, config, plan, stage, setting.on_gpu),
        "activations": sum(held.values()),
        "features": inputs + (2 * plan.local_batch * footprint.output_bytes if chunked else 0),
        "losses": _count_losses(footprint, config, plan),
        # The gradient of the widest activation, and of what it was made from.
        "working": 2 * micro * footprint.largest_bytes,
    }
    if config.engine.offload != "none" and stage:
        # In host memory, where the optimiser steps too.
        parts |= {"master": 0, "optimiser": 0}
    kept = sum(parts[name] for name in ("weights", "master", "optimiser", "features"))
    if setting.recompute:
        parts["activations"] = held["heads"] + max(held["vision"], held["text"])
    backward = parts["buckets"] + max(_list_backward(footprint, held, parts, setting))
    return Memory(**parts, peak=kept + max(backward, _count_update(parts, share, plan, setting)))


def _list_backward(footprint: Footprint, held: dict[str, int], parts: dict[str, int], setting: Setting) -> list[int]:
    """Activations and gradients at the turns of a backward pass: heads first, then text, then vision."""
    shares = {n: parts["gradients"] * part.parameters // footprint.parameters for n, part in footprint.parts.items()}
    # The gradients of an earlier chunk are there from the start; stage 3 has room for them all along.
    chunked = setting.accumulation > 1
    before = parts["gradients"] if chunked or setting.stage == 3 else 0
    after_heads, after_text = before or shares["heads"], before or shares["heads"] + shares["text"]
    working, losses = parts["working"], 0 if chunked else parts["losses"]
    encoders = 0 if setting.recompute else held["vision"] + held["text"]
    return [
        before + encoders + held["heads"] + max(losses, working),
        after_heads + (encoders or held["text"]) + working,
        after_text + held["vision"] + working,
        # GradCache takes the loss over all features before any chunk's gradient.
        parts["losses"],
    ]


def _count_update(parts: dict[str, int], share: int, plan: RunPlan, setting: Setting) -> int:
    """What the optimiser's step holds beside what is kept: gradients, their copies, AdamW's intermediate results."""
    if setting.stage == 3:
        return parts["gradients"] + parts["buckets"] + 2 * share
    if setting.stage:
        return 4 * share + (parts["buckets"] if setting.stage == 2 else 0)
    sent = parts["buckets"] if setting.stage == 0 else (share if plan.world > 1 else 0)
    # On a GPU torch's AdamW takes all tensors at once.
    return parts["gradients"] + max(sent, share if setting.on_gpu else 0)


def _count_buckets(footprint: Footprint, config: Config, plan: RunPlan, stage: int | None, on_gpu: bool) -> int:
    """What DeepSpeed sends gradients from, and at stage 3 gathers weights into."""
    if stage is None:
        return 0
    size = FP32 * footprint.parameters
    if stage == 0:
        return min(size, FP32 * DEFAULT_BUCKET)
    zero = read_zero(config, plan, stage)
    bucket = FP32 * int(zero.get("reduce_bucket_size", DEFAULT_BUCKET))
    if stage == 3:
        # Beside the bucket stand the gradients that wait for it to fill.
        return bucket + min(size, bucket)
    # Where it plans for GPUs, this machine may have none.
    return bucket * (2 if config.engine.overlap_comm and on_gpu else 1)


def _count_gathered(footprint: Footprint, config: Config, plan: RunPlan) -> int:
    """Whole weights at stage 3: all of a model that is smaller than what DeepSpeed keeps for the next use."""
    zero = read_zero(config, plan, 3)
    keeps = min(int(zero.get(f"stage3_max_{name}", DEFAULT_LIVE)) for name in ("live_parameters", "reuse_distance"))
    ahead = int(zero.get("stage3_prefetch_bucket_size", DEFAULT_PREFETCH)) + 2 * max(footprint.sizes)
    small = footprint.count_small(int(zero.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENT)))
    if footprint.parameters <= keeps:
        return FP32 * footprint.parameters
    return FP32 * min(footprint.parameters, small + max(keeps, ahead))


def read_zero(config: Config, plan: RunPlan, stage: int) -> dict[str, Any]:
    """The zero_optimization section that the engine would be given at this stage."""
    engine = config.engine.model_copy(update={"zero_stage": stage})
    return build_deepspeed_config(config.model_copy(update={"engine": engine}), World(0, plan.world, 0, 1))[
        "zero_optimization"
    ]


def _count_losses(footprint: Footprint, config: Config, plan: RunPlan) -> int:
    """What each contrastive loss of the run holds, and the features gathered for it with their gradients."""
    loss, width = config.loss, config.model.joint_width
    instance = _count_logits(plan.local_batch, plan.global_batch) + 4 * plan.global_batch * width * FP32
    return (
        (instance if loss.instance.weight else 0)
        + (_count_pathology(config, plan) if loss.pathology.weight else 0)
        + (_count_words(footprint, config, plan) if loss.tokens.weight else 0)
    )


def _count_pathology(config: Config, plan: RunPlan) -> int:
    width, sentences = config.model.joint_width, config.data.max_sentences
    columns = plan.global_batch if config.loss.pathology.negatives == "global" else plan.local_batch
    pathology = _count_logits(plan.local_batch * sentences, columns * sentences)
    gathered = 4 * columns * sentences * width * FP32
    if config.loss.pathology.search:
        queries = config.model.observations.num_queries
        pathology += 2 * _count_logits(plan.local_batch * sentences, plan.global_batch * queries)
        gathered += 2 * plan.global_batch * (sentences + queries) * width * FP32
    return pathology + gathered


def _count_words(footprint: Footprint, config: Config, plan: RunPlan) -> int:
    """Every word's attention over the patches of every image of this rank, and what it reads there.

    At the most the attention with six tensors as wide as the joint space, or, later in the backward pass, the attention
    with its gradient and that of its logits. Source: ours; tests/cluster/test_memory_plan.py measures.
    """
    width, words = config.model.joint_width, plan.global_batch * config.data.max_tokens
    pairs = plan.local_batch * words
    held = max(footprint.patches + 6 * width, 3 * footprint.patches)
    return FP32 * (pairs * held + 4 * words * width)


def _count_logits(rows: int, columns: int) -> int:
    pairs = rows * columns
    return LOGIT_BYTES * (pairs if pairs < TILED_FROM_PAIRS else TILE_ROWS * TILE_COLUMNS)


def compute_traffic(footprint: Footprint, plan: RunPlan, config: Config, stage: int | None) -> dict[str, int]:
    """Bytes a worker sends in a step, at the bound of each collective that is called (a ring): N - 1 of N parts.

    Source: quoted (Rajbhandari et al. 2020, ZeRO, section 7) for the stages; DeepSpeed's 1 and 2 all-reduce whole
        buckets unless engine.gradient_reduction=reduce.
    """
    engine, share = config.engine, (plan.world - 1) / plan.world
    size = share * FP32 * footprint.parameters
    wire = size / 2 if engine.wire_precision == "bf16" and stage is not None else size
    # Stages 2 and 3 share out the gradients of every chunk, stage 3 gathers weights for each.
    rounds = plan.accumulation if stage in (2, 3) else 1
    gradients, weights = 2 * wire, 0.0
    if stage in (1, 2):
        gradients, weights = wire * rounds * (2 if engine.gradient_reduction == "all_reduce" else 1), size
    if stage == 3:
        passes = 2 * rounds + (rounds if rounds > 1 else 0)  # GradCache encodes each chunk once more
        gathered = size / 2 if engine.wire_precision == engine.precision == "bf16" else size
        gradients, weights = wire * rounds, passes * gathered
    width, sentences = config.model.joint_width, config.data.max_sentences
    per_pair = 2 * width * FP32 if config.loss.instance.weight else 0
    if config.loss.pathology.weight and config.loss.pathology.negatives == "global":
        per_pair += 2 * sentences * width * FP32
    if config.loss.pathology.weight and config.loss.pathology.search:
        per_pair += (sentences + config.model.observations.num_queries) * width * FP32
    if config.loss.tokens.weight:
        # Words, and the scores of an image with every report.
        per_pair += (config.data.max_tokens * width + plan.global_batch) * FP32
    # Gathered forward, and their gradients summed and scattered backward.
    features = 2 * share * plan.global_batch * per_pair
    return {"gradients": int(gradients), "weights": int(weights), "features": int(features)}


def compute_flops(footprint: Footprint, plan: RunPlan, config: Config, recomputed: bool = True) -> int:
    """FLOPs of all workers in a step: forward, twice that backward, and what is computed again.

    Args:
        recomputed: False leaves out what is computed again, as MFU does (HFU counts it).
    Source: the factor 3 is quoted (Kaplan et al. 2020, section 2.1); the losses' products are counted with it, those of
        the patch correlations by their definition, whose target has no gradient. That MFU leaves recomputation out:
        quoted (Chowdhery et al. 2022, PaLM, appendix B). tests/cluster/test_memory_plan.py counts a step.
    """
    model = sum(part.pair_flops for part in footprint.parts.values())
    encoders = footprint.parts["vision"].pair_flops + footprint.parts["text"].pair_flops
    again = (model if plan.accumulation > 1 else 0) + (encoders if config.engine.activation_checkpointing else 0)
    width, rows = config.model.joint_width, plan.global_batch
    logits = 4 * rows * rows * width if config.loss.instance.weight else 0
    if config.loss.pathology.weight:
        sentences, queries = config.data.max_sentences, config.model.observations.num_queries
        columns = {"global": rows, "rank": plan.local_batch, "study": 1}[config.loss.pathology.negatives]
        logits += 4 * rows * columns * sentences**2 * width
        if config.loss.pathology.pairing == "soft":
            logits += 4 * rows * sentences * queries * width
        if config.loss.pathology.search:
            logits += 4 * rows * rows * sentences * queries * width
    if config.loss.tokens.weight:
        logits += 4 * rows * rows * config.data.max_tokens * footprint.patches * width
    correlations = 0
    if config.loss.correlation.weight:
        # One product for each matrix, and two backward for that of z.
        correlations = 2 * rows * footprint.patches**2 * (3 * config.model.correlation.width + footprint.target_width)
    return plan.global_batch * (3 * model + (again if recomputed else 0)) + 3 * logits + correlations
