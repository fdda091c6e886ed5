"""What steps were like: losses, rates, waits, and which rank the others waited for."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from place.batch import Batch, Losses, Outputs
from place.distributed import gather, gather_objects, mean_over_ranks, read_node
from place.runlog import RunLog
from place.training.gpu import GpuMeter, GpuState
from place.training.gradcache import Objective
from place.training.phases import PHASES, Phases, count_seconds, take_stamp
from place.training.plan import RunPlan
from place.training.saver import Saver

Item = TypeVar("Item")
ARPHRD_INFINIBAND = 32
"""Type of a network card that is IP over InfiniBand. Source: quoted (Linux, if_arp.h)."""
STRAGGLER_SHARE, STRAGGLER_S = 0.2, 0.05
"""A rank is called a straggler when it comes later than its peers by this share of a step, and by so many seconds."""


class Meter:
    """Times, counts and writes what a step was like. Final; a host-device sync only where a line is written.

    Made and called by all ranks alike. A rank's own time in a step is what passes from asking for a batch until its
    features are there, where it first waits for the others (at ZeRO stage 3 it waits earlier, and lags blur).
    """

    def __init__(
        self,
        log: RunLog | None,
        plan: RunPlan,
        device: torch.device,
        saver: Saver,
        phases: Phases | None = None,
        gpu: GpuMeter | None = None,
    ):
        self.log, self.plan, self.device, self.saver = log, plan, device, saver
        self.phases, self.gpu = phases, gpu
        self.counts_bytes = phases is not None and read_node().is_first
        self.samples: list[tuple[int, int, Tensor]] = []
        self.hosts = [record["host"] for record in gather_objects({"host": socket.gethostname()})]
        self.restart()

    def restart(self) -> None:
        """Begin a new interval; what came since the last line counts nowhere."""
        if self.phases:
            self.phases.mark("other")
            self.phases.take()
        self.sent_bytes = _count_sent_bytes() if self.counts_bytes else 0
        self._begin(time.perf_counter())

    def _begin(self, began: float) -> None:
        self.began, self.waited_s, self.steps = began, 0.0, 0
        self._spans: list[tuple[Any, Any]] = []
        self._got: Any = None

    def time_waits(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches; counts the time that the loop waited for them."""
        while True:
            self.mark("other")
            asked = time.perf_counter()
            item = next(batches, None)
            self.waited_s += time.perf_counter() - asked
            self.mark("wait")
            if item is None:
                return
            self._got = take_stamp(self.device)
            yield item

    def time_arrivals(self, objective: Objective) -> Objective:
        """The same objective; notes when this rank comes to it."""

        def timed(outputs: Outputs, batch: Batch) -> Losses:
            self._spans.append((self._got, take_stamp(self.device)))
            self.mark("forward")
            losses = objective(outputs, batch)
            self.mark("loss")
            return losses

        return timed

    def write_rate(self, step: int, epoch: int) -> None:
        """Write how fast batches came to all ranks since the last line, where nothing else is done with them."""
        elapsed_s = mean_over_ranks(torch.tensor([time.perf_counter() - self.began], device=self.device)).item()
        if self.log is not None:
            rate = round(self.steps * self.plan.global_batch / elapsed_s, 2)
            self.log.write_metrics(step, {"epoch": epoch, "samples_per_s": rate})
        self.restart()

    def mark(self, phase: str) -> None:
        """The end of a phase of the step, where phases are timed."""
        if self.phases:
            self.phases.mark(phase)

    def count(self, step: int, epoch: int, batch: Batch) -> None:
        """Note a finished step and which samples it saw."""
        self.steps += 1
        self.samples.append((step, epoch, gather(batch.sample_id_B.to(self.device))))

    def write(self, step: int, epoch: int, losses: Losses, scales: Tensor, lr: float, grad_norm: Tensor) -> None:
        """Write a line of metrics.jsonl and the samples since the last one."""
        means = mean_over_ranks(torch.stack(losses).detach()).tolist()
        # One moment ends this interval and begins the next, for rate and phases alike: what the line costs is in it.
        self.mark("other")
        now = time.perf_counter()
        phases = self._describe_phases()
        own_s = gather(torch.tensor([self._read_own_s()], device=self.device)).tolist()
        state = self.gpu.take() if self.gpu else GpuState(math.nan, math.nan)
        gpus = [GpuState(*row) for row in gather(torch.tensor([state], device=self.device)).tolist()]
        elapsed_s = now - self.began
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
                **phases,
                **describe_gpus(gpus),
            }
            self.log.write_metrics(step, values)
        self.samples.clear()
        self._begin(now)

    def _describe_phases(self) -> dict[str, Any]:
        """Mean seconds a step of each phase, over ranks, and MiB a step that all hosts sent."""
        if self.phases is None:
            return {}
        own, before = self.phases.take(), self.sent_bytes
        self.sent_bytes = _count_sent_bytes() if self.counts_bytes else 0
        sent = self.sent_bytes - before
        values = torch.tensor([[own.get(name, 0.0) for name in PHASES] + [sent]], dtype=torch.float64)
        values = gather(values.to(self.device)).cpu() / max(1, self.steps)
        means = values.mean(0).tolist()
        return {
            "phase_s": {name: round(value, 6) for name, value in zip(PHASES, means) if value},
            "sent_mib": round(float(values[:, -1].sum()) / 2**20, 3),
        }

    def _read_own_s(self) -> float:
        """Mean own time in a step since the last line."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans_s = [count_seconds(got, came) for got, came in self._spans]
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


def describe_gpus(states: list[GpuState]) -> dict[str, float]:
    """`gpu_power_w` of all ranks together and the mean `gpu_utilisation` in %; nothing where one GPU is not read."""
    power_w = sum(state.power_w for state in states)
    if math.isnan(power_w):
        return {}
    share = statistics.fmean(state.utilisation for state in states)
    return {"gpu_power_w": round(power_w, 1), "gpu_utilisation": round(share, 1)}


def _count_sent_bytes(devices: Path = Path("/sys/class")) -> int:
    """What this host's network cards sent so far, past the kernel too: verbs over InfiniBand and RoCE.

    A port of InfiniBand counts whatever it sends, IP over it included, in words of 4 bytes. Source: quoted (Linux,
    Documentation/ABI/stable/sysfs-class-infiniband, port_xmit_data).
    """
    words = [_read_counter(path) for path in devices.glob("infiniband/*/ports/*/counters/port_xmit_data")]
    ip_over_ib = {path.parent.name for path in devices.glob("net/*/type") if _read_counter(path) == ARPHRD_INFINIBAND}
    sent = {name: card.bytes_sent for name, card in psutil.net_io_counters(pernic=True).items()}
    # Bonds, bridges and VLANs count once more what the cards beneath them send; a container may have no card.
    cards = {path.parent.name for path in devices.glob("net/*/device")} or sent.keys() - {"lo"}
    return 4 * sum(words) + sum(sent.get(name, 0) for name in cards - (ip_over_ib if words else set()))


def _read_counter(path: Path) -> int:
    """A number of /sys; 0 where its device does not tell, as a port that is down."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _read_memory_mib(device: torch.device) -> int:
    """Peak device memory, or the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return psutil.Process(os.getpid()).memory_info().rss >> 20
