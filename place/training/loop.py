"""The training loop: fetch, forward, objective, backward, step, log, evaluate, save, in that order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from place.batch import Batch, Losses
from place.config import Config, RunError
from place.data.loader import PairLoader
from place.distributed import is_distributed, mean_over_ranks, read_world
from place.runlog import RunLog
from place.training.engine import Engine
from place.training.gpu import GpuMeter
from place.training.gradcache import Objective, backward_contrast
from place.training.meter import Meter
from place.training.phases import Phases
from place.training.plan import RunPlan
from place.training.profile import StepProfiler
from place.training.saver import Saver
from place.training.start import describe_lineage
from place.training.stop import is_asked
from place.training.transfer import send_ahead
from place.training.watchdog import Watchdog


class Progress(dict[str, Any]):
    """Where a run stands: `step` (steps done), `best_val` and `best_step` (None at first); saved as JSON."""


def train(
    config: Config,
    plan: RunPlan,
    engine: Engine,
    loader: PairLoader,
    val_loader: PairLoader | None,
    objective: Objective,
    log: RunLog | None,
    watchdog: Watchdog,
    progress: Progress,
    phases: Phases | None = None,
    gpu: GpuMeter | None = None,
) -> str:
    """Train to the end of the plan or until asked to stop.

    Args:
        log: on rank 0, None elsewhere.
        watchdog: ends this process when a step hangs.
        progress: where to begin; kept up to date.
        phases: where the time of a step is counted, if it is.
        gpu: reads power and utilisation of this rank's GPU, where that is possible.
    Returns:
        `done` or `stopped`.
    Raises:
        RunError: the loss is not finite (names the last good checkpoint), a shard is damaged, or a checkpoint could
            not be written.
    """
    run_dir, world = Path(config.run.dir), read_world()
    saver = Saver(run_dir, engine, config.train.keep_checkpoints, config.cluster.timeout_s)
    meter = Meter(log, plan, engine.device, saver, phases, gpu)
    profiler = StepProfiler(config.run, world.rank, progress["step"], engine.device)
    timed = meter.time_arrivals(objective)
    vote, stopping = _Vote(engine.device), False
    watchdog.feed()  # the first batch may not come
    batches = loader.read_steps(progress["step"], plan.total_steps, plan.steps_per_epoch, world.world)
    if config.run.probe == "synthetic":
        batches = itertools.repeat(next(batches))
    elif config.run.probe == "loader":
        return _read_only(plan, batches, meter, watchdog, config.run.log_every_steps)
    on_their_way = send_ahead(batches, engine.device)
    while progress["step"] < plan.total_steps and not stopping:
        epoch, first_step = divmod(progress["step"], plan.steps_per_epoch)
        last_step = min(plan.steps_per_epoch, plan.total_steps - epoch * plan.steps_per_epoch)
        for sent in meter.time_waits(itertools.islice(on_their_way, last_step - first_step)):
            watchdog.feed()
            seed_step(config.run.seed, progress["step"], world.rank)
            batch = sent.receive()
            meter.mark("copy")
            losses, scales = backward_contrast(engine, batch, plan.accumulation, timed)
            meter.mark("backward")
            lr = plan.compute_lr(progress["step"], config.optim.min_lr_ratio)
            grad_norm = engine.step(lr)
            meter.mark("optimiser")
            saver.check()
            profiler.step()
            progress["step"] += 1
            step = progress["step"]
            meter.count(step, epoch, batch)
            ends_epoch = step % plan.steps_per_epoch == 0 or step == plan.total_steps
            is_due = step % config.train.checkpoint_every_steps == 0
            stopping = vote.take(world.is_first and is_asked(run_dir))
            if step % config.run.log_every_steps == 0 or is_due or stopping or ends_epoch:
                meter.write(step, epoch, losses, scales, lr, grad_norm)
                values = mean_over_ranks(torch.stack([losses.total.detach(), grad_norm.to(losses.total)])).tolist()
                _check_finite({"loss": values[0], "gradient norm": values[1]}, step, run_dir, saver)
            if (stopping or is_due) and not ends_epoch:
                meter.mark("other")
                saver.save({**progress, **describe_lineage(config, plan), "world": plan.world})
                meter.mark("checkpoint")
            if stopping and not ends_epoch:
                saver.wait()
                profiler.close()
                return "stopped"
        is_best, is_last = False, progress["step"] == plan.total_steps
        if val_loader is not None and ((epoch + 1) % config.train.evaluate_every_epochs == 0 or is_last):
            value = evaluate_loss(plan, engine, val_loader, objective, epoch, log, watchdog, progress["step"])
            _check_finite({"validation loss": value}, progress["step"], run_dir, saver)
            is_best = progress["best_val"] is None or value < progress["best_val"]
            if is_best:
                progress.update(best_val=value, best_step=progress["step"])
        if is_best or is_last or stopping or progress["step"] % config.train.checkpoint_every_steps == 0:
            saver.save({**progress, **describe_lineage(config, plan), "world": plan.world})
        meter.restart()
    saver.wait()
    profiler.close()
    return "done" if progress["step"] == plan.total_steps else "stopped"


def _read_only(plan: RunPlan, batches: Iterator[Batch], meter: Meter, watchdog: Watchdog, every: int) -> str:
    """Read every batch and train nothing: the rate at which data come."""
    for step, _ in enumerate(meter.time_waits(batches), start=1):
        watchdog.feed()
        meter.steps += 1
        if step % every == 0:
            meter.write_rate(step, (step - 1) // plan.steps_per_epoch)
    return "done"


def evaluate_loss(
    plan: RunPlan,
    engine: Engine,
    loader: PairLoader,
    objective: Objective,
    epoch: int,
    log: RunLog | None,
    watchdog: Watchdog,
    step: int,
) -> float:
    """Mean losses over the validation split, logged; returns the total."""
    totals: list[Tensor] = []
    with torch.no_grad():
        for batch in loader.read_epoch(epoch, 0, plan.val_steps, plan.world):
            watchdog.feed()
            batch = batch.to(engine.device)
            outputs = engine.forward(batch, train=False)
            if log is not None and not totals and outputs.attention_BKN.shape[1]:
                log.write_attention(step, outputs.attention_BKN[0].tolist())
            totals.append(torch.stack(objective(outputs, batch)))
    means = mean_over_ranks(torch.stack(totals).mean(0)).tolist()
    if log is not None:
        log.write_metrics(step, {"epoch": epoch, **{f"val_{name}": v for name, v in zip(Losses._fields, means)}})
    return means[0]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and masks of a step depend on (seed, step, rank) alone, so that a resumed run draws the same ones."""
    value = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    # Not torch.manual_seed: it asks every backend that torch knows of, 2 ms of a step on a slow core.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


