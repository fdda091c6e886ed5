"""A look into a window of steps: torch's profiler on chosen ranks, and what DeepSpeed sent in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from place.config import RunConfig
from place.kept import write_text

WARM_STEPS = 1
"""Steps before the window in which the profiler runs and keeps nothing: its own start costs time."""


class StepProfiler:
    """Profiles `profile_steps` steps from step `profile_step` on, numbered as in metrics.jsonl. Final.

    Writes into RUN/profile: a trace for chrome://tracing or Perfetto, a table of operators, and DeepSpeed's log of
    communication (calls, bytes and milliseconds by operation and size), for which every call waits until it is done.
    Outside the window nothing is done.
    """

    def __init__(self, config: RunConfig, rank: int, from_step: int, device: torch.device):
        self.folder, self.rank, self.done = Path(config.dir) / "profile", rank, from_step
        self.first, self.count = config.profile_step or 0, config.profile_steps
        self._profile: profile | None = None
        skipped = self.first - from_step - 1 - WARM_STEPS
        if rank not in config.profile_ranks or skipped < 0:  # not asked for, or a start that is past it
            return
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        window = schedule(skip_first=skipped, wait=0, warmup=WARM_STEPS, active=self.count, repeat=1)
        self._profile = profile(activities=kinds, schedule=window, on_trace_ready=self._write, record_shapes=True)
        self._profile.start()

    def step(self) -> None:
        """A step is done."""
        self.done += 1
        if self._profile is None:
            return
        if self.done == self.first - 1:
            _log_communication(True)
        self._profile.step()
        if self.done == self.first + self.count - 1:
            self.close()

    def close(self) -> None:
        """End, wherever the window is: what was seen of it is written."""
        if self._profile is not None:
            ended, self._profile = self._profile, None
            ended.stop()

    def _write(self, seen: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self.rank}_steps_{self.first}-{self.first + self.count - 1}"
        seen.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_text(self.folder / f"{name}.txt", seen.key_averages().table(sort_by=key, row_limit=40))
        if sent := _log_communication(False):
            write_text(self.folder / f"{name}_communication.json", json.dumps(sent, indent=1))


def _log_communication(wanted: bool) -> list[dict[str, Any]]:
    """Let DeepSpeed log what it sends, or end that and give what it logged; nothing where there is no DeepSpeed."""
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is None:
        return []
    comm.configure(enabled=wanted, prof_all=wanted, verbose=False)
    logged = comm.comms_logger.get_raw_data()
    comm.comms_logger.reset_data()
    return [
        {"operation": name, "bytes": size, "calls": calls, "milliseconds": sum(times)}
        for name, sizes in logged.items()
        for size, (calls, times, *_) in sizes.items()
    ]
