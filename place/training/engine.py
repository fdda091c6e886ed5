"""What the loop asks of an engine, and the plain torch engine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from place.batch import Batch, Outputs
from place.config import Config, RunError
from place.distributed import is_distributed, read_world
from place.training.optim import build_optimizer


class Engine(Protocol):
    """Model, optimiser and numerics of one training process. Every method is called by all ranks alike."""

    device: torch.device

    def forward(self, batch: Batch, train: bool = True) -> Outputs:
        """Run the model; without gradient where the caller says so with torch.no_grad."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add this rank's gradients; `is_last` marks the last chunk of an optimiser step."""

    def step(self, lr: float) -> Tensor:
        """Average gradients over ranks, clip, update. Returns the gradient norm before clipping."""

    def save(self, folder: Path) -> None:
        """Write what a resumed engine needs."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, by the same number of ranks."""

    def read_weights(self) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU; only rank 0 may rely on them."""


class TorchEngine:
    """Plain torch: fp32 parameters, gradients averaged over ranks, no sharding. Final."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        self.model, self.device = model.to(device), device
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

    def save(self, folder: Path) -> None:
        if read_world().is_first:
            torch.save(
                {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "engine.pt"
            )

    def load(self, folder: Path) -> None:
        path = folder / "engine.pt"
        if not path.is_file():
            raise RunError(f"{folder} was not written by engine.kind=torch; resume with the engine that wrote it")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def read_weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
