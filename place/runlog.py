"""The run folder's logs: metrics.jsonl, samples.jsonl, TensorBoard, attempts; read also while the run goes on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from place.config import RunError, UsageError
from place.kept import try_lock
from place.trackers import Tracker

ATTENTION = "attention.jsonl"


class RunLog:
    """Writer of a run's logs; used on rank 0 alone. Final."""

    def __init__(self, run_dir: Path, attempt: int, trackers: Sequence[Tracker] = ()):
        self.attempt, self._run_dir, self._trackers = attempt, run_dir, list(trackers)
        self._metrics, self._samples = (open_log(run_dir / name) for name in ("metrics.jsonl", "samples.jsonl"))

    def write_metrics(self, step: int, values: dict[str, Any]) -> None:
        """One object of a logged step."""
        record = {"step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values}
        self._metrics.write(json.dumps(record) + "\n")
        figures = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._tell(lambda tracker: tracker.log(step, figures))

    def write_samples(self, step: int, epoch: int, sample_ids: list[int]) -> None:
        """The sample ids of an optimiser step, over all ranks."""
        record = {"step": step, "epoch": epoch, "attempt": self.attempt, "ids": sample_ids}
        self._samples.write(json.dumps(record) + "\n")

    def write_attention(self, step: int, attention_KN: Sequence[Sequence[float]]) -> None:
        """How the V-PORs' queries share out the patches of one image, at a validation; the image is not kept."""
        shares_KN = [[float(f"{share:.2g}") for share in share_N] for share_N in attention_KN]
        with open_log(self._run_dir / ATTENTION) as file:
            file.write(json.dumps({"step": step, "attempt": self.attempt, "attention": shares_KN}) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._metrics.close()
        self._samples.close()
        self._tell(lambda tracker: tracker.close())

    def _tell(self, ask: Callable[[Tracker], None]) -> None:
        """Ask each tracker; one that fails is told nothing more, for a run does not end with a service beside it."""
        for tracker in [*self._trackers]:
            try:
                ask(tracker)
            except Exception as error:  # noqa: BLE001  a package of its own raises what it likes
                self._trackers.remove(tracker)
                said = " ".join(str(error).split())[:200]
                note = f"{type(tracker).__name__} failed ({said}); it gets no more figures, metrics.jsonl has them all"
                write_attempt(self._run_dir, {"attempt": self.attempt, "notes": [note]})


def open_log(path: Path) -> TextIO:
    """Open a file of JSON lines to append to, beginning a new line where a killed writer left half of one."""
    file = path.open("a+", buffering=1)
    end = file.tell()
    if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
        file.write("\n")
    return file


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, without a last line that a killed writer left. Raises RunError for other damage."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines) and not lines[number].startswith("{"):
                raise RunError(f"{path} line {number} is damaged ({error}); restore the file") from None


class Tail:
    """What a log gained since the last look, however long it is, and in its last `back` bytes before that. Final."""

    def __init__(self, path: Path, back: int = 0):
        self.path, self.offset = path, max(0, path.stat().st_size - back) if path.is_file() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The objects of the whole lines that are new; a line that a killed writer left is passed over."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def read_surviving(path: Path) -> list[dict[str, Any]]:
    """The surviving lineage of a log: for each step the record of the last attempt that did it, in order of steps."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_jsonl(path):
        if "step" in record and "val_total" not in record:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def write_attempt(run_dir: Path, record: dict[str, Any]) -> None:
    """A line of attempts.jsonl: a start of the command or of its workers, notes about one, or how the command ended."""
    with open_log(run_dir / "attempts.jsonl") as file:
        file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")


def note_start(run_dir: Path) -> None:
    """A line of attempts.jsonl: which process a `place pretrain` is, and of which start of a Slurm job."""
    write_attempt(run_dir, {"command": {"host": socket.gethostname(), "pid": os.getpid(), "job": _read_job()}})


@contextlib.contextmanager
def hold_run(run_dir: Path) -> Iterator[None]:
    """Keep every other `place pretrain` out of a run folder for as long as the block runs.

    A lock on attempts.jsonl, which ends with its process; on storage without locks nobody is kept out.
    Raises:
        UsageError: another one works there.
    """
    with open_log(run_dir / "attempts.jsonl") as file:
        is_held = _lock(file, run_dir)
        try:
            yield
        finally:
            if is_held:  # or loader workers that live a moment longer would keep it
                fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file: TextIO, run_dir: Path) -> bool:
    try:
        if try_lock(file.fileno()):
            return True
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    other = [record["command"] for record in read_jsonl(run_dir / "attempts.jsonl") if "command" in record][-1:]
    own, known = _read_job(), other[0].get("job") if other else None
    # Slurm starts a job again once its machines are gone; of one without power NFS may never hear that.
    if own and known and own["id"] == known["id"] and own["start"] > known["start"]:
        return False
    who = f", process {other[0]['pid']} on {other[0]['host']}" if other else ""
    raise UsageError(
        f"another place pretrain works in {run_dir}{who}; wait for it, or end it with scancel, ray job stop or "
        "Ctrl-C, or choose another run.dir"
    )


def _read_job() -> dict[str, Any] | None:
    """The Slurm job of this process and which of its starts this is; none outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"id": job, "start": int(os.environ.get("SLURM_RESTART_COUNT", "0"))} if job else None


def note_end(run_dir: Path, outcome: str, why: str) -> None:
    """A line of attempts.jsonl: how a `place pretrain` ended (done, stopped, failed), and why if it is not done."""
    # Where the disk is full nothing can be noted, and that it is full is what the user must hear.
    with contextlib.suppress(OSError):
        write_attempt(run_dir, {"outcome": outcome, **({"why": " ".join(why.split())} if outcome != "done" else {})})


def read_commit() -> str:
    """The commit of the checkout that runs, else PLACE_COMMIT; `-dirty` marks uncommitted changes."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return os.environ.get("PLACE_COMMIT", "unknown")
    return done.stdout.strip() or os.environ.get("PLACE_COMMIT", "unknown")


def count_attempts(run_dir: Path) -> int:
    """Worker groups started so far in the life of the run."""
    return sum("launch" in record for record in read_jsonl(run_dir / "attempts.jsonl"))


def read_newest_step(run_dir: Path) -> int | None:
    """Step of the checkpoint that `latest` names, unchecked; None before the first one. RunError for other text."""
    latest = run_dir / "checkpoints" / "latest"
    if not latest.is_file():
        return None
    text = latest.read_text(errors="replace").strip()
    try:
        return int(text.removeprefix("step_"))
    except ValueError:
        said = f"{latest} holds '{text[:40]}', expected step_N; write the name of the newest folder beside it there"
        raise RunError(said) from None
