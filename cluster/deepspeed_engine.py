"""The DeepSpeed engine behind `place.training.engine.Engine`: ZeRO 0-3 over fp32 parameters."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from place.batch import Batch, Outputs
from place.config import Config, EngineConfig, merge_trees
from place.distributed import World, read_world
from place.training.engine import LossScale, set_training
from place.training.optim import build_optimizer
from place.training.plan import compute_accumulation
from place.training.state import Piece, Share, copy_share, list_whole, load_share, read_layout


class DeepSpeedEngine:
    """ZeRO 0-3 over fp32 parameters, bf16 and fp16 by torch autocast. Final.

    DeepSpeed's own fp16 autocast is not used: each rank scales and skips by what its own partition holds, and gradients
    are clipped before they are unscaled (0.19.8, stage_1_and_2.py, `_optimizer_step`). Here the scale is ours, the same
    on all ranks, handed over by `override_loss_scale`; DeepSpeed unscales, and skips a step by the global norm.
    """

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        deepspeed = _import_deepspeed(device)
        self.device, self.model, self.layout = device, model.to(device), read_layout(model)
        self.stage, self.clip_norm = config.engine.zero_stage, config.optim.clip_norm
        self.scale = LossScale(config.engine.precision == "fp16")
        if config.engine.precision == "fp16":
            # Inside the module: DeepSpeed ends an autocast that it finds around its own call.
            self.model.forward = torch.autocast(device.type, torch.float16)(self.model.forward)
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=build_optimizer(self.model, config.optim),
            model_parameters=[p for p in self.model.parameters() if p.requires_grad],
            config=build_deepspeed_config(config, read_world()),
            dist_init_required=False,
        )

    def forward(self, batch: Batch, train: bool = True) -> Outputs:
        set_training(self.engine, train)
        return self.engine(batch)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        if self.scale.is_dynamic:
            self.engine.optimizer.override_loss_scale(self.scale.value)
        # GradCache's surrogates already hold the gradient of the whole batch: they are summed, not averaged.
        self.engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()

    def step(self, lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._read_norm()
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm()) if norm is None else norm
        return self.scale.update(norm)

    def _read_norm(self) -> Tensor | None:
        """At stage 0 DeepSpeed forgets the norm it clips by; its gradients are whole and averaged at this point."""
        if self.stage:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def copy_share(self) -> Share:
        world, pieces = read_world(), self._list_pieces()
        if not self.stage:
            pieces = pieces[world.rank :: world.world]
        return copy_share(self.model, pieces, self._read_adam(), self.scale.read_numbers())

    def load(self, folder: Path, numbers: dict[str, float]) -> None:
        self.scale.load(numbers)
        zero = self.engine.optimizer
        if self.stage == 3:
            zero.checkpoint_event_prologue()
        load_share(folder, self.model, self.layout, self._list_pieces(), self._read_adam(), numbers)
        if self.stage in (1, 2):
            zero.update_lp_params()
        if self.stage == 3:
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.invalidate_secondary_tensor()
            zero.checkpoint_event_epilogue()

    def _read_adam(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer if self.stage else self.engine.optimizer

    def _list_pieces(self) -> list[Piece]:
        """What this rank updates, and where in DeepSpeed's flat fp32 partitions it lies."""
        if not self.stage:
            return list_whole(self.model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return (_list_pieces_3 if self.stage == 3 else _list_pieces_12)(self.engine.optimizer, names)


def _list_pieces_12(zero: Any, names: dict[int, str]) -> list[Piece]:
    """Stages 1 and 2: a rank's flat partition begins and ends anywhere in a parameter."""
    pieces = []
    for group, owner in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                pieces.append(Piece(names[id(parameter)], start, mapping.lp_fragment_address.numel, owner, offset))
    return pieces


def _list_pieces_3(zero: Any, names: dict[int, str]) -> list[Piece]:
    """Stage 3: each parameter is cut into equal parts, the last one padded."""
    pieces = []
    for parameters, owner in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            start = parameter.partition_numel() * zero._get_param_partition_rank(parameter)
            length = min(parameter.partition_numel(), parameter.ds_numel - start)
            if length > 0:
                pieces.append(Piece(names[id(parameter)], start, length, owner, offset))
            offset += parameter.partition_numel()
    return pieces


def build_deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration from ours, with the raw keys of `engine.deepspeed` merged over it. Source: ours."""
    engine, accumulation = config.engine, compute_accumulation(config.train, world.world)
    ours: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.global_batch // world.world // accumulation,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips at 1.0 unless told otherwise, and computes no norm where it is told 0.
        "gradient_clipping": config.optim.clip_norm or 1e30,
        "zero_optimization": _build_zero_config(engine, world),
        "zero_allow_untested_optimizer": True,
        # Offloading steps with torch's AdamW on the host: DeepSpeed's own would be compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if engine.precision == "bf16":
        modules: dict[str, list[str]] = {} if engine.wire_precision == "bf16" else {"lower_precision_safe_modules": []}
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", **modules}
    # Stage 0 does not look at what autocast says of the wire.
    if engine.wire_precision == "bf16" and (engine.precision != "bf16" or engine.zero_stage == 0):
        ours["communication_data_type"] = "bf16"
    return merge_trees(ours, engine.deepspeed)


def _build_zero_config(engine: EngineConfig, world: World) -> dict[str, Any]:
    """Buckets for a model of some 200 M parameters: DeepSpeed's own of 5e8 elements would hold all of it at once, so
    that nothing overlapped, in two buffers of 2 GB."""
    elements = engine.bucket_mib * (1 << 18)
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": engine.overlap_comm and torch.cuda.is_available(),
        "reduce_bucket_size": elements,
        # gloo's reduce_scatter is an all-reduce inside: there ZeRO 3 calls it by its name, and saves the copies.
        "reduce_scatter": torch.cuda.is_available() or engine.zero_stage != 3,
        "stage3_prefetch_bucket_size": elements,
        "use_multi_rank_bucket_allreduce": engine.gradient_reduction == "all_reduce",
    }
    if engine.zero_stage == 3 and engine.hierarchical_gather and 1 < world.local_world < world.world:
        zero["zero_hpz_partition_size"] = world.local_world
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload != "none":
        zero["offload_optimizer"] = host
    if engine.offload == "all":
        zero["offload_param"] = host
    return zero


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for the device at hand, without its minute-long build of a shared-memory operator on CPU."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.comm.torch

    if device.type == "cpu":
        # Not `deepspeed.comm.torch`: that attribute is torch itself.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
