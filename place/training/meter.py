"""What steps were like: losses, rates, waits, and which rank the others waited for."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor

from place.batch import Batch, Losses, Outputs
from place.distributed import gather, gather_objects, mean_over_ranks
from place.runlog import RunLog
from place.training.gradcache import Objective
from place.training.plan import RunPlan
from place.training.saver import Saver

STRAGGLER_SHARE, STRAGGLER_S = 0.2, 0.05
"""A rank is called a straggler when it comes later than its peers by this share of a step, and by so many seconds."""


class Meter:
    """Times, counts and writes what a step was like. Final; a host-device sync only where a line is written.

    Made and called by all ranks alike. A rank's own time in a step is what passes from asking for a batch until its
    features are there, where it first waits for the others (at ZeRO stage 3 it waits earlier, and lags blur).
    """

    def __init__(self, log: RunLog | None, plan: RunPlan, device: torch.device, saver: Saver):
        self.log, self.plan, self.device, self.saver = log, plan, device, saver
        self.samples: list[tuple[int, int, Tensor]] = []
        self.hosts = [record["host"] for record in gather_objects({"host": socket.gethostname()})]
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.began, self.waited_s, self.steps = time.perf_counter(), 0.0, 0
        self._spans: list[tuple[Any, Any]] = []
        self._got: Any = None

    def time_waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; counts the time that the loop waited for them."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - asked
            if batch is None:
                return
            self._got = self._mark()
            yield batch

    def time_arrivals(self, objective: Objective) -> Objective:
        """The same objective; notes when this rank comes to it."""

        def timed(outputs: Outputs, batch: Batch) -> Losses:
            self._spans.append((self._got, self._mark()))
            return objective(outputs, batch)

        return timed

    def count(self, step: int, epoch: int, batch: Batch) -> None:
        """Note a finished step and which samples it saw."""
        self.steps += 1
        self.samples.append((step, epoch, gather(batch.sample_id_B.to(self.device))))

    def write(self, step: int, epoch: int, losses: Losses, scales: Tensor, lr: float, grad_norm: Tensor) -> None:
        """Write a line of metrics.jsonl and the samples since the last one."""
        means = mean_over_ranks(torch.stack(losses).detach()).tolist()
        own_s = gather(torch.tensor([self._read_own_s()], device=self.device)).tolist()
        elapsed_s = time.perf_counter() - self.began
        if self.log is not None:
            for seen_step, seen_epoch, ids_G in self.samples:
                self.log.write_samples(seen_step, seen_epoch, ids_G.tolist())
            temperatures = (1 / scales).tolist()
            values = {
                "epoch": epoch,
                **dict(zip(Losses._fields, means)),
                "temperature_instance": temperatures[0],
                "temperature_pathology": temperatures[1],
                "grad_norm": float(grad_norm),
                "lr": lr,
                "samples_per_s": round(self.steps * self.plan.global_batch / elapsed_s, 2),
                "data_wait_share": round(self.waited_s / elapsed_s, 4),
                "memory_mib": _read_memory_mib(self.device),
                **describe_lag(own_s, elapsed_s / self.steps, self.hosts),
                **self.saver.take_times(),
            }
            self.log.write_metrics(step, values)
        self.samples.clear()
        self.restart()

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_own_s(self) -> float:
        """Mean own time in a step since the last line."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            spans_s = [got.elapsed_time(came) / 1000 for got, came in self._spans]
        else:
            spans_s = [came - got for got, came in self._spans]
        return (self.waited_s + sum(spans_s)) / max(1, self.steps)


def describe_lag(own_s: list[float], step_s: float, hosts: list[str]) -> dict[str, Any]:
    """How much later than its peers the last rank comes to the exchange of features.

    Args:
        own_s: own seconds a step, by rank.
        step_s: seconds a step takes.
    Returns:
        `lag_s`, and `straggler` with rank and host where the lag is large; nothing for a rank alone.
    Source: ours.
    """
    if len(own_s) == 1:
        return {}
    rank = max(range(len(own_s)), key=own_s.__getitem__)
    lag_s = own_s[rank] - statistics.median_low(own_s)
    is_large = lag_s > max(STRAGGLER_S, STRAGGLER_SHARE * step_s)
    return {"lag_s": round(lag_s, 4), **({"straggler": f"rank {rank} on {hosts[rank]}"} if is_large else {})}


def _read_memory_mib(device: torch.device) -> int:
    """Peak device memory, or the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return psutil.Process(os.getpid()).memory_info().rss >> 20