class _Vote:
    """What one rank wants, known to all of them at their next step, so that no step waits for the device. Final."""

    def __init__(self, device: torch.device):
        self.device = device
        self._cast: tuple[Tensor, torch.cuda.Event | None] | None = None

    def take(self, flag: bool) -> bool:
        """Cast this rank's vote; returns whether any rank's was true in the step before, or this one where it is alone.

        Called by all ranks alike.
        """
        if not is_distributed():
            return flag
        before = self._cast
        votes = torch.full((1,), float(flag), device=self.device)
        dist.all_reduce(votes)
        host, event = torch.empty(1, pin_memory=votes.is_cuda), None
        host.copy_(votes, non_blocking=True)
        if votes.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._cast = host, event
        if before is None:
            return False
        if before[1] is not None:
            before[1].synchronize()
        return bool(before[0])


def _check_finite(values: dict[str, float], step: int, run_dir: Path, saver: Saver) -> None:
    if all(math.isfinite(value) for value in values.values()):
        return
    saver.wait()
    latest = run_dir / "checkpoints" / "latest"
    good = latest.read_text().strip() if latest.is_file() else "none"
    said = ", ".join(f"{name} {value:g}" for name, value in values.items())
    raise RunError(
        f"{said} at step {step}: not finite; last good checkpoint: {good}; lower optim.lr or check the data, "
        "then start again with run.resume=auto"
    )
