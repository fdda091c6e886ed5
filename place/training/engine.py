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

    def forward(self, batch: Batch, train: bool = True) -> Outputs:
        """Run the model; without gradient where the caller says so with torch.no_grad."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add this rank's gradients; `is_last` marks the last chunk of an optimiser step."""

    def step(self, lr: float) -> Tensor:
        """Average gradients over ranks, clip, update. Returns the gradient norm before clipping."""

    def copy_share(self) -> Share:
        """Copy what this rank saves to host memory, without a collective."""

    def load(self, folder: Path, numbers: dict[str, float]) -> None:
        """Read a checkpoint: the shares of any number of ranks, of any engine. `numbers` are those of a share."""


class TorchEngine:
    """Plain torch: fp32 parameters, gradients averaged over ranks, no sharding. Final."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        self.model, self.device, self.layout = model.to(device), device, read_layout(model)
        self.precision, self.clip_norm = config.engine.precision, config.optim.clip_norm
        self.optimizer = build_optimizer(model, config.optim)
        for tensor in [*model.parameters(), *model.buffers()]:
            if is_distributed():
                dist.broadcast(tensor.data, src=0)

    def forward(self, batch: Batch, train: bool = True) -> Outputs:
        self.model.train(train)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(batch)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if read_world().world > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= read_world().world
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def copy_share(self) -> Share:
        world = read_world()
        pieces = list_whole(self.model)[world.rank :: world.world]
        return copy_share(self.model, pieces, self.optimizer)

    def load(self, folder: Path, numbers: dict[str, float]) -> None:
        load_share(folder, self.model, list_whole(self.model), self.optimizer, numbers)
