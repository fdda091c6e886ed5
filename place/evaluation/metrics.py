"""What the loop asks of an engine, and the plain torch engine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from place.batch import Batch, Outputs
from place.config import Config
from place.distributed import is_distributed, read_world
from place.training.optim import build_optimizer
from place.training.state import Layout, Share, copy_share, list_whole, load_share, read_layout


class Engine(Protocol):
    """Model, optimiser and numerics of one training process. Every method is called by all ranks alike."""

    device: torch.device
    layout: Layout
    scale: LossScale

    def forward(self, batch: Batch, train: bool = True) -> Outputs:
        """Run the model; without gradient where the caller says so with torch.no_grad."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add this rank's gradients; `is_last` marks the last chunk of an optimiser step."""

    def step(self, lr: float) -> Tensor:
        """Average gradients over ranks, clip, update.

        Returns:
            The gradient norm before clipping; 0 where fp16 overflowed and the step was left out.
        """

    def copy_share(self) -> Share:
        """Copy what this rank saves to host memory, without a collective."""

    def load(self, folder: Path, numbers: dict[str, float]) -> None:
        """Read a checkpoint: the shares of any number of ranks, of any engine. `numbers` are those of a share."""


class LossScale:
    """Dynamic loss scale of fp16: halved when a gradient overflows, doubled after 2,000 steps without. Final.

    Source: quoted (Micikevicius et al. 2018); start and interval are those of torch.amp.GradScaler.
    """

    def __init__(self, is_dynamic: bool):
        self.is_dynamic, self.value, self.age = is_dynamic, 2.0**16 if is_dynamic else 1.0, 0

    def update(self, norm: Tensor) -> Tensor:
        """Go on from a step whose unscaled gradients had this norm, the same on all ranks; returns the norm to report.

        A norm that is not finite counts as an overflow, 0, while the scale can still fall.
        """
        if not self.is_dynamic:
            return norm
        if not norm.isfinite():
            has_room, self.age, self.value = self.value > 1, 0, max(1.0, self.value / 2)
            return torch.zeros_like(norm) if has_room else norm
        self.age += 1
        if self.age == 2000:
            self.age, self.value = 0, self.value * 2
        return norm

    def read_numbers(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"loss_scale": self.value, "loss_scale_age": self.age} if self.is_dynamic else {}

    def load(self, numbers: dict[str, float]) -> None:
        """Go on with what a checkpoint kept; one of another precision kept nothing."""
        if self.is_dynamic:
            self.value = numbers.get("loss_scale", self.value)
            self.age = int(numbers.get("loss_scale_age", 0))


AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_training(model: nn.Module, train: bool) -> None:
    """Training or evaluation mode, where it changes: the walk through all modules takes milliseconds of a step."""
    if model.training != train:
        model.train(train)


class TorchEngine:
    """Plain torch: fp32 parameters, gradients averaged over ranks, no sharding. Final."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        self.model, self.device, self.layout = model.to(device), device, read_layout(model)
        self.parameters = list(model.parameters())
        self.precision, self.clip_norm = config.engine.precision, config.optim.clip_norm
        self.optimizer, self.scale = build_optimizer(model, config.optim), LossScale(self.precision == "fp16")
        for tensor in [*model.parameters(), *model.buffers()]:
            if is_distributed():
                dist.broadcast(tensor.data, src=0)

    def forward(self, batch: Batch, train: bool = True) -> Outputs:
        set_training(self.model, train)
        with torch.autocast(self.device.type, AUTOCAST[self.precision], enabled=self.precision != "fp32"):
            return self.model(batch)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        (loss * self.scale.value).backward()

    def step(self, lr: float) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if read_world().world > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= read_world().world
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        if self.scale.is_dynamic:
            torch._foreach_div_(gradients, self.scale.value)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.scale.is_dynamic or norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return self.scale.update(norm)

    def copy_share(self) -> Share:
        world = read_world()
        pieces = list_whole(self.model)[world.rank :: world.world]
        return copy_share(self.model, pieces, self.optimizer, self.scale.read_numbers())

    def load(self, folder: Path, numbers: dict[str, float]) -> None:
        self.scale.load(numbers)
        load_share(folder, self.model, self.layout, list_whole(self.model), self.optimizer, numbers)
