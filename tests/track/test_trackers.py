"""Weights & Biases and MLflow by their own packages, offline (make test-track)."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from training.runs import run_place, write_config

from place.runlog import read_jsonl

pytestmark = pytest.mark.track


def test_both_get_the_figures_of_metrics_jsonl_in_one_run_over_restarts(prepared: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, prepared, run={"trackers": ["wandb", "mlflow"]}))
    run = tmp_path / "run"
    for epochs in (2, 3):
        code, _, err = run_place("pretrain", "--config", config, f"train.epochs={epochs}")
        assert code == 0, err
    logged = [record for record in read_jsonl(run / "metrics.jsonl") if "total" in record]
    with sqlite3.connect(run / "mlflow.db") as database:
        kept = database.execute(
            "select step, value, run_uuid from metrics where key = 'total' order by step"
        ).fetchall()
        knobs = dict(database.execute("select key, value from params").fetchall())
    assert [(step, pytest.approx(value)) for step, value, _ in kept] == [(r["step"], r["total"]) for r in logged]
    assert len({run_id for _, _, run_id in kept}) == 1
    assert knobs["model.joint_width"] == "24"
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1, "one run, to be synchronised as one"
    whole = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.wandb"))
    for name in ("total", "samples_per_s", "val_total"):
        assert name.encode() in whole
    # Figures alone leave: nothing of the reports does.
    assert b"effusion" not in whole
