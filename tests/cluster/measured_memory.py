"""Bytes that a training step allocates, from the allocator's own events."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def measure_peak(run: Callable[[], object]) -> int:
    """The most bytes that were allocated on the CPU at once while `run` ran, beyond what there was before."""
    gc.collect()  # what earlier tests left is not to be released in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level, peak = 0, 0
    for event in sorted(read_events(profiler), key=lambda event: event[0]):
        level += event[1]
        peak = max(peak, level)
    return peak


def read_events(profiler: profile) -> list[tuple[int, int]]:
    """Time and bytes of each allocation (positive) and release (negative)."""
    found = profiler.profiler.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]"]
