"""A run's figures at Ray's endpoint for Prometheus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME_PARTS = 4
"""Of a rung of `place scale`: ladder, rung, which of its runs, and `run`."""


def name_run(run_dir: Path) -> str:
    """What a run is called among others: the last parts of its folder, for the last one alone is often the same."""
    return "/".join(run_dir.parts[run_dir.is_absolute() :][-NAME_PARTS:])


class RayMetrics:
    """Gauges that Ray's agents offer to Prometheus as `ray_place_NAME`, tagged with the run. Final."""

    def __init__(self, run_dir: Path):
        self._tags, self._gauges = {"run": name_run(run_dir)}, dict[str, Any]()

    def log(self, step: int, values: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        for name, value in {**values, "step": step}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"place_{name}", f"{name} of a PLACE run", tag_keys=("run",))
            self._gauges[name].set(value, self._tags)

    def close(self) -> None:
        """Ray drops gauges with the worker."""
