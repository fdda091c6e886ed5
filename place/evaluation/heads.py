"""Training of a head on an encoder's tokens, or of both: stopped on the validation split, the best weights kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from place.config import HeadConfig, RunError

CPU = torch.device("cpu")
Head = TypeVar("Head", bound=nn.Module)


class Schedule(NamedTuple):
    """At most `max_steps` of `batch_size`, a look at validation `every` so many and after the last, an end after
    `patience` in vain."""

    max_steps: int
    every: int
    patience: int
    batch_size: int
    lr: float
    weight_decay: float

    def describe(self) -> str:
        """When training stops, in words."""
        return (
            f"at the least validation loss of at most {self.max_steps} steps, a look every {self.every}, "
            f"patience of {self.patience} looks"
        )

    def count_steps(self, kept: int) -> int:
        """Steps that were taken where the weights of step `kept` are the best."""
        return min(self.max_steps, kept + self.patience * self.every)


class Training(NamedTuple):
    """What a training was given and where it stopped: its schedule, its images, and the step that was kept."""

    schedule: Schedule
    num_images: int
    kept: int

    def count_draws(self) -> int:
        """Images that its steps saw, each as often as it was drawn."""
        return self.schedule.count_steps(self.kept) * min(self.schedule.batch_size, self.num_images)

    def count_passes(self) -> float:
        """How often it went through its images."""
        return self.count_draws() / self.num_images


def build_schedule(config: HeadConfig) -> Schedule:
    """What a section says, with a look at validation once at least."""
    every = min(config.look_every_steps, config.max_steps)
    return Schedule(config.max_steps, every, config.patience, config.batch_size, config.lr, config.weight_decay)


def describe_limit(most: int | None) -> str:
    """How `evaluation.max_train_images` chose, in words."""
    return "all of them" if most is None else f"at most {most}, first by hash"


def describe_passes(trainings: Sequence[Training], section: str) -> dict[str, Any]:
    """For a protocol: passes of each training through its images, and a note on the one with the fewest if that is less
    than one.

    Args:
        section: of `evaluation`, which has their settings.
    """
    least = min(trainings, key=Training.count_passes)
    told: dict[str, Any] = {"passes": [round(training.count_passes(), 2) for training in trainings]}
    ran_out = least.schedule.count_steps(least.kept) == least.schedule.max_steps
    setting = f"evaluation.{section}.{'max_steps' if ran_out else 'patience'}"
    notes = note_short_training(least.count_draws(), least.num_images, setting)
    return told | ({"notes": notes} if notes else {})


def note_short_training(draws: int, num_images: int, setting: str) -> list[str]:
    """A note where a training drew fewer images than it has, and what to raise; else none."""
    if draws >= num_images:
        return []
    return [f"trained on {draws:,} draws of {num_images:,} images, less than once through them; raise {setting}"]


def build_seeded(build: Callable[[], Head], seed: int) -> Head:
    """Build a head from weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def train_on_tokens(
    head: Head,
    compute_loss: Callable[[Tensor], Tensor],
    compute_val_loss: Callable[[], float],
    num_images: int,
    schedule: Schedule,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
    groups: list[dict[str, Any]] | None = None,
) -> tuple[Head, int]:
    """Train a head by AdamW on random images.

    Args:
        groups: its parameters with learning rates and decays of their own; none takes the schedule's for all.
        compute_loss: of the images (rows, int64) of a batch.
        compute_val_loss: of the whole validation split; called in eval mode, without gradients.
    Returns:
        The head in eval mode, and the step that its weights are of.
    Raises:
        RunError: see `check_trained`.
    """
    rng = np.random.default_rng(seed)
    trained = head.parameters() if groups is None else groups
    optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=schedule.weight_decay)
    best, best_step, kept = math.inf, 0, head.state_dict()
    for step in range(1, schedule.max_steps + 1):
        head.train()
        loss = compute_loss(torch.from_numpy(rng.integers(num_images, size=min(schedule.batch_size, num_images))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % schedule.every == 0 or step == schedule.max_steps:
            head.eval()
            with torch.no_grad():
                val_loss = compute_val_loss()
            if val_loss < best:
                best, best_step, kept = val_loss, step, {k: v.clone() for k, v in head.state_dict().items()}
            if on_progress:
                on_progress(step)
            if step - best_step >= schedule.patience * schedule.every:
                break
    check_trained(best, step, "the head")
    head.load_state_dict(kept)
    return head.eval(), best_step


def check_trained(best: float, steps: int, what: str) -> None:
    """Refuse weights whose validation loss was never finite. Raises RunError."""
    if not math.isfinite(best):
        raise RunError(
            f"{what}: training diverged, no finite validation loss in {steps} steps; lower its learning rate, lr in "
            "its section of evaluation"
        )
