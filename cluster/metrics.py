"""A run's figures at Ray's endpoint for Prometheus."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class RayMetrics:
    """Gauges that Ray's agents offer to Prometheus as `ray_place_NAME`, tagged with the run. Final."""

    def __init__(self, run_dir: Path):
        self._tags, self._gauges = {"run": run_dir.name}, dict[str, Any]()

    def log(self, step: int, values: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        for name, value in {**values, "step": step}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"place_{name}", f"{name} of a PLACE run", tag_keys=("run",))
            self._gauges[name].set(value, self._tags)

    def close(self) -> None:
        """Ray drops gauges with the worker."""
