"""Where the time of a step goes: phases that follow each other without a gap, and what collectives took within them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

PHASES = (
    "wait",
    "copy",
    "forward",
    "gather",
    "loss",
    "backward",
    "communication",
    "optimiser",
    "checkpoint",
    "other",
)
"""In the order of a step; they sum to it. With several chunks a step their second passes count as backward."""
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all",
    "all_to_all_single",
    "scatter",
    "gather",
    "barrier",
)
"""What torch.distributed is asked for by us, by DeepSpeed, and by the backward pass of torch's own all_gather with
gradient (torch.distributed.nn.functional): with gloo a scatter from each rank, with NCCL a reduce_scatter."""


def take_stamp(device: torch.device) -> Any:
    """This moment as the device lives it: an event on a GPU, the clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def count_seconds(began: Any, ended: Any) -> float:
    """Between two stamps; on a GPU both must have been reached: synchronise first."""
    return ended - began if isinstance(ended, float) else began.elapsed_time(ended) / 1000


class Phases:
    """Seconds by phase. Final.

    On a CPU a collective is timed while the process waits in it: the exposed communication, which is taken out of the
    phase around it; within the loss it is `gather`, elsewhere `communication`. On a GPU phases are the device's time
    between events, and communication stays within them: nobody on the host sees how long it was waited for.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self._collective_s = 0.0
        self._spans: list[tuple[str, Any, Any, float]] = []
        self._last = take_stamp(device)

    def mark(self, name: str) -> None:
        """The time since the last mark belongs to this phase."""
        now = take_stamp(self.device)
        self._spans.append((name, self._last, now, self._collective_s))
        self._last, self._collective_s = now, 0.0

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for name, began, ended, collective_s in self._spans:
            seconds[name] += count_seconds(began, ended) - collective_s
            seconds["gather" if name == "loss" else "communication"] += collective_s
        self._spans.clear()
        return dict(seconds)

    @contextmanager
    def watch_collectives(self) -> Iterator[None]:
        """Time what torch.distributed is asked for, until the end of the block; on a GPU nothing is done."""
        plain = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name) and not self.on_gpu}
        for name, function in plain.items():
            setattr(dist, name, self._time(function))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(dist, name, function)

    @contextmanager
    def count_wait(self) -> Iterator[None]:
        """The time that the block takes is spent in a collective."""
        began = time.perf_counter()
        yield
        self._collective_s += time.perf_counter() - began

    def _time(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.count_wait():
                work = function(*arguments, **options)
            return work if work is None else _Waited(work, self)

        return timed


class _Waited:
    """The handle of a collective that runs on, whose wait is timed."""

    def __init__(self, work: Any, phases: Phases):
        self._work, self._phases = work, phases

    def wait(self, *arguments: Any) -> Any:
        """Wait for the collective."""
        with self._phases.count_wait():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
