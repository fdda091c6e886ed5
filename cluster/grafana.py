"""A Grafana dashboard of runs, over the Prometheus that scrapes Ray: `python -m place.cluster.grafana > place.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

PANELS = {
    "Loss": (("total", "instance", "pathology", "correlation", "tokens", "val_total"), "none"),
    "Samples a second": (("samples_per_s",), "none"),
    "Share of time waiting for data": (("data_wait_share",), "percentunit"),
    "Gradient norm": (("grad_norm",), "none"),
    "Temperatures": (("temperature_instance", "temperature_pathology"), "none"),
    "Learning rate": (("lr",), "none"),
    "Peak memory of rank 0": (("memory_mib",), "mbytes"),
    "GPU utilisation": (("gpu_utilisation",), "percent"),
    "GPU power of all workers": (("gpu_power_w",), "watt"),
    "Lag of the last rank": (("lag_s",), "s"),
    "Step": (("step",), "none"),
}
"""Title: figures of metrics.jsonl, unit as Grafana names it."""


def build_dashboard() -> dict[str, Any]:
    """A dashboard to import; one chooses data source and runs on it. Source: inferred (Grafana, dashboard JSON)."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [
                {
                    "refId": chr(ord("A") + at),
                    "datasource": source,
                    "expr": f'ray_place_{name}{{run=~"$run"}}',
                    "legendFormat": f"{{{{run}}}} {name}",
                }
                for at, name in enumerate(names)
            ],
        }
        for number, (title, (names, unit)) in enumerate(PANELS.items())
    ]
    runs = {
        "name": "run",
        "type": "query",
        "datasource": source,
        "query": {"query": "label_values(ray_place_step, run)", "refId": "runs"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "title": "PLACE",
        "uid": "place-runs",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}, runs]},
        "panels": panels,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(build_dashboard(), indent=1) + "\n")
