"""A run's figures at Ray's Prometheus endpoint, and the dashboard that shows them."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
from place.cluster.grafana import PANELS, build_dashboard
from place.cluster.metrics import name_run
from training.runs import run_place, write_config

from place.runlog import read_jsonl
from place.training.gpu import GpuState
from place.training.meter import describe_gpus


@pytest.mark.ray
def test_prometheus_finds_the_figures_of_a_run_at_rays_endpoint(tmp_path: Path) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:

        @ray.remote(num_cpus=1)
        class Worker:
            def log(self, folder: str) -> None:
                from place.cluster.metrics import RayMetrics

                self.tracker = RayMetrics(Path(folder))
                self.tracker.log(7, {"total": 1.25, "samples_per_s": 300.0})

        worker = Worker.remote()
        ray.get(worker.log.remote(str(tmp_path / "mine")))
        (node,) = ray.nodes()
        page, deadline = "", time.monotonic() + 60
        while "ray_place_total{" not in page and time.monotonic() < deadline:
            time.sleep(0.5)
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(address, timeout=10) as answer:
                page = answer.read().decode()
    finally:
        ray.shutdown()
    found = {line.split("{")[0]: line for line in page.splitlines() if line.startswith("ray_place_")}
    assert set(found) == {"ray_place_total", "ray_place_samples_per_s", "ray_place_step"}
    assert f'run="{name_run(tmp_path / "mine")}"' in found["ray_place_total"]
    assert found["ray_place_total"].endswith(" 1.25")
    assert found["ray_place_step"].endswith(" 7.0")


def test_rungs_of_ladders_are_told_apart_by_the_last_parts_of_their_folder() -> None:
    rungs = [f"/shared/runs/{ladder}/{n}_workers/full0/run" for ladder in ("a", "b") for n in (2, 3)]
    names = ["a/2_workers/full0/run", "a/3_workers/full0/run", "b/2_workers/full0/run", "b/3_workers/full0/run"]
    assert [name_run(Path(rung)) for rung in rungs] == names
    assert [name_run(Path(folder)) for folder in ("runs/mine", "/runs/mine")] == ["runs/mine"] * 2


def test_the_dashboard_asks_for_figures_that_runs_have(prepared: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, prepared)
    code, _, err = run_place("pretrain", "--config", str(config), "cluster.launcher=torchrun", processes=2)
    assert code == 0, err
    figures = {name for record in read_jsonl(tmp_path / "run" / "metrics.jsonl") for name in record}
    asked = {name for names, _ in PANELS.values() for name in names}
    # Those of GPUs are not in a run on a CPU.
    assert asked - figures == set(describe_gpus([GpuState(300.0, 90.0)]))
    dashboard = build_dashboard()
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert expressions == [f'ray_place_{name}{{run=~"$run"}}' for names, _ in PANELS.values() for name in names]
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
