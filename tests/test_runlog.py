"""A log is followed while others write it, outlives a torn line and a tracker, and belongs to one command at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from place.config import UsageError
from place.runlog import RunLog, Tail, count_attempts, hold_run, note_start, read_jsonl, write_attempt

HOLD = """
import sys
from pathlib import Path
from place.runlog import hold_run, note_start
with hold_run(Path(sys.argv[1])):
    note_start(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_tail_gives_each_whole_line_once_and_passes_over_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    early = Tail(path)
    assert list(early.read()) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(early.read()) == [{"step": 1}]
    late = Tail(path)
    with path.open("a") as file:
        file.write('ep": 2}\n{"step": 3, "lo{"step": 3}\n{"step": 4}\n')
    assert list(early.read()) == [{"step": 2}, {"step": 4}]
    assert list(late.read()) == [{"step": 4}]
    assert list(early.read()) == []


def test_what_is_written_after_half_a_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    write_attempt(tmp_path, {"attempt": 0, "launch": "a"})
    path.write_text(path.read_text() + '{"time": 1.0, "att')
    write_attempt(tmp_path, {"attempt": 1, "launch": "b"})
    assert [record["attempt"] for record in read_jsonl(path)] == [0, 1]
    assert count_attempts(tmp_path) == 2
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text('{"step": 1')
    log = RunLog(tmp_path, 1)
    log.write_metrics(2, {"total": 1.0})
    log.write_samples(2, 0, [7])
    log.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [record["step"] for record in read_jsonl(tmp_path / name)] == [2]


class Broken:
    """A service that takes one step's figures and is gone."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.calls += 1
        if step > 1:
            raise ConnectionError("no route to host")

    def close(self) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_is_gone_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    tracker = Broken()
    log = RunLog(tmp_path, 0, [tracker])
    for step in range(1, 5):
        log.write_metrics(step, {"total": 1.0})
    log.close()
    assert tracker.calls == 2
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    (record,) = read_jsonl(tmp_path / "attempts.jsonl")
    assert record["notes"] == ["Broken failed (no route to host); it gets no more figures, metrics.jsonl has them all"]


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run folder as the first start of Slurm's job 7."""
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_folder_belongs_to_one_command_at_a_time(tmp_path: Path, held: subprocess.Popen[str]) -> None:
    said = f"another place pretrain works in .*, process {held.pid} on .*another run.dir"
    with pytest.raises(UsageError, match=said), hold_run(tmp_path):
        pass
    held.kill()
    held.wait()
    for _ in range(2):  # a lock that its process held is gone with it, and so is one that was given back
        with hold_run(tmp_path):
            note_start(tmp_path)


def test_a_job_that_slurm_starts_again_is_not_kept_out_by_its_former_self(
    tmp_path: Path, held: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with hold_run(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(UsageError, match="another place pretrain works in"), hold_run(tmp_path):
        pass
