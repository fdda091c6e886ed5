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
from place.config import Config, RunError
from place.distributed import read_world
from place.training.optim import build_optimizer


class DeepSpeedEngine:
    """ZeRO 0-3, fp32 parameters and gradients on the wire, bf16 by torch autocast. Final."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        deepspeed = _import_deepspeed(device)
        self.device, self.model = device, model.to(device)
        self.stage, self.clip_norm = config.engine.zero_stage, config.optim.clip_norm
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=build_optimizer(self.model, config.optim),
            model_parameters=[p for p in self.model.parameters() if p.requires_grad],
            config=build_deepspeed_config(config, read_world().world),
            dist_init_required=False,
        )

    def forward(self, batch: Batch, train: bool = True) -> Outputs:
        self.engine.train(train)
        return self.engine(batch)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        # GradCache's surrogates already hold the gradient of the whole batch: they are summed, not averaged.
        self.engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()

    def step(self, lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._read_norm()
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm()) if norm is None else norm

    def _read_norm(self) -> Tensor | None:
        """At stage 0 DeepSpeed forgets the norm it clips by; its gradients are whole and averaged at this point."""
        if self.stage:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)

    def load(self, folder: Path) -> None:
        if not (folder / "deepspeed").is_dir():
            raise RunError(f"{folder} was not written by engine.kind=deepspeed; resume with the engine that wrote it")
        self.engine.load_checkpoint(str(folder / "deepspeed"), tag="state")

    def read_weights(self) -> dict[str, Tensor]:
        if self.stage == 3:
            return self.engine._zero3_consolidated_16bit_state_dict() or {}
        return {name: tensor.detach().cpu() for name, tensor in self.engine.module.state_dict().items()}


def build_deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration from ours, with the raw keys of `engine.deepspeed` laid over it. Source: ours."""
    micro_batch = config.train.global_batch // world // config.train.accumulation
    ours: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.train.accumulation,
        # DeepSpeed clips at 1.0 unless told otherwise, and computes no norm where it is told 0.
        "gradient_clipping": config.optim.clip_norm or 1e30,
        "zero_optimization": {"stage": config.engine.zero_stage, "overlap_comm": torch.cuda.is_available()},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.engine.precision == "bf16":
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {**ours, **config.engine.deepspeed}


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
