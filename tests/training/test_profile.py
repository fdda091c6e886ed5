"""`--profile`: the steps that were asked for, and no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from training.runs import run_place, write_config


def read_steps(path: Path) -> list[int]:
    """Whole steps that a trace shows, numbered as the run's own: the profiler counts from 0."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    return sorted(1 + int(name.removeprefix("ProfilerStep#")) for name in names)


def test_a_window_of_steps_is_traced_with_what_deepspeed_sent(prepared: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, prepared, engine={"kind": "deepspeed", "zero_stage": 1})
    code, _, err = run_place("pretrain", "--config", str(config), "--profile", "4:2")
    assert code == 0, err
    folder = tmp_path / "run" / "profile"
    name = "rank0_steps_4-5"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.json.gz",
        f"{name}.txt",
        f"{name}_communication.json",
    ]
    assert read_steps(folder / f"{name}.json.gz") == [4, 5]
    assert "aten::addmm" in (folder / f"{name}.txt").read_text()
    sent = json.loads((folder / f"{name}_communication.json").read_text())
    whole = max(sent, key=lambda record: record["bytes"])
    assert (whole["operation"], whole["calls"]) == ("all_reduce", 2)
    assert whole["bytes"] > 100_000
    assert whole["milliseconds"] > 0


@pytest.mark.parametrize("asked", [["run.profile_step=4", "run.profile_ranks=[1]"], []])
def test_other_ranks_and_other_runs_write_no_profile(prepared: Path, tmp_path: Path, asked: list[str]) -> None:
    code, _, err = run_place("pretrain", "--config", str(write_config(tmp_path, prepared)), *asked)
    assert code == 0, err
    assert not (tmp_path / "run" / "profile").exists()


def test_a_window_that_the_run_ends_in_is_written_and_one_that_is_past_is_not(prepared: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, prepared)  # of 15 steps
    code, _, err = run_place("pretrain", "--config", str(config), "--profile", "14:50")
    assert code == 0, err
    traces = list((tmp_path / "run" / "profile").glob("*.json.gz"))
    assert [read_steps(trace) for trace in traces] == [[14, 15, 16]]  # 16: the last checkpoint, no step
    code, _, err = run_place("pretrain", "--config", str(config), "--profile", "3:2", "train.epochs=4")
    assert code == 0, err
    assert list((tmp_path / "run" / "profile").glob("*.json.gz")) == traces


def test_a_window_that_is_no_window_is_one_line(prepared: Path, tmp_path: Path) -> None:
    code, _, err = run_place("pretrain", "--config", str(write_config(tmp_path, prepared)), "--profile", "1")
    assert code == 2
    assert "run.profile_step" in err
    assert "greater than or equal to 2" in err
