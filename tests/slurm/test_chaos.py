"""Twenty random faults over one run: `make chaos`; PLACE_CHAOS_FAULTS and PLACE_CHAOS_SEED choose others."""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.jobs import CHAOS_EPOCHS, Job, assert_exact_samples, note_figure

from place.runlog import read_jsonl, read_surviving

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(4 * 3600)]
FAULTS = int(os.environ.get("PLACE_CHAOS_FAULTS", "20"))
SEED = int(os.environ.get("PLACE_CHAOS_SEED", "0"))


def kill_worker(job: Job, rng: random.Random) -> str:
    victim = rng.choice(job.read_workers())
    job.rig.kill(victim["host"], [victim["pid"]])
    return f"worker on {victim['host']} killed"


def kill_raylet(job: Job, rng: random.Random) -> str:
    host = rng.choice(["h2", "h3"])
    job.rig.kill(host, job.rig.find_pids(host, "raylet/raylet"))
    return f"Ray on {host} killed"


def freeze_worker(job: Job, rng: random.Random) -> str:
    victim = rng.choice(job.read_workers())
    job.rig.kill(victim["host"], [victim["pid"]], signal="STOP")
    return f"worker on {victim['host']} frozen"


def cut_cable(job: Job, rng: random.Random) -> str:
    host, length_s = rng.choice(["h2", "h3"]), rng.choice([2, 20])
    job.rig.cut(host)
    time.sleep(length_s)
    job.rig.heal(host)
    return f"{host} cut for {length_s} s"


def lose_power(job: Job, rng: random.Random) -> str:
    host = rng.choice(["h2", "h3"])
    job.rig.off(host)
    time.sleep(3)
    job.rig.boot(host)
    return f"{host} without power for 3 s"


def kill_head(job: Job, _: random.Random) -> str:
    job.rig.kill("h1", job.rig.find_pids("h1", "gcs_server"))
    return "Ray's head killed"


def near_time_limit(job: Job, _: random.Random) -> str:
    job.rig.ctl("scancel", "-b", "-s", "USR1", str(job.number))
    return "told of its time limit"


DOINGS: list[Callable[[Job, random.Random], str]] = [
    kill_worker,
    kill_worker,
    kill_raylet,
    freeze_worker,
    cut_cable,
    lose_power,
    kill_head,
    near_time_limit,
]


def newest_step(job: Job) -> int:
    return max((record["step"] for record in read_jsonl(job.run / "metrics.jsonl")), default=0)


def has_ended(job: Job) -> bool:
    """Looks at the job; one that queued itself again is started at once instead of after two minutes."""
    fields = job.rig.read_job(job.number)
    if fields.get("JobState") == "PENDING" and fields.get("Restarts") != "0":
        job.rig.ctl("scontrol", "update", f"jobid={job.number}", "StartTime=now", check=False)
    return fields.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def wait_for_new_step(job: Job, beyond: int) -> None:
    while newest_step(job) <= beyond and not has_ended(job):
        time.sleep(0.3)


def list_lost_s(job: Job, faults_at: list[float]) -> list[float]:
    """For each fault the longest wait for a new step before the next fault, beyond the usual one, in seconds.

    A fault often shows only some steps later, when the death of a host has been noticed.
    """
    newest, came = 0, []
    for record in read_jsonl(job.run / "metrics.jsonl"):
        if record["step"] > newest:
            newest = record["step"]
            came.append(record["time"])
    gaps = [(before, after - before) for before, after in itertools.pairwise(came)]
    usual = statistics.median(gap for _, gap in gaps)
    bounds = [*faults_at, came[-1]]
    lost = []
    for fault, following in itertools.pairwise(bounds):
        seen = [gap for before, gap in gaps if before + gap > fault and before < following]
        lost.append(max(seen) - usual)
    return lost


def test_twenty_random_faults_cost_time_and_nothing_else(
    job: Job, pairs: Path, long_undisturbed: Path, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(SEED)
    limits = ("cluster.hang_timeout_s=20", "cluster.max_failures=6")
    job.submit(f"train.epochs={CHAOS_EPOCHS}", *limits, PLACE_MAX_HEAD_RESTARTS="30")
    job.wait_for_step(3)
    total = CHAOS_EPOCHS * json.loads((job.run / "run.json").read_text())["plan"]["steps_per_epoch"]
    assert total >= 300
    faults_at: list[float] = []
    while len(faults_at) < FAULTS and not has_ended(job):
        # Spread over the run: the next fault comes once its share of the steps is done, never before the last is over.
        wait_for_new_step(job, max(newest_step(job) + 2, int(total * 0.9 * len(faults_at) / FAULTS)))
        before = newest_step(job)
        faults_at.append(time.time())
        what = rng.choice(DOINGS)(job, rng)
        wait_for_new_step(job, before + 1)
        print(f"{len(faults_at):>2}  step {before:>4}  {what}", flush=True)
    end = job.wait_for_end(timeout_s=1800)
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), job.read_log()[-4000:]
    assert len(faults_at) == FAULTS
    lost_s = list_lost_s(job, faults_at)
    print("lost, s:", ", ".join(f"{lost:.0f}" for lost in lost_s))
    for name, value in (("median", statistics.median(lost_s)), ("max", max(lost_s))):
        note_figure(request, f"time lost per fault, {name}, s", value)
    assert_exact_samples(job.run, pairs)
    ours, theirs = (read_surviving(run / "metrics.jsonl")[-1] for run in (job.run, long_undisturbed))
    assert ours["total"] == pytest.approx(theirs["total"], rel=1e-4)
    assert job.rig.list_leftovers() == []
