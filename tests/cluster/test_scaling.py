"""`place scale`: real runs become rows, a failed rung is a row with its reason, the model finds what made the data."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser.look import look_at
from place.cluster import scaling
from place.cluster.budget import compute_flops
from place.cluster.scaling import (
    RungConfig,
    ScaleConfig,
    Steps,
    build_batch,
    list_faults,
    load_scale,
    name_rung,
    plan_jobs,
    run_job,
)
from place.cluster.scaling_model import Point, compute_rounds, fit, fit_resampled, predict_interval
from place.cluster.scaling_page import draw_scaling, write_results

from place.cli import main
from place.config import RunError, UsageError, build_config
from place.kept import write_kept
from place.runlog import read_jsonl
from place.training.footprint import measure_footprint
from place.training.plan import build_plan

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "scale" / "tiny.yaml")


def write_ladder(folder: Path, **options: Any) -> Path:
    ladder = {"base": TINY, "folder": str(folder / "out"), "steps": 6, "warmup_steps": 2, "probes": []}
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(ladder | {"rungs": [{"workers": 1}]} | options))
    return path


def build_record(phase_s: list[dict[str, float]]) -> dict[str, Any]:
    """What a run of one step of a second left."""
    empty: dict[str, Any] = {"reason": "", "lag_s": [], "sent_mib": []}
    measured = {"samples_per_s": [8.0], "step_s": [1.0], "loss": [1.0], "memory_mib": 1, "start_s": 1.0}
    return {**empty, **measured, "phase_s": phase_s}


def build_run(run: Path, commit: str, device: str) -> Path:
    """What a run folder says of its origin."""
    run.mkdir()
    versions = {"torch": "2", "deepspeed": "1", "numpy": "3"}
    (run / "run.json").write_text(json.dumps({"commit": commit, "versions": versions}))
    workers = [{"host": host, "pid": 1, "device": device} for host in ("x", "y", "y")]
    lines = [{"command": {"host": "x"}}, {"attempt": 0, "launch": "1", "workers": workers}]
    (run / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> tuple[Path, list[str], int]:
    """A ladder of one worker without Ray, with every probe, and a rung that cannot be."""
    folder = tmp_path_factory.mktemp("scale")
    rungs = [
        {"workers": 1, "network": {"bandwidth_gbit": 1}},
        {"workers": 1, "name": "wrong", "config": ["data.train_split=nowhere"]},
    ]
    ladder = write_ladder(folder, rungs=rungs, probes=["synthetic", "loader", "restart"])
    words = [f"data.path={prepared}", "data.image_size_px=32", "cluster.launcher=local", "engine.kind=torch"]
    words += ["train.global_batch=8", "cluster.num_workers=1"]
    return folder / "out", ["scale", "--config", str(ladder), *words], main(["scale", "--config", str(ladder), *words])


def test_rungs_become_rows_and_a_failed_one_has_its_reason(scaled: tuple[Path, list[str], int]) -> None:
    folder, _, code = scaled
    results = json.loads((folder / "scaling.json").read_text())
    rows = {(row["rung"], row["probe"]): row for row in results["rows"]}
    assert code == 1
    assert {key for key, row in rows.items() if row["status"] == "ok"} == {
        ("1 worker", probe) for probe in ("full", "synthetic", "loader")
    }
    assert "nowhere" in rows["wrong", "full"]["reason"]
    full, loader = rows["1 worker", "full"], rows["1 worker", "loader"]
    assert full["unexplained"] < 0.03
    assert full["steps"] == 3, "6, less 2 of warm-up and the one with the checkpoint"
    assert full["checkpoint_s"] > 0
    assert "checkpoint" not in full["phase_s"]
    assert loader["checkpoint_s"] is None
    spread = full["step_pairs_per_s"]
    assert spread["p5"] <= spread["median"] <= spread["p95"]
    assert full["pairs_per_s"] == pytest.approx(full["global_batch"] / full["step_s"])
    assert full["phase_s"]["forward"] > 0
    assert loader["pairs_per_s"] > full["pairs_per_s"]
    assert full["loss_apart"] is None, "there is no other run to compare"
    assert "efficiency" not in full, "there is but one size"
    assert results["model"]["factors"]["per_wire"] == 0
    with (folder / "scaling.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [row["status"] for row in lines] == ["ok"] * 3 + ["failed"] * 4
    assert [row["probe"] for row in lines[3:]] == ["full", "synthetic", "loader", "restart"]
    assert 0 < full["restart_s"] == float(lines[0]["restart_s"])
    steps = [record["step"] for record in read_jsonl(folder / "1_worker" / "full0" / "run" / "metrics.jsonl")]
    assert steps == [*range(1, 7), 7, 8], "it goes on where it was"
    assert not list(folder.rglob("checkpoints")), "nobody needs them any more"
    assert float(lines[0]["pairs_per_s"]) == full["pairs_per_s"]
    assert [lines[0][name] for name in ("nodes", "engine", "precision", "micro_batch")] == ["1", "torch", "fp32", "8"]
    about = json.loads((folder / "1_worker" / "full0" / "run" / "run.json").read_text())
    assert (lines[0]["commit"], lines[0]["device"]) == (about["commit"], "cpu")
    assert float(lines[0]["checkpoint_s"]) == full["checkpoint_s"]
    assert float(lines[0]["step_pairs_per_s_p5"]) == spread["p5"]
    page = (folder / "scaling.html").read_text()
    assert page.count("<tr>") > 8
    assert "data:image/svg+xml" in page
    assert "nowhere" in page
    failed = page.split("<td>wrong</td>")[1]
    assert "the whole run" in failed, "a failed run is named as one that is done"
    assert (folder / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plan_takes_its_time_from_the_model(
    scaled: tuple[Path, list[str], int], prepared: Path, capsys: pytest.CaptureFixture
) -> None:
    measured = scaled[0] / "scaling.json"
    words = [*scaled[1][3:], "--scaling", str(measured), "--json"]
    assert main(["plan", "--config", TINY, *words]) == 0
    told = json.loads(capsys.readouterr().out)
    results = json.loads(measured.read_text())
    row = next(row for row in results["model"]["rungs"] if row["rung"] == "1 worker")
    assert told["time"]["step_s"] == pytest.approx(row["predicted"]["step"][0], rel=1e-3)
    assert told["time"]["step_s_interval"] == pytest.approx(row["predicted"]["step"][1:], rel=1e-3)
    assert f"{measured} was measured on" in " ".join(told["assumed"])
    assert main(["plan", "--config", TINY, *words[:-1]]) == 0
    low, high = told["time"]["step_s_interval"]
    assert f"s a step ({low:.3f} to {high:.3f} in 95 % of resampled runs)" in capsys.readouterr().out
    del results["model"]["resamples"], results["model"]["factors"]["latency_s"], results["network"]
    old = prepared.parent / "old.json"
    old.write_text(json.dumps(results))
    assert main(["plan", "--config", TINY, *scaled[1][3:], "--scaling", str(old), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["time"]
    assert again == told["time"] | {"step_s_interval": None}, "a file of before has no intervals"
    empty = prepared.parent / "empty.json"
    empty.write_text("{}")
    assert main(["plan", "--config", TINY, *scaled[1][3:], "--scaling", str(empty)]) == 2
    assert "holds no fitted model" in capsys.readouterr().err


def test_a_plan_is_for_the_network_of_the_ladder_not_that_within_a_node(tmp_path: Path) -> None:
    factors = fit(build_points(np.random.default_rng(0), 0.0))._asdict()
    inside, between = {"name": "NVLink", "bandwidth_gbit": 3600.0}, {"name": "cluster", "bandwidth_gbit": 400.0}
    rows = [{"workers": 1}, {"workers": 8, "network": inside}, {"workers": 16, "network": between}]
    results, path = {"model": {"factors": factors}, "rows": rows}, tmp_path / "scaling.json"
    for written, name in ((results, "cluster"), (results | {"network": inside}, "NVLink")):
        path.write_text(json.dumps(written))
        assert scaling.read_model(path)[1].name == name


def test_a_ladder_goes_on_with_what_is_missing(
    scaled: tuple[Path, list[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words, _ = scaled
    before = (folder / "1_worker" / "full0" / "measured.json").stat().st_mtime_ns
    called: list[list[str]] = []

    def refuse(command: list[str], log: Path, timeout_s: float) -> None:
        called.append(command)

    monkeypatch.setattr(scaling, "run_logged", refuse)
    assert main(words) == 1
    assert {Path(command[-1]).parents[1].name for command in called} == {"wrong"}
    assert (folder / "1_worker" / "full0" / "measured.json").stat().st_mtime_ns == before


def test_repeats_that_failed_are_told_and_end_the_ladder_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    record, crash = build_record([{"forward": 1.0}]), {"reason": "ended with 1: gone"}
    monkeypatch.setattr(scaling, "run_job", lambda job, *_: record if job.repeat == 1 else crash)
    words = ["scale", "--config", str(write_ladder(tmp_path, repeats=3)), "engine.kind=torch"]
    assert main(words) == 1
    said = "1 worker, full: 2 of 3 runs failed: ended with 1: gone"
    assert said in capsys.readouterr().out
    page = (tmp_path / "out" / "scaling.html").read_text()
    assert said in page
    assert "(1 of 3 runs)" in page
    with (tmp_path / "out" / "scaling.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert [row[name] for name in ("status", "runs", "runs_failed")] == ["ok", "1", "2"]
    monkeypatch.setattr(scaling, "run_job", lambda *_: record)
    assert main(words) == 0


def test_a_ladder_that_is_stopped_leaves_a_page_of_the_rungs_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: scaling.Job, *_: object) -> dict[str, Any]:
        if job.name == "2 workers":
            raise SystemExit(1)
        return build_record([{"forward": 1.0}])

    monkeypatch.setattr(scaling, "run_job", run)
    ladder = write_ladder(tmp_path, rungs=[{"workers": 1}, {"workers": 2}], repeats=2)
    with pytest.raises(SystemExit):
        main(["scale", "--config", str(ladder), "engine.kind=torch"])
    results = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [(row["rung"], row["runs"]) for row in results["rows"]] == [("1 worker", 2)]
    told = "the ladder has not ended, 2 of its 4 runs are done"
    assert results["model"]["why_not"].startswith(told)
    assert told in (tmp_path / "out" / "scaling.html").read_text()
    assert (tmp_path / "out" / "scaling.csv").read_text().count("1 worker") == 1


def test_a_run_is_started_again_from_its_checkpoint_and_checkpoints_go_when_nobody_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []
    breaks = True

    def pretrain(command: list[str], log: Path, timeout_s: float) -> None:
        """What a run leaves: a line a step from its checkpoint on, 2 s apart, and a checkpoint."""
        config = build_config(command[-1])
        run, began = Path(config.run.dir), time.time()
        latest = run / "checkpoints" / "latest"
        calls.append((log.parent.name, latest.is_file()))
        if breaks and log.parent.name == "restart":
            raise RunError("ended with 1: gone")
        first = int(latest.read_text().removeprefix("step_")) if latest.is_file() else 0
        latest.parent.mkdir(parents=True, exist_ok=True)
        with (run / "metrics.jsonl").open("a") as file:
            for step in range(first + 1, config.train.max_steps + 1):
                line = {"step": step, "time": began + 2 * (step - first), "samples_per_s": 4.0, "total": 1.0}
                file.write(json.dumps(line) + "\n")
        latest.write_text(f"step_{config.train.max_steps:08d}")

    monkeypatch.setattr(scaling, "run_logged", pretrain)
    ladder = write_ladder(tmp_path, repeats=2, probes=["alone", "restart"])
    scale, folder = load_scale(ladder, ["engine.kind=torch"]), tmp_path / "out" / "1_worker"
    full, failed = (row for row in scaling.run_ladder(scale, Path(TINY), print)["rows"] if row["probe"] != "alone")
    assert (failed["probe"], failed["reason"]) == ("restart", "ended with 1: gone")
    assert "restart_s" not in full
    assert calls == [(name, False) for name in ("full0", "full1", "alone", "alone1")] + [("restart", True)]
    assert [path.parents[1].name for path in folder.rglob("checkpoints")] == ["full0"], "it is tried again"
    breaks = False
    full, alone = scaling.run_ladder(scale, Path(TINY), print)["rows"]
    assert calls[5:] == [("restart", True)]
    assert full["restart_s"] == pytest.approx(2.0, abs=1.5)
    assert full["start_s"] == pytest.approx(2.0, abs=1.5)
    assert (full["steps"], alone["probe"]) == (2 * 4, "alone"), "the steps of the restart are in no rate"
    assert not list(folder.rglob("checkpoints"))
    (folder / "restart" / "measured.json").unlink()
    *_, lost = scaling.run_ladder(scale, Path(TINY), print)["rows"]
    assert lost["reason"].startswith("the whole run left no checkpoint of its last step to start from; remove ")
    for _ in range(2):
        # Its restart is measured anew with it.
        (folder / "full0" / "measured.json").unlink()
        for aside in (folder / "full0").glob("run-*"):
            shutil.rmtree(aside)
        assert scaling.run_ladder(scale, Path(TINY), print)["rows"][0]["restart_s"]
    assert calls[6:] == 2 * [("full0", False), ("restart", True)]


def test_what_was_measured_counts_for_the_same_nodes_launcher_and_data_alone(tmp_path: Path) -> None:
    def compute(**options: Any) -> str:
        scale = load_scale(write_ladder(tmp_path, **options), [f"data.path={tmp_path}"])
        return scaling.compute_key(plan_jobs(scale, Path(TINY))[0], scale)

    slurm = {"rungs": [{"workers": 4, "nodes": 2}], "launcher": "slurm"}
    unseen = compute(**slurm)
    (tmp_path / "card.json").write_text('{"fingerprint": "a"}')
    first = compute(**slurm)
    one_a_node = compute(**slurm | {"rungs": [{"workers": 4, "nodes": 4}]})
    assert compute(**slurm | {"rungs": [{"workers": 4}]}) == one_a_node
    keys = [unseen, first, one_a_node, compute(rungs=[{"workers": 4, "nodes": 2}]), compute(rungs=[{"workers": 4}])]
    (tmp_path / "card.json").write_text('{"fingerprint": "b"}')
    keys.append(compute(**slurm))
    assert len(set(keys)) == 6
    (tmp_path / "card.json").write_text('{"fingerprint": "a"}')
    assert compute(**slurm) == first


def test_what_an_earlier_version_measured_has_no_checkpoints_and_no_origin(tmp_path: Path) -> None:
    scale = load_scale(write_ladder(tmp_path))
    (job,) = plan_jobs(scale, Path(TINY))
    record = build_record([{"forward": 1.0}])
    (row,) = scaling.build_rows(scale, [job], {(job.name, "full"): [record]})
    assert (row["checkpoint_s"], row["commit"], row["nodes"]) == (None, None, None)


def test_each_rung_has_the_work_of_its_own_images_and_losses(tmp_path: Path) -> None:
    changes = [], ["data.image_size_px=128"], ["loss.correlation.weight=0"]
    rungs = [{"workers": 1, "config": change} for change in changes]
    scale = load_scale(write_ladder(tmp_path, rungs=rungs), ["data.image_size_px=64", "engine.kind=torch"])
    jobs = plan_jobs(scale, Path(TINY))
    record = build_record([])
    rows = scaling.build_rows(scale, jobs, {(job.name, "full"): [record] for job in jobs})
    assert len({row["flop_worker"] for row in rows}) == 3


def test_batches_that_come_in_bursts_are_counted_over_all_seconds(tmp_path: Path) -> None:
    options = {"rungs": [{"workers": workers} for workers in (1, 2)], "steps": 12, "warmup_steps": 3}
    scale = load_scale(write_ladder(tmp_path, **options), ["engine.kind=torch"])
    found = {}
    for job, gap_s in zip(plan_jobs(scale, Path(TINY)), (0.4, 0.25), strict=True):
        # Four readers are done at once, and then nothing comes for a while.
        times = [1000 + gap_s * (step // 4) for step in range(12)]
        lines = [{"step": step, "time": time, "samples_per_s": 1.0, "total": 1.0} for step, time in enumerate(times)]
        saved = {"time": times[-1] + 9, "checkpoint_wait_s": 0.5, "checkpoint_copy_s": 2.0}
        lines.append(lines[-1] | saved)
        run = tmp_path / job.name
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[job.name, "full"] = [{"reason": "", **scaling.read_steps(run, scale, job.config, 1000)}]
    one, two = scaling.build_rows(scale, plan_jobs(scale, Path(TINY)), found)
    assert one["step_s"] == pytest.approx(0.8 / 9), "the step with the checkpoint is not among them"
    assert one["checkpoint_s"] == 2.5
    assert one["pairs_per_s"] == pytest.approx(24 * 9 / 0.8)
    assert one["step_pairs_per_s"]["median"] == 24 / 1e-3
    assert one["worker_hours_per_million"] == pytest.approx(1e6 / one["pairs_per_s"] / 3600)
    assert two["efficiency"] == pytest.approx(0.4 / 0.25 / 2)


def test_what_mfu_assumes_stands_beside_it(tmp_path: Path) -> None:
    words = ["engine.kind=torch", "data.max_tokens=77", "engine.activation_checkpointing=true"]
    scale = load_scale(write_ladder(tmp_path, peak_tflops=1.0), words)
    (job,) = plan_jobs(scale, Path(TINY))
    record = build_record([{"forward": 1.0}]) | {"step_s": [2.0]}
    (row,) = scaling.build_rows(scale, [job], {(job.name, "full"): [record]})
    said = "reports of data.max_tokens=77 tokens (shorter ones cost less where they are packed)"
    plan = build_plan(job.config, 1, job.config.train.global_batch, 0)
    flops = compute_flops(measure_footprint(job.config), plan, job.config, recomputed=False)
    assert row["mfu"] == flops / 2.0 / 1e12
    assert row["flop_worker"] > flops, "the time of a step holds what is computed again"
    assert row["mfu_assumed"].startswith(said)
    results = {"scaling": "strong", "commit": "", "flop_rule": "", "rows": [row], "model": {"why_not": "no network"}}
    assert said in write_results(tmp_path, "mfu", results).read_text()
    assert said in (tmp_path / "scaling.csv").read_text()


def test_a_column_that_only_some_rows_have_is_empty_in_the_others(
    scaled: tuple[Path, list[str], int], tmp_path: Path
) -> None:
    """Rows of reading alone have no micro-batch, and sizes of one global batch differ in it."""
    results = json.loads((scaled[0] / "scaling.json").read_text())
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    results["rows"] = rows + [row | {"rung": "2 workers", "workers": 2, "micro_batch": 4} for row in rows[:1]]
    assert "micro_batch" not in next(row for row in rows if row["probe"] == "loader")
    page = write_results(tmp_path, "sizes", results).read_text()
    table = page.split("<th>micro-batch</th>")[1].split("</table>")[0]
    assert [table.count(f"<td>{size}</td>") for size in (8, 4)] == [2, 1]
    assert "<td>–</td>" in table.split(">loader<")[1].split("</tr>")[0]


GPU_RUNGS = [{"workers": 1}, {"workers": 2}, {"workers": 4}, {"workers": 8, "hold_out": True}]


def build_gpu_ladder(
    folder: Path, round_s: float, words: Sequence[str] = (), **options: Any
) -> tuple[ScaleConfig, list[dict[str, Any]], Steps]:
    """A ladder whose phases hold their communication, `round_s` for each round; 0.2 s of compute for a worker alone."""
    network = {"bandwidth_gbit": 100}
    ladder = {"rungs": GPU_RUNGS, "probes": ["alone"], "network": network, "predict": [network], "scaling": "weak"}
    scale = load_scale(write_ladder(folder, **ladder | options), ["engine.kind=torch", "train.global_batch=8", *words])
    jobs = plan_jobs(scale, Path(TINY))
    record = build_record([{"backward": 1.0}])
    rows = scaling.build_rows(scale, jobs, {(job.name, job.probe): [record] for job in jobs})
    steps = {}
    for row, noise in itertools.product(rows, (0.999, 1.0, 1.001)):
        alone = next((other for other in rows if (other["rung"], other["probe"]) == (row["rung"], "alone")), row)
        seconds = 0.2 * row["flop_worker"] / alone["flop_worker"] + round_s * row["rounds"]
        steps.setdefault((row["rung"], row["probe"]), [[]])[0].append({"wait": 0.01, "backward": noise * seconds})
    return scale, rows, steps


def test_communication_within_the_phases_of_gpus_is_what_goes_beyond_one_worker_alone(tmp_path: Path) -> None:
    scale, rows, steps = build_gpu_ladder(tmp_path, 3e-3, predict_workers=[16])
    exposed = {(row["workers"], row["probe"]): (row["exposed_s"], row["exposed_by"]) for row in rows}
    assert exposed[1, "full"] == exposed[4, "alone"] == (0, "phases")
    # Whole and alone have the same second here.
    assert exposed[4, "full"] == (0, "alone")
    model = scaling.build_predictions(scale, Path(TINY), rows, steps)
    held_out = next(rung for rung in model["rungs"] if rung["hold_out"])
    for says in held_out["measured"]["exposed"], held_out["predicted"]["exposed"][0]:
        assert says == pytest.approx(3e-3 * 14, rel=0.02)
    assert held_out["measured"]["step"] == pytest.approx(sum(steps["8 workers", "full"][0][1].values()))
    assert model["sizes"][0]["predicted"]["exposed"][0] == pytest.approx(3e-3 * 30, rel=0.02)
    assert model["notes"] == [scaling.HIDDEN, scaling.SAME_WORK]


@pytest.mark.parametrize("network", [{"bandwidth_gbit": 100}, None])
def test_a_row_of_gpus_has_the_communication_that_goes_beyond_one_worker_alone(
    network: dict[str, Any] | None, tmp_path: Path
) -> None:
    ladder = write_ladder(tmp_path, rungs=[{"workers": 4}], probes=["alone"], scaling="weak", network=network)
    scale = load_scale(ladder, ["engine.kind=torch"])
    jobs = plan_jobs(scale, Path(TINY))
    seconds = {"full": 0.5, "alone": 0.1}
    found = {(job.name, job.probe): [build_record([{"backward": seconds[job.probe], "wait": 0.5}])] for job in jobs}
    full, alone = scaling.build_rows(scale, jobs, found)
    expected = 0.5 - 0.1 * full["flop_worker"] / alone["flop_worker"]
    assert (full["exposed_s"], full["exposed_by"]) == (pytest.approx(expected), "alone")
    results = {"scaling": "weak", "commit": "", "flop_rule": "", "rows": [full, alone], "model": {"why_not": "no"}}
    page = write_results(tmp_path, "gpus", results).read_text()
    assert "<th>exposed, within</th>" in page
    assert f"<td>{1000 * expected:,.1f}</td>" in page
    del found[full["rung"], "alone"]
    assert [row["exposed_s"] for row in scaling.build_rows(scale, jobs[:1], found)] == [None]


@pytest.mark.browser
def test_the_page_is_whole_in_a_browser_also_with_long_names(tmp_path: Path) -> None:
    scale, rows, steps = build_gpu_ladder(tmp_path, 3e-3, predict_workers=[16])
    model = scaling.build_predictions(scale, Path(TINY), rows, steps)
    failed = {"rung": "wrong", "probe": "full", "status": "failed", "workers": 1, "reason": "no such split: " * 20}
    results = {"scaling": "weak", "commit": "abc", "flop_rule": "products", "rows": [*rows, failed], "model": model}
    page, longer = write_results(tmp_path, "a ladder of four rungs", results), tmp_path / "longer.html"
    longer.write_text(page.read_text().replace("4 workers", "four_workers_on_two_machines_" * 4))
    assert look_at([page, longer]) == []


def test_nothing_is_predicted_where_communication_was_not_seen(tmp_path: Path) -> None:
    scale, rows, steps = build_gpu_ladder(tmp_path, 3e-3)
    full = [row for row in rows if row["probe"] == "full"]
    said = scaling.build_predictions(scale, Path(TINY), full, steps)["why_not"]
    assert said.startswith("the phases of 2 workers, 4 workers, 8 workers hold their communication")
    partly = [row for row in rows if (row["rung"], row["probe"]) != ("4 workers", "alone")]
    model = scaling.build_predictions(scale, Path(TINY), partly, steps)
    assert [rung["rung"] for rung in model["rungs"]] == ["1 worker", "2 workers", "8 workers"]
    assert model["notes"][1].startswith("left out of the model: the phases of 4 workers hold their communication")
    assert model["sizes"], "one rung's alone run that failed does not take the others' model"
    alone = scaling.build_predictions(scale, Path(TINY), full[:1], steps)
    assert alone["sizes"] == []
    assert "none is predicted" in alone["notes"][0]
    scale, rows, steps = build_gpu_ladder(tmp_path, 0.0)
    says = scaling.build_predictions(scale, Path(TINY), rows, steps)
    assert says == {"why_not": "no rung of several workers shows any exposed communication to fit to"}


def test_the_model_is_that_of_rungs_with_one_config(tmp_path: Path) -> None:
    rungs = [
        {"workers": workers, "config": config} for config in ([], ["train.accumulation=2"]) for workers in (1, 2, 4)
    ]
    rungs.append({"workers": 1, "name": "fp32", "config": ["data.image_size_px=64"]})
    options = {"rungs": rungs, "scaling": "weak", "predict_workers": [8]}
    scale, rows, steps = build_gpu_ladder(tmp_path, 3e-3, **options)
    model = scaling.build_predictions(scale, Path(TINY), rows, steps)
    assert [rung["rung"] for rung in model["rungs"]] == ["1 worker", "2 workers", "4 workers"]
    assert model["notes"][1:] == [
        "left out of the model: 1 worker train.accumulation=2, 2 workers train.accumulation=2, "
        "4 workers train.accumulation=2, fp32, for the rungs fitted have no config of their own",
        scaling.SAME_WORK,
    ]
    page = write_results(
        tmp_path, "configs", {"scaling": "weak", "commit": "", "flop_rule": "", "rows": rows, "model": model}
    ).read_text()
    assert "<th>micro-batch</th>" in page
    assert "<th>engine</th>" not in page
    others = [row for row in rows if row["config"]]
    changed = scaling.build_predictions(scale, Path(TINY), others, steps)
    assert [rung["rung"] for rung in changed["rungs"]] == [
        f"{rung['rung']} train.accumulation=2" for rung in model["rungs"]
    ]
    plain, again = (one["sizes"][0]["predicted"]["step"][0] for one in (model, changed))
    assert again == pytest.approx(plain, rel=0.01), "the time grows with what is computed again, in both alike"


def test_a_size_that_cannot_be_is_left_out_and_told(tmp_path: Path) -> None:
    options = {"scaling": "strong", "rungs": [{"workers": 2}, {"workers": 4}], "predict_workers": [8, 48, 64]}
    words = ["train.global_batch=96", "train.accumulation=4"]
    scale, rows, steps = build_gpu_ladder(tmp_path, 3e-3, words, **options)
    model = scaling.build_predictions(scale, Path(TINY), rows, steps)
    assert [size["workers"] for size in model["sizes"]] == [8]
    assert model["notes"][1].startswith("48 workers are not predicted: train.accumulation=4 is more than the 2 pairs")
    assert model["notes"][2].startswith("64 workers are not predicted: train.global_batch=96 is not divisible by 64")
    page = write_results(
        tmp_path, "sizes", {"scaling": "strong", "commit": "", "flop_rule": "", "rows": rows, "model": model}
    )
    assert "48 workers are not predicted" in page.read_text()


def test_a_base_that_only_the_settings_of_its_rungs_make_possible_costs_no_results(tmp_path: Path) -> None:
    rungs = [{"workers": 1, "config": ["data.image_size_px=64"], "network": {"bandwidth_gbit": 1}}]
    scale = load_scale(write_ladder(tmp_path, rungs=rungs), ["engine.kind=torch", "data.image_size_px=60"])
    (job,) = plan_jobs(scale, Path(TINY))
    job.folder.mkdir(parents=True)
    record = build_record([{"forward": 1.0}])
    write_kept(job.folder / "measured.json", scaling.compute_key(job, scale), record)
    results = scaling.run_ladder(scale, Path(TINY), lambda line: None)
    assert results["rows"][0]["step_s"] == 1.0
    assert [rung["rung"] for rung in results["model"]["rungs"]] == [job.name]


def test_energy_is_that_of_the_gpus_for_a_million_pairs(scaled: tuple[Path, list[str], int], tmp_path: Path) -> None:
    results = json.loads((scaled[0] / "scaling.json").read_text())
    record = json.loads((scaled[0] / "1_worker" / "full0" / "measured.json").read_text())["result"]
    config = build_config(Path(TINY), ["train.global_batch=200", "cluster.num_workers=1"])
    row = scaling._summarize([record | {"step_s": [1.0, 3.0], "power_w": [300.0, 420.0]}], config)
    assert row["kwh_per_million"] == pytest.approx(360 * 1e6 / 100 / 3600 / 1000)
    assert results["rows"][0]["kwh_per_million"] is None, "a CPU has no meter"
    assert "GPU kWh" not in (scaled[0] / "scaling.html").read_text()
    results["rows"][0] |= row
    page = write_results(tmp_path, "energy", results).read_text()
    assert "<th>GPU kWh per million</th>" in page
    assert "<td>1.00</td>" in page
    assert (tmp_path / "scaling.csv").read_text().count("kwh_per_million") == 1


LADDERS = [path for path in sorted((ROOT / "configs" / "scale").glob("*.yaml")) if "\nrungs:" in path.read_text()]


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_ladders_that_come_along_are_possible(path: Path) -> None:
    scale = load_scale(path, ["data.path=somewhere"])
    jobs = plan_jobs(scale, path.parent / scale.base)
    assert {job.config.data.path for job in jobs} == {"somewhere"}
    assert {name_rung(rung) for rung in scale.rungs} == {job.name for job in jobs}
    within = [rung for rung in scale.rungs if rung.nodes == 1 and rung.workers > 1]
    assert all(rung.network for rung in within), "workers of one node do not use the network between nodes"
    assert all(workers > rung.workers for workers in scale.predict_workers for rung in within)


def test_strong_and_weak_scaling_share_out_the_batch(tmp_path: Path) -> None:
    ladder = write_ladder(tmp_path, rungs=[{"workers": 3}], probes=["alone"])
    for kind, whole, alone in (("strong", 24, 8), ("weak", 72, 24)):
        scale = load_scale(ladder).model_copy(update={"scaling": kind})
        jobs = {job.probe: job.config for job in plan_jobs(scale, Path(TINY))}
        assert (jobs["full"].train.global_batch, jobs["full"].cluster.num_workers) == (whole, 3)
        assert (jobs["alone"].train.global_batch, jobs["alone"].cluster.num_workers) == (alone, 1)


@pytest.mark.parametrize(
    ("launcher", "rung", "nodes"),
    [
        ("ray", {"workers": 4, "nodes": 2}, {"full": 2, "alone": 1}),
        ("slurm", {"workers": 4, "nodes": 2}, {"full": 2, "alone": 1}),
        ("slurm", {"workers": 4}, {"full": 4, "alone": 1}),
        ("ray", {"workers": 4, "config": ["cluster.num_nodes=1"]}, {"full": 1, "alone": 1}),
        ("ray", {"workers": 4}, {"full": None, "alone": 1}),
    ],
)
def test_workers_of_a_rung_lie_on_its_nodes(
    launcher: str, rung: dict[str, Any], nodes: dict[str, int | None], tmp_path: Path
) -> None:
    scale = load_scale(write_ladder(tmp_path, rungs=[rung], probes=["alone"], launcher=launcher))
    assert {job.probe: job.config.cluster.num_nodes for job in plan_jobs(scale, Path(TINY))} == nodes


def test_a_rung_by_slurm_is_a_job_of_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE_SBATCH", "--account=x --time=1:00:00")
    rung = {"workers": 6, "nodes": 2}
    scale = load_scale(write_ladder(tmp_path, rungs=[rung], probes=["alone"], launcher="slurm", timeout_s=90))
    full, alone = (build_batch(job, scale, tmp_path / "c.yaml") for job in plan_jobs(scale, Path(TINY)))
    assert full[:5] == ["--nodes=2", "--no-requeue", "--time=2", "--account=x", "--time=1:00:00"]
    assert Path(full[-3]).is_file()
    # pretrain.sh would take all GPUs of its nodes; what comes behind the config wins.
    assert full[-2:] == [str(tmp_path / "c.yaml"), "cluster.num_workers=6"]
    assert (alone[0], alone[-1]) == ("--nodes=1", "cluster.num_workers=1")


def test_without_slurm_a_ladder_of_jobs_is_one_line(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_ladder(tmp_path, launcher="slurm")
    assert main(["scale", "--config", str(path), f"data.path={prepared}"]) == 2
    assert "sbatch is not installed here; take launcher=ray" in capsys.readouterr().err


def test_a_rung_that_takes_too_long_is_a_row(tmp_path: Path) -> None:
    scale = load_scale(write_ladder(tmp_path, timeout_s=0.2))
    assert "not done after 0.2 s" in run_job(plan_jobs(scale, Path(TINY))[0], scale, print)["reason"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rungs": []}, "rungs: tuple should have at least 1 item"),
        ({"rungs": [{"workers": 1}, {"workers": 1}]}, "two rungs are called '1 worker'"),
        ({"warmup_steps": 5}, "leaves too little"),
        ({"scalling": "weak"}, "scalling"),
        ({"launcher": "slurm"}, "launcher=slurm submits slurm/pretrain.sh, which this installation lacks"),
        ({"rungs": [{"workers": 3, "nodes": 2}]}, "'3 workers' does not lie equally on nodes=2; give a divisor"),
    ],
)
def test_a_wrong_ladder_is_one_line(
    options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "SLURM_SCRIPT", tmp_path / "slurm" / "pretrain.sh")
    with pytest.raises(UsageError, match=said) as caught:
        load_scale(write_ladder(tmp_path, **options))
    assert "\n" not in str(caught.value)


def test_faults_are_told_before_the_figures() -> None:
    rows = [
        {"rung": "a", "probe": "full", "status": "failed", "reason": "gone"},
        {"rung": "b", "probe": "full", "status": "ok", "unexplained": 0.04, "loss_apart": 0.02},
        {"rung": "c", "probe": "full", "status": "ok", "unexplained": 0.02, "loss_apart": 0.001},
    ]
    assert [line.split(":")[0] for line in list_faults(rows)] == ["a, full", "b, full", "b, full"]


def test_loss_curves_of_one_global_batch_are_compared_repeats_too() -> None:
    rows = [
        {"rung": rung, "probe": "full", "status": "ok", "global_batch": pairs}
        for rung, pairs in (("a", 8), ("b", 8), ("c", 16), ("d", 32))
    ]
    curves = {"a": [[2.0, 1.0]], "b": [[2.0, 1.1], [2.5, 1.0]], "c": [[1.0]], "d": [[1.0, 1.0], [1.0, 0.9, 9.0]]}
    found = {(rung, "full"): [{"reason": "", "loss": loss} for loss in runs] for rung, runs in curves.items()}
    found["a", "full"].insert(0, {"reason": "gone", "loss": [7.0]})
    scaling._add_curves(rows, found)
    assert [row["loss_apart"] for row in rows] == [None, pytest.approx(0.25), None, pytest.approx(0.1)]
    assert [line.split(":")[0] for line in list_faults(rows)] == ["b, full", "d, full"]


def test_rows_of_another_commit_or_device_are_told(tmp_path: Path) -> None:
    scale = load_scale(write_ladder(tmp_path, rungs=[{"workers": 1}, {"workers": 2}]), ["engine.kind=torch"])
    jobs = plan_jobs(scale, Path(TINY))
    first, second = (build_run(tmp_path / name, name, device) for name, device in (("a", "H100"), ("b", "H200")))
    origin = {"commit": "a", "versions": "torch 2, deepspeed 1", "device": "H100", "nodes": 2}
    assert scaling.read_origin(first) == origin
    record = build_record([{"forward": 1.0}])
    # What an earlier version measured says nothing of its origin.
    for runs, faults in (
        ([{}, {}], []),
        ([origin, origin], []),
        ([origin, scaling.read_origin(second)], ["commit a (1 worker); b (2 workers)", "device H100 (1 worker); H200"]),
        ([origin, {}], [f"{name} {origin[name]} (1 worker); not recorded (2 workers)" for name in scaling.ORIGIN]),
    ):
        found = {(job.name, "full"): [record | run] for job, run in zip(jobs, runs, strict=True)}
        rows = scaling.build_rows(scale, jobs, found)
        assert [row["commit"] for row in rows] == [run.get("commit") for run in runs]
        told = list(list_faults(rows))
        assert len(told) == len(faults)
        assert all(fault in line for fault, line in zip(faults, told, strict=True))
        results = {"scaling": "strong", "commit": "", "flop_rule": "", "rows": rows, "model": {"why_not": "untried"}}
        page = write_results(tmp_path, "origin", results).read_text()
        assert ("<th>commit</th>" in page) == ("b" in rows[1].values())
    assert "Measured at commit <code>a</code>, torch 2, deepspeed 1, on H100." in page


def test_efficiency_is_that_of_a_worker_against_the_smallest_rung() -> None:
    rows = [
        {"rung": str(workers), "probe": "full", "status": "ok", "workers": workers, "pairs_per_s_worker": rate}
        | {"config": config, "nodes": nodes}
        for workers, rate, config, nodes in (
            (4, 60.0, [], 2),
            (1, 80.0, [], 1),
            (2, 72.0, [], 1),
            (8, 45.0, [], None),
            (4, 30.0, ["engine.precision=fp32"], 2),
            (2, 40.0, ["engine.precision=fp32"], 2),
            (2, 50.0, ["engine.zero_stage=3"], 2),
        )
    ]
    scaling._add_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [0.75, 1.0, 0.9, 45 / 80, 0.75, 1.0, None]
    assert [row.get("efficiency_node") for row in rows] == [60 / 72, None, 1.0, None, None, None, None]


@pytest.mark.parametrize("configs", [[[]], [[], ["engine.zero_stage=3"]]])
def test_each_config_is_a_series_of_its_own(configs: list[list[str]]) -> None:
    rows = [
        {"rung": " ".join([f"{workers} workers", *config]), "probe": probe, "status": "ok", "workers": workers}
        | {"config": config, "pairs_per_s": rate * workers, "pairs_per_s_worker": rate, "phase_s": {"forward": 0.1}}
        | {"step_pairs_per_s": {"p5": rate, "median": rate, "p95": rate}}
        for config, rate in zip(configs, (80.0, 60.0))
        for workers in (4, 2)
        for probe in ("full", "synthetic")
    ]
    figure = draw_scaling({"rows": rows})
    rates, parts = figure.axes
    drawn = [line for line in rates.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [line.get_ydata().tolist() for line in drawn] == [[160.0, 320.0], [120.0, 240.0]][: len(configs)]
    colours = [line.get_color() for line in drawn]
    assert len(set(colours)) == len(configs)
    told = [text.get_text() for legend in figure.legends for text in legend.texts]
    assert told == (["as the base", "engine.zero_stage=3"] if len(configs) > 1 else [])
    labels = parts.get_xticklabels()
    assert [label.get_text() for label in labels] == ["4\nworkers", "2\nworkers"] * len(configs)
    if len(configs) > 1:
        assert [label.get_color() for label in labels] == [colour for colour in colours for _ in range(2)]


def test_a_rung_is_called_by_what_differs() -> None:
    assert name_rung(RungConfig(workers=2, config=("engine.zero_stage=3",))) == "2 workers engine.zero_stage=3"


# ---- the model


def build_points(rng: np.random.Generator, noise: float) -> list[Point]:
    """Steps of a machine with known factors, on three sizes and two networks."""
    points = []
    for world, flop in ((1, 8e9), (2, 4e9), (4, 2e9), (4, 2e9)):
        bandwidth = 1e9 if len(points) < 3 else 2e9
        sent, rounds = 4e7 * (world - 1) / world, compute_rounds(world, "ring")
        compute, exposed = 0.01 + 2e-11 * flop, 3e-3 * rounds + 1.2 * sent / bandwidth
        steps = np.array([[compute, exposed, 0.005]]) * rng.normal(1, noise, (400, 3))
        points.append(Point([steps], flop, sent, rounds, bandwidth))
    return points


def test_the_fit_finds_the_factors_that_made_the_data() -> None:
    model = fit(build_points(np.random.default_rng(0), 0.0))
    assert model == pytest.approx((0.01, 2e-11, 3e-3, 1.2, 0.005, 0), rel=1e-6)
    says = model.predict(1e9, 3.5e7, compute_rounds(8, "ring"), 4e9)
    assert says["exposed"] == pytest.approx(3e-3 * 14 + 1.2 * 3.5e7 / 4e9)
    assert says["step"] == pytest.approx(says["compute"] + says["exposed"] + says["rest"])


def test_another_network_is_slower_by_its_latency() -> None:
    points = build_points(np.random.default_rng(0), 0.0)
    known = [point._replace(latency_s=1e-3) for point in points]
    model = fit(known)
    assert model == pytest.approx((0.01, 2e-11, 3e-3, 1.2, 0.005, 1e-3), rel=1e-6)
    rounds = compute_rounds(8, "ring")
    for latency_s, per_round_s in ((1e-3, 3e-3), (5e-3, 7e-3), (1e-4, 2.1e-3), (0.0, 3e-3)):
        says = model.predict(1e9, 0.0, rounds, 4e9, latency_s)["exposed"]
        assert says == pytest.approx(per_round_s * rounds)
    quick = model._replace(per_round_s=5e-4)
    assert quick.predict(1e9, 0.0, rounds, 4e9, 1e-4)["exposed"] == 0
    assert fit(points).predict(1e9, 0.0, rounds, 4e9, 5e-3)["exposed"] == pytest.approx(3e-3 * rounds)
    # The rung on the second network waits 4 ms more a round.
    slower = known[3].runs[0] + [0.0, 4e-3 * known[3].rounds, 0.0]
    mixed = [*known[:3], known[3]._replace(runs=[slower], latency_s=5e-3)]
    for point in mixed:
        assert fit(mixed).predict(*point[1:6])["exposed"] == pytest.approx(np.median(point.runs[0][:, 1]))


def test_the_wait_for_batches_that_come_in_bursts_is_in_the_step() -> None:
    steps = np.array([[0.1, 0.0, wait] for wait in (0.0, 0.0, 0.0, 0.4)] * 20)
    models = fit_resampled([Point([steps], 1e9, 0.0, 0.0, 1e9)], count=20)
    assert models[0].predict(1e9, 0.0, 0.0, 1e9)["step"] == pytest.approx(0.2)
    assert len({model.rest_s for model in models}) > 1


def test_intervals_hold_the_truth_and_narrow_with_less_noise() -> None:
    widths = []
    for noise in (0.1, 0.01):
        models = fit_resampled(build_points(np.random.default_rng(1), noise), count=100)
        value, low, high = predict_interval(models, 2e9, 3e7, 6.0, 1.5e9)["exposed"]
        assert low <= value <= high
        assert value == pytest.approx(3e-3 * 6 + 1.2 * 3e7 / 1.5e9, rel=0.02)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_rungs_of_equal_work_do_not_tell_how_compute_grows() -> None:
    rng = np.random.default_rng(3)
    for spread, alike in ((1.03, True), (2.0, False)):
        flops = 1e9, spread * 1e9
        for grows in (0.0, 1.0) if alike else (1.0,):
            seconds = [0.1 * (flop / 1e9) ** grows * rng.normal(1, 0.01, (400, 1)) for flop in flops]
            points = [Point([second * [1.0, 0.0, 0.0]], flop, 0, 0, 1e9) for second, flop in zip(seconds, flops)]
            says = predict_interval(fit_resampled(points, count=100), 2e9, 0, 0, 1e9)["compute"]
            assert says[1] * 0.99 <= 0.1 * 2**grows <= says[2] * 1.01
            assert (says[2] - says[1] > 0.09) == alike


def test_an_interval_holds_what_lies_between_runs_and_the_noise_of_one_worker_alone() -> None:
    rng = np.random.default_rng(2)
    network = 0.0, 2.0, 1e9, 0.0

    def measure(point: Point) -> float:
        value, low, high = predict_interval(fit_resampled([point], count=100), 1e9, *network)["exposed"]
        assert low <= value <= high
        return (high - low) / value

    runs = [rng.normal((0.5, level, 0.0), 1e-4, (50, 3)) for level in (0.9, 0.95, 1.0, 1.05, 1.1)]
    assert measure(Point(runs, 1e9, *network)) > 0.08
    assert measure(Point([np.concatenate(runs)], 1e9, *network)) < 0.01, "steps of all runs in one hide it"
    alike, compute = np.tile([1.0, 0.0, 0.0], (50, 1)), rng.normal(0.5, 0.05, 50)
    assert measure(Point([alike], 1e9, *network, [compute])) > 0.02


def test_rounds_of_a_ring_and_a_tree() -> None:
    assert [compute_rounds(world, "ring") for world in (1, 2, 8)] == [0, 2, 14]
    assert [compute_rounds(world, "tree") for world in (1, 2, 8)] == [0, 2, 6]
