"""What the screen of a run says, by the lines a run writes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from place.config import Config
from place.screen import JudgeProgress, RunScreen, print_scaling


def test_a_straggler_is_named_in_the_log_even_between_two_due_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"attempt": 0, "epoch": 0, "total": 1.0, "instance": 0.5, "pathology": 0.4, "correlation": 0.1}
    rows: list[dict[str, Any]] = [
        {**row, "step": step, "time": 1e9 + 2 * step, "samples_per_s": 9.0, "data_wait_share": 0.0, "lag_s": 0.01}
        for step in range(1, 7)
    ]
    for late in rows[2:4]:
        late.update(lag_s=0.25, straggler="rank 1 on node-with-a-long-name.cluster.internal")
    config = Config.model_validate({"run": {"dir": str(tmp_path)}, "data": {"path": "unused"}})
    plan = SimpleNamespace(
        world=2, num_samples=8, total_steps=100, global_batch=4, epochs=1, peak_lr=0.1, dropped_per_epoch=0, val_steps=1
    )
    with RunScreen(config, plan):  # type: ignore[arg-type]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        time.sleep(1.2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0].split()[1] for line in lines] == ["1", "3"]
    assert "left" not in lines[0], "of a first step the pace is not known"
    # 2 s a step by the records themselves, however late and many at once they are read.
    assert lines[1].endswith("on node-with-a-long-name.cluster.internal is 0.25 s late each step, 0:03:14 left")


def test_the_bar_knows_the_time_left_where_lines_are_a_minute_apart() -> None:
    now = 0.0
    bar = RunScreen(Config.model_validate({"data": {"path": "unused"}}), SimpleNamespace()).bar
    bar.get_time = lambda: now
    task = bar.add_task("pretrain", total=10, note="")
    for step in range(1, 4):
        now = 60.0 * step
        bar.update(task, completed=step)
    assert bar.tasks[0].time_remaining == 7 * 60


def build_ladder(rung: str, exposed_s: float) -> dict[str, Any]:
    """Results of `place scale` with one rung, which is held out."""
    row = {"rung": rung, "probe": "full", "status": "ok", "exposed_s": exposed_s, "step_s": 0.5, "start_s": 1.0}
    row |= {"pairs_per_s": 9.0, "step_pairs_per_s": {"median": 9.0, "p5": 8.0, "p95": 10.0}}
    row |= {"runs": 3, "runs_failed": 0}
    terms = {"exposed": (0.25, 0.2, 0.3), "step": (0.6, 0.5, 0.7)}
    held_out = {"rung": rung, "hold_out": True, "measured": {"exposed": exposed_s, "step": 0.5}, "predicted": terms}
    return {"rows": [row], "model": {"rungs": [held_out]}}


def test_a_rung_held_out_is_judged_by_its_step_where_no_communication_was_seen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_scaling(build_ladder("8 workers", 0.2), [])
    assert "exposed communication 200.0 ms, predicted 250.0 (200.0 to 300.0), off by 25.0%" in capsys.readouterr().out
    print_scaling(build_ladder("8 workers", 0.0), [])
    assert "held out, 8 workers: step 500.0 ms, predicted 600.0 (500.0 to 700.0), off by 20.0%" in (
        capsys.readouterr().out
    )


def test_runs_that_failed_and_restarts_are_in_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    results = build_ladder("8 workers", 0.2)
    results["rows"][0] |= {"runs_failed": 1, "restart_s": 7.5}
    print_scaling(results, [])
    titles, row, *_ = capsys.readouterr().out.splitlines()
    assert titles.rstrip().endswith("start, restart s")
    assert "full, 3 of 4 runs" in row
    assert row.rstrip().endswith("1.0, 7.5")


def test_brackets_of_rungs_and_log_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["8 workers, full: failed, [rank0]: at [/opt/pytorch/x.cc:12]", "a :key: is no picture"]
    print_scaling(build_ladder("8 workers [large]", 0.2), lines)
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == lines
    assert any(line.strip().startswith("8 workers [large]  full") for line in said)


def test_a_log_of_judging_has_a_line_now_and_then_not_one_for_each_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("place.screen.time.perf_counter", lambda: now)
    with JudgeProgress() as screen:
        for second in range(95):
            now += 1
            screen.update("report decoder", 20 * second, 2000)
        screen.update("write reports", 64, 621)
    assert capsys.readouterr().out.splitlines() == [
        "evaluate  report decoder  600/2,000",
        "evaluate  report decoder  1,220/2,000",
        "evaluate  report decoder  1,840/2,000",
    ]
