"""A few training steps of any engine, for tests that compare curves."""

from __future__ import annotations

from typing import Any

import torch
from place.cluster.worker import ENGINES
from tiny import VOCAB, build_batch

from place.batch import Batch
from place.config import Config
from place.distributed import mean_over_ranks, read_world
from place.losses.objective import compute_losses
from place.model.place import build_model
from place.training.gradcache import backward_contrast
from place.training.plan import compute_accumulation

LR, GREY = 1e-3, 1 / 255


def build_engine(config: Config, seed: int) -> Any:
    """The engine of a config over random weights."""
    torch.manual_seed(seed)
    device = torch.device("cpu")
    return ENGINES[config.engine.kind](build_model(config, VOCAB, device)[0], config, device)


def take_rank(batch: Batch) -> Batch:
    """This rank's rows of a global batch."""
    world = read_world()
    return batch.chunks(world.world)[world.rank]


def run_steps(engine: Any, config: Config, first: int, last: int) -> torch.Tensor:
    """Losses and gradient norms of the steps [first, last)."""
    rows = []
    chunks = compute_accumulation(config.train, read_world().world)
    for step in range(first, last):
        batch = take_rank(build_batch(config.train.global_batch, step, config))
        terms, _ = backward_contrast(engine, batch, chunks, lambda o, b: compute_losses(o, b, config.loss, GREY))
        norm = engine.step(LR)
        rows.append(torch.cat([mean_over_ranks(torch.stack(terms).detach()), norm.detach().reshape(1).float()]))
    return torch.stack(rows)
