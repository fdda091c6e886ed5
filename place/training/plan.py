"""What follows from the configuration, the data and the world: derived once, printed and saved."""

from __future__ import annotations

import math

from pydantic import BaseModel

from place.config import Config, TrainConfig, UsageError


class RunPlan(BaseModel, frozen=True):
    """Numbers that nobody sets: batches in pairs, lengths in optimiser steps."""

    world: int
    num_samples: int
    global_batch: int
    local_batch: int
    accumulation: int
    micro_batch: int
    steps_per_epoch: int
    dropped_per_epoch: int
    epochs: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    num_val_samples: int
    val_local_batch: int
    val_steps: int

    def compute_lr(self, step: int, min_ratio: float) -> float:
        """Learning rate of optimiser step `step` (from 0): linear warm-up, then cosine to `min_ratio` of the peak."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak_lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def compute_accumulation(train: TrainConfig, world: int) -> int:
    """Chunks of a worker's share: the least number that divides it and keeps to both limits of the config.

    A run that goes on with other workers holds no more pairs at once than before, and as accumulation changes no
    gradient (GradCache), its curve stays the same.

    Raises:
        UsageError: the global batch does not divide over the workers, or holds too few pairs.
    Source: ours.
    """
    if train.global_batch % world:
        raise UsageError(
            f"train.global_batch={train.global_batch} is not divisible by {world} workers; choose a multiple of "
            f"{world}, or another number of workers"
        )
    local = train.global_batch // world
    most = train.max_micro_batch or local
    for chunks in range(train.accumulation, local + 1):
        if local % chunks == 0 and local // chunks <= most:
            return chunks
    raise UsageError(
        f"train.accumulation={train.accumulation} is more than the {local} pairs of each of {world} workers; lower it"
    )


def build_plan(config: Config, world: int, num_samples: int, num_val_samples: int) -> RunPlan:
    """Derive batches, steps and the learning rate.

    Raises:
        UsageError: the global batch does not divide over workers, or is larger than the data set.
    Source: ours; square-root scaling is inferred (Krizhevsky 2014, Malladi et al. 2022 for Adam).
    """
    train, optim = config.train, config.optim
    accumulation = compute_accumulation(train, world)
    steps_per_epoch = num_samples // train.global_batch
    if not steps_per_epoch:
        raise UsageError(
            f"train.global_batch={train.global_batch} is larger than the {num_samples} samples of split "
            f"'{config.data.train_split}'; choose a smaller one"
        )
    total = steps_per_epoch * train.epochs
    total = min(total, train.max_steps or total)
    ratio = train.global_batch / optim.base_batch
    scaled = {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[optim.lr_scaling]
    val_batch = compute_val_batch(train.global_batch, num_val_samples)
    if val_batch % world:
        raise UsageError(
            f"split '{config.data.val_split}' has {num_val_samples} pairs, {val_batch} a batch (the largest divisor of "
            f"train.global_batch={train.global_batch}), which {world} workers cannot share; take a number of workers "
            f"that divides {val_batch}, a larger validation split, or data.val_split=none"
        )
    return RunPlan(
        world=world,
        num_samples=num_samples,
        global_batch=train.global_batch,
        local_batch=train.global_batch // world,
        accumulation=accumulation,
        micro_batch=train.global_batch // world // accumulation,
        steps_per_epoch=steps_per_epoch,
        dropped_per_epoch=num_samples - steps_per_epoch * train.global_batch,
        epochs=math.ceil(total / steps_per_epoch),
        total_steps=total,
        warmup_steps=max(1, round(total * optim.warmup_ratio)),
        peak_lr=optim.lr * scaled,
        num_val_samples=num_val_samples,
        val_local_batch=val_batch // world,
        val_steps=min(config.train.max_val_batches, num_val_samples // val_batch) if val_batch else 0,
    )


def compute_val_batch(global_batch: int, num_val_samples: int) -> int:
    """Pairs of a validation batch over all workers: the global batch, or its largest divisor that the split fills.

    The loss contrasts what is in a batch, so that it must not hang on the number of workers. 0 below two pairs: there
    is nothing to contrast.
    Source: ours.
    """
    return max((d for d in range(2, min(global_batch, num_val_samples) + 1) if global_batch % d == 0), default=0)
