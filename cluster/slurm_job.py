"""One Slurm job, from sbatch to its end."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from place.config import RunError, UsageError
from place.kept import find_last_line

ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "DEADLINE"),
    "OUT_OF_MEMORY",
}
NEVER = {
    *("BadConstraints", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "InvalidAccount", "InvalidQOS"),
    *("AssocMaxNodePerJobLimit", "AssocMaxWallDurationPerJobLimit", "QOSMaxNodePerJobLimit"),
    *("QOSMaxWallDurationPerJobLimit", "QOSMaxGRESPerJob", "QOSMaxCpuPerJobLimit"),
}
"""Reasons that a job waits for in vain, as long as the cluster is what it is. Source: Slurm's job reason codes."""
TOLD_TO_END = (85, 128 + signal.SIGUSR1)
"""What slurm/pretrain.sh ends with where Slurm warned it of its time limit: with a checkpoint, or too early for one."""
NOTE = "job"
"""File beside the log that holds the number of a job under way."""
POLL_S = (1.0, 15.0)
"""First and longest pause between two looks at the queue."""
NOISE = re.compile(r"slurmstepd|srun:|.*ray_node\.sh: line \d+: ")
"""What Slurm and bash add behind the last word of a driver, as the steps of its job are ended."""
SILENT_S = 600.0
"""How long slurmctld may not answer."""


def run_slurm_job(words: Sequence[str], log: Path, say: Callable[[str], None]) -> float:
    """Submit a job, wait for its end, and cancel it where this process is told to end first.

    Args:
        words: behind `sbatch`: options, script and its arguments.
        log: what the job says goes here; nodes must see its folder.
    Returns: when it started, as unix time: what it waited in the queue is no part of the run.
    Raises:
        UsageError: there is no sbatch.
        RunError: Slurm refuses the job, or it did not end well, with its state and its last line.
    """
    # Slurm appends, and what an earlier job said is not of this one.
    log.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={log.resolve()}", *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UsageError("sbatch is not installed here; take launcher=ray, or start on a login node") from None
    if done.returncode:
        raise RunError(f"refused, {(done.stderr.strip() or 'sbatch: no reason given').splitlines()[-1]}")
    number = done.stdout.strip().split(";")[0]
    note = log.with_name(NOTE)
    note.write_text(number)
    say(f"job {number} is queued; its log is {log}")
    try:
        job = _wait_for_end(number, say)
        note.unlink(missing_ok=True)
    except BaseException:
        subprocess.run(["scancel", number], check=False)
        raise
    if job["JobState"] != "COMPLETED":
        code = int(job["ExitCode"].split(":")[0])
        said = f"{find_last_line(log, NOISE)} ({log})" if log.is_file() else "it did not start"
        if code in TOLD_TO_END:
            said = f"it was stopped before its end, by the warning of its time limit or by hand ({log})"
        raise RunError(f"job {number} ended {job['JobState']}, {code}: {said}")
    return datetime.fromisoformat(job["StartTime"]).timestamp()


def end_left_job(folder: Path, say: Callable[[str], None]) -> None:
    """Cancel the job that an earlier call left in this folder, as one that was killed does, and wait until it is gone.

    Two jobs would write one run. Raises RunError where Slurm does not end it.
    """
    note = folder / NOTE
    number = note.read_text().strip() if note.is_file() else ""
    if not number or shutil.which("scancel") is None:
        return
    say(f"job {number} of an earlier call, which did not see its end, is cancelled")
    subprocess.run(["scancel", number], check=False)
    began = time.monotonic()
    while True:
        # One that ended long ago is no longer known.
        done = subprocess.run(["squeue", "-h", "-j", number], capture_output=True, text=True, check=False)
        if not done.stdout.strip() and (done.returncode == 0 or "Invalid job id" in done.stderr):
            break
        if time.monotonic() - began > SILENT_S:
            raise RunError(f"job {number}, left by an earlier call, does not end; scancel it, then remove {note}")
        time.sleep(POLL_S[0])
    note.unlink(missing_ok=True)


def _wait_for_end(number: str, say: Callable[[str], None]) -> dict[str, str]:
    """Slurm's fields of a job that has ended. Raises RunError where it can never start, or slurmctld is silent."""
    pause, heard, told = POLL_S[0], time.monotonic(), ""
    while True:
        time.sleep(pause)
        pause = min(1.5 * pause, POLL_S[1])
        done = subprocess.run(["scontrol", "-o", "show", "job", number], capture_output=True, text=True, check=False)
        job = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
        state, why = job.get("JobState"), job.get("Reason", "None")
        if state in ENDED:
            return job
        if state == "PENDING" and why in NEVER:
            raise RunError(f"job {number} cannot start here: {why}")
        if state == "PENDING" and why not in ("None", told):
            say(f"job {number} waits: {why}")
            told = why
        if job:
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENT_S:
            raise RunError(f"job {number}: Slurm tells nothing of it: {done.stderr.strip() or 'no answer'}")
