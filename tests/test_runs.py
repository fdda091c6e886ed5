"""`place runs`: where runs stand, by folders that the code of a run itself wrote."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from training.runs import write_config

from place import cli
from place.runlog import RunLog, note_end, note_start, write_attempt
from place.runs import Standing, find_runs, format_span, list_runs, read_standing

HERE = {"host": os.uname().nodename, "pid": os.getpid()}
ELSEWHERE = {"host": "another-node", "pid": 7}
HANG_S = 600
DIE = "import sys; from pathlib import Path; from place.runlog import note_start; note_start(Path(sys.argv[1]))"


def write_run(run: Path, total_steps: int = 100, saved: int | None = None, launcher: str = "ray") -> Path:
    """A run folder as `prepare_run` leaves it, with a checkpoint if one is told."""
    (run / "checkpoints").mkdir(parents=True)
    config = {"run": {"log_every_steps": 10}, "cluster": {"launcher": launcher, "hang_timeout_s": HANG_S}}
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "run.json").write_text(json.dumps({"plan": {"total_steps": total_steps, "global_batch": 64}}))
    if saved is not None:
        (run / "checkpoints" / "latest").write_text(f"step_{saved:08d}")
    return run


def write_steps(run: Path, attempt: int, steps: range, seconds: float = 2.0) -> None:
    """Lines of metrics.jsonl, as if the last of them were written now and a step lasted so many seconds."""
    log, now = RunLog(run, attempt), time.time()
    for step in steps:
        when = now - (steps[-1] - step) * seconds
        log.write_metrics(step, {"total": 900.0 - step, "samples_per_s": 32.0 + step, "time": round(when, 3)})
    log.close()


def launch(run: Path, attempt: int, from_step: int, who: dict = ELSEWHERE) -> None:
    """Lines of attempts.jsonl of a worker group that started."""
    write_attempt(run, {"attempt": attempt, "launch": "1-a", "workers": [who, who]})
    write_attempt(run, {"attempt": attempt, "from_step": from_step, "notes": []})


def look(run: Path, later_s: float = 0.0) -> Standing:
    """Where a run stands, some seconds from now."""
    return read_standing(run, time.time() + later_s)


def test_a_run_elsewhere_counts_as_running_while_records_come_and_then_as_unknown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", saved=20)
    launch(run, 0, 0)
    write_steps(run, 0, range(10, 51, 10))
    found = look(run)
    assert (found.state, found.reason, found.step, found.total_steps, found.saved_step) == ("running", "", 50, 100, 20)
    assert (found.loss, found.samples_per_s, found.workers, found.attempts) == (850.0, 82.0, 2, 1)
    assert found.eta_s == pytest.approx(50 * 2.0)
    assert found.age_s == pytest.approx(0.0, abs=1)
    # A hung step is ended after HANG_S; three lines of ten steps of 2 s may come on top.
    assert look(run, HANG_S + 55).state == "running"
    late = look(run, HANG_S + 65)
    assert (late.state, late.eta_s) == ("unknown", None)
    assert late.reason == "nothing was recorded for 11 min; the newest checkpoint is of step 20"


def test_after_a_restart_a_run_stands_where_its_newest_attempt_does(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", saved=20)
    launch(run, 0, 0)
    write_steps(run, 0, range(10, 51, 10))
    launch(run, 1, 20)
    begun = look(run)
    assert (begun.step, begun.loss, begun.eta_s, begun.attempts) == (20, 850.0, None, 2)
    write_steps(run, 1, range(30, 41, 10), seconds=3.0)
    found = look(run)
    assert (found.step, found.loss) == (40, 860.0)
    assert found.eta_s == pytest.approx(60 * 3.0)


def test_a_process_of_this_host_is_looked_at_whatever_the_age_of_its_records(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    note_start(run)
    assert (look(run).state, look(run).step) == ("running", 0)
    launch(run, 0, 0)
    write_steps(run, 0, range(10, 31, 10))
    assert look(run, 10 * HANG_S).state == "running"
    (run / "stop").write_text("SIGTERM")
    assert look(run)[1:3] == ("running", "asked to stop (SIGTERM)")
    subprocess.run([sys.executable, "-c", DIE, str(run)], check=True)
    (run / "stop").unlink()
    dead = look(run)
    assert dead[1:3] == ("failed", "its process ended without a word; before the first checkpoint")


def test_a_run_of_one_process_needs_no_command_line_to_be_looked_at(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", launcher="local", saved=10)
    launch(run, 0, 0, HERE)
    assert look(run, 10 * HANG_S).state == "running"
    # The same process id, but of a process that began after the record was written: another one.
    text = (run / "attempts.jsonl").read_text()
    old = [json.loads(line) | {"time": 1.0} for line in text.splitlines()]
    (run / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert look(run)[1:3] == ("failed", "its process ended without a word; the newest checkpoint is of step 10")


def test_what_the_last_workers_left_counts_until_another_start(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", saved=20)
    launch(run, 0, 0)
    write_steps(run, 0, range(10, 51, 10))
    (run / "outcome.json").write_text(
        json.dumps({"launch": "1-a", "outcome": "failed", "kind": "RunError", "message": "loss nan"})
    )
    assert look(run)[1:3] == ("failed", "loss nan")
    (run / "outcome.json").write_text(json.dumps({"launch": "0-z", "outcome": "failed", "message": "loss nan"}))
    assert look(run).state == "running"


def test_old_folders_without_an_end_are_judged_by_their_checkpoints(tmp_path: Path) -> None:
    done, stopped = write_run(tmp_path / "done", saved=100), write_run(tmp_path / "stopped", saved=50)
    for run in (done, stopped):
        launch(run, 0, 0)
        write_steps(run, 0, range(10, 51, 10))
    (stopped / "stop").write_text("SIGUSR1")
    assert look(done)[1:3] == ("done", "")
    assert look(stopped)[1:3] == ("stopped", "SIGUSR1")


def test_a_new_start_takes_an_end_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", saved=20)
    launch(run, 0, 0)
    note_end(run, "failed", "workers failed\n4 times")
    assert look(run)[1:3] == ("failed", "workers failed 4 times")
    note_start(run)
    assert look(run).state == "running"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", "a: [", "cannot be read"),
        ("run.json", '{"plan": ', "cannot be read"),
        ("config.yaml", "", "config.yaml holds null, expected names and values; restore it"),
        ("config.yaml", "[1, 2]", "config.yaml holds [1, 2], expected names and values"),
        ("config.yaml", "cluster:", "config.yaml has cluster: null, expected its keys; restore it"),
        ("config.yaml", "run: {log_every_steps: ten}", "is no whole run folder (TypeError"),
        ("config.yaml", b"run: \xff", "config.yaml cannot be read (UnicodeDecodeError"),
        ("run.json", "{}", "run.json has no 'plan'"),
        ("run.json", "[]", "run.json holds [], expected names and values"),
        ("run.json", '{"plan": null}', "is no whole run folder (TypeError"),
        ("attempts.jsonl", "x\n\ny\n", "attempts.jsonl line 1 is damaged"),
        ("attempts.jsonl", b"\xff\n", "attempts.jsonl cannot be read (UnicodeDecodeError"),
        ("attempts.jsonl", '{"launch": "1-a", "attempt": 0, "time": 1, "workers": []}\n', "(IndexError"),
        ("metrics.jsonl", b'{"\xff": 1}\n', "metrics.jsonl cannot be read (UnicodeDecodeError"),
        ("outcome.json", "5", "outcome.json holds 5"),
        ("checkpoints/latest", "step_x", "latest holds 'step_x', expected step_N"),
        ("checkpoints/latest", "", "latest holds '', expected step_N"),
    ],
)
def test_a_damaged_run_is_a_line_and_not_the_end_of_the_list(
    name: str, text: str | bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_run = write_run(tmp_path / "bad", launcher="local")
    write_attempt(bad_run, {"notes": []})
    (bad_run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    launch(write_run(tmp_path / "good", saved=100), 0, 0)
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    bad, good = json.loads(capsys.readouterr().out)
    assert (bad["state"], good["state"]) == ("unknown", "done")
    assert words in bad["reason"]


def test_a_loss_that_is_no_number_is_null_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    launch(run, 0, 0)
    log = RunLog(run, 0)
    log.write_metrics(10, {"total": math.nan, "samples_per_s": 32.0})
    log.close()
    assert cli.main(["runs", str(run), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (shown["step"], shown["loss"], shown["samples_per_s"]) == (10, None, 32.0)


def test_runs_are_found_at_any_depth_but_not_inside_runs_and_each_once(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a/seed0/run", "b")]
    write_run(runs[1] / "inner")
    write_run(tmp_path / ".trash" / "c")
    assert list(find_runs(tmp_path)) == runs
    assert [run.run for run in list_runs([tmp_path, runs[1]])] == list(map(str, runs))


def test_the_table_keeps_to_100_columns_and_leaves_long_names_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{'a-long-name-of-a-folder/' * 3}run{number}" for number in range(2)]
    for name in names:
        launch(write_run(tmp_path / name, total_steps=1_250_000, saved=20), 0, 0)
        write_steps(tmp_path / name, 0, range(123_410, 123_431, 10))
    note_end(tmp_path / names[1], "failed", "a reason " * 20)
    assert cli.main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if not line.startswith(("below", "failed"))]
    assert max(map(len, table)) <= 100
    assert table[1].split()[:4] == ["run0", "running", "123,430/1,250,000", "-122530.000"]
    assert table[1].split()[4:] == ["123,462", "26", "d", "02", "h", "0", "s"]
    assert lines[-1].endswith("run1: " + ("a reason " * 20).strip())


def test_folders_without_runs_and_folders_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs", "."]) == 0
    assert capsys.readouterr().out == "no run in or below .\n"
    assert cli.main(["runs"]) == 2
    assert capsys.readouterr().err.startswith("place runs: runs is no folder; give one that holds runs")
    assert cli.main(["runs", "stop"]) == 2
    assert "expected one run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "60 min"), (7500, "2 h 05 min"), (3599 * 3, "3 h 00 min")]
    + [(200_000, "2 d 08 h"), (9e6, "104 d")],
)
def test_spans_are_short(seconds: float, shown: str) -> None:
    assert format_span(seconds) == shown


def test_real_runs_say_themselves_how_they_ended(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = str(write_config(tmp_path, prepared, cluster={"launcher": "local"}, run={"log_every_steps": 1}))

    def stop_soon() -> None:
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
            time.sleep(0.01)
        cli.main(["runs", "stop", str(run)])

    thread = threading.Thread(target=stop_soon, daemon=True)
    thread.start()
    assert cli.main(["pretrain", "--config", config]) == 85
    thread.join()
    stopped = look(run)
    assert stopped[1:3] == ("stopped", "place runs stop")
    assert 1 <= (stopped.step or 0) < (stopped.total_steps or 0)
    assert cli.main(["pretrain", "--config", config]) == 0
    done = look(run)
    assert done[1:3] == ("done", "")
    assert (done.step, done.attempts) == (done.total_steps, 2)
    assert done.val_loss is not None
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    (latest / "model.safetensors").write_bytes(b"")
    for other in (run / "checkpoints").glob("step_*"):
        (other / "files.json").unlink()
    capsys.readouterr()
    assert cli.main(["pretrain", "--config", config]) == 1
    said = capsys.readouterr().err.strip()
    assert f"place pretrain: {look(run).reason}" == said
    assert look(run).state == "failed"
