"""Where the time of a step goes: phases that follow each other without a gap, and what collectives took within them."""

from __future__ import annotations

import time
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
    "all_to_all_single",
    "barrier",
)
"""What torch.distributed is asked for by us and by DeepSpeed."""


class Phases:
    """Seconds by phase. Final.

    On a CPU a collective is timed while the process waits in it: the exposed communication, which is taken out of the
    phase around it; within the loss it is `gather`, elsewhere `communication`. On a GPU phases are the device's time
    between events, and communication stays within them: nobody on the host sees how long it was waited for.
    """

    def __init__(self, device: torch.device):
        self.is_timed = device.type == "cuda"
        self._collective_s = 0.0
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any]] = []
        self._last: Any = self._now()

    def mark(self, name: str) -> None:
        """The time since the last mark belongs to this phase."""
        now = self._now()
        if self.is_timed:
            self._events.append((name, (self._last, now)))
        else:
            self._add("gather" if name == "loss" else "communication", self._collective_s)
            self._add(name, now - self._last - self._collective_s)
            self._collective_s = 0.0
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        if self.is_timed and self._events:
            torch.cuda.synchronize()
            for name, (began, ended) in self._events:
                self._add(name, began.elapsed_time(ended) / 1000)
            self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> Any:
        if not self.is_timed:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextmanager
    def watch_collectives(self) -> Iterator[None]:
        """Time what torch.distributed is asked for, until the end of the block; on a GPU nothing is done."""
        if self.is_timed:
            yield
            return
        plain = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
        for name, function in plain.items():
            setattr(dist, name, self._time(function))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(dist, name, function)

    def _time(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            work = function(*arguments, **options)
            self._collective_s += time.perf_counter() - began
            return work if work is None else _Waited(work, self)

        return timed

    def count_wait(self, seconds: float) -> None:
        """Time that the process waited for a collective that it had begun before."""
        self._collective_s += seconds


class _Waited:
    """The handle of a collective that runs on, whose wait is timed."""

    def __init__(self, work: Any, phases: Phases):
        self._work, self._phases = work, phases

    def wait(self, *arguments: Any) -> Any:
        """Wait for the collective."""
        began = time.perf_counter()
        done = self._work.wait(*arguments)
        self._phases.count_wait(time.perf_counter() - began)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
