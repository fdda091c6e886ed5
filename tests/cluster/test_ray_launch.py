"""The main job under Ray with DeepSpeed: a worker dies in mid-epoch, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import assert_exact_samples, embed, run_place, start_place, wait_until, write_config

from place.data.prepared import count_samples
from place.node import note_path
from place.runlog import read_jsonl, read_surviving

pytestmark = [pytest.mark.ray, pytest.mark.multiprocess]
SECTIONS = {
    "engine": {"kind": "deepspeed", "zero_stage": 1},
    "cluster": {"num_workers": 2},
    "train": {"checkpoint_every_steps": 7, "epochs": 20, "evaluate_every_epochs": 10},
}
KILL_AFTER_STEP = 33
STOP_AFTER_STEP = 52


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same two workers, started by torchrun and left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, prepared, **SECTIONS)
    code, out, err = run_place("pretrain", "--config", str(config), "cluster.launcher=torchrun", processes=2)
    assert code == 0, out + err
    return folder / "run"


@pytest.fixture(scope="module")
def killed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a Ray run: a worker got SIGKILL in mid-epoch, then the driver SIGTERM, then it was resumed."""
    folder = tmp_path_factory.mktemp("killed")
    config, run = write_config(folder, prepared, **SECTIONS), folder / "run"
    process = start_place("pretrain", "--config", str(config), "cluster.launcher=ray")
    wait_until(lambda: any(r["step"] >= KILL_AFTER_STEP for r in read_jsonl(run / "metrics.jsonl")), process)
    workers = next(record["workers"] for record in read_jsonl(run / "attempts.jsonl") if "workers" in record)
    os.kill(workers[1]["pid"], signal.SIGKILL)
    wait_until(lambda: any(is_after_restart(record) for record in read_jsonl(run / "metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 85, out + err
    assert "checkpoint saved" in out
    code, out, err = run_place("pretrain", "--config", str(config), "cluster.launcher=torchrun", processes=2)
    assert code == 0, out + err
    return run


def is_after_restart(record: dict[str, Any]) -> bool:
    return record["attempt"] == 1 and record["step"] >= STOP_AFTER_STEP


@pytest.mark.timeout(500)
def test_a_killed_worker_leaves_no_trace_in_the_curve(killed: Path, undisturbed: Path) -> None:
    attempts = {record["attempt"] for record in read_jsonl(killed / "metrics.jsonl")}
    assert attempts == {0, 1, 2}, "the run was not restarted, stopped and resumed"
    ours, theirs = (read_surviving(run / "metrics.jsonl") for run in (killed, undisturbed))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for a, b in zip(ours[-10:], theirs[-10:], strict=True):
        for term in ("total", "instance", "pathology", "correlation"):
            assert a[term] == pytest.approx(b[term], rel=1e-5), f"step {a['step']}, {term}"


def test_a_killed_worker_leaves_no_trace_in_the_embeddings(killed: Path, undisturbed: Path, prepared: Path) -> None:
    torch.testing.assert_close(embed(killed, prepared), embed(undisturbed, prepared), rtol=0, atol=1e-4)


def test_no_sample_is_doubled_or_missed_over_the_surviving_lineage(
    killed: Path, undisturbed: Path, prepared: Path
) -> None:
    assert_exact_samples(killed, prepared)
    plan = json.loads((killed / "run.json").read_text())["plan"]
    records = read_surviving(killed / "samples.jsonl")
    theirs = read_surviving(undisturbed / "samples.jsonl")
    assert [sorted(a["ids"]) for a in records] == [sorted(b["ids"]) for b in theirs]
    assert (
        plan["dropped_per_epoch"] == count_samples(prepared, "train") - plan["steps_per_epoch"] * plan["global_batch"]
    )


def test_the_run_folder_is_as_the_contract_says(killed: Path) -> None:
    names = {path.name for path in killed.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "tokenizer", "ray"} <= names
    root = killed / "checkpoints"
    assert (root / (root / "latest").read_text()).is_dir()
    assert (root / (root / "best").read_text()).is_dir()
    assert not note_path(killed).exists(), "shared memory or a shard cache was left behind"
