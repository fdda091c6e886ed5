"""The cluster run on three machines with a real Slurm: `make test-slurm`; the short one: `make test-slurm-short`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from rig.rig import ROOT, Rig, wait_until
from slurm.jobs import (
    SITE,
    Job,
    are_all_idle,
    assert_as_if_nothing_had_happened,
    assert_curve,
    assert_exact_samples,
    note_figure,
    read_workers,
)
from training.runs import embed

from place.runlog import read_jsonl

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


# ---- a job as it should be


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slurm_short), 2, 3])
def test_a_job_ends_completed_with_the_curve_of_one_process(
    job: Job, alone: Path, stage: int, request: pytest.FixtureRequest
) -> None:
    job.submit(f"engine.zero_stage={stage}", "train.epochs=3")
    end = job.wait_for_end()
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), job.read_log()
    first = next(read_jsonl(job.run / "metrics.jsonl"))
    note_figure(request, "sbatch to first step, s", first["time"] - job.submitted)
    assert_curve(job.run, alone, rel=1e-4)
    assert [worker["host"] for worker in job.read_workers()] == job.rig.names
    assert job.rig.list_leftovers() == []


def test_the_exit_code_of_a_failing_driver_is_the_jobs(job: Job) -> None:
    job.submit("train.global_batch=47")
    end = job.wait_for_end()
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0")
    assert "train.global_batch=47 is not divisible by 3 workers" in job.read_log()
    assert job.rig.list_leftovers() == []


def test_a_config_that_is_not_there_is_one_line(job: Job) -> None:
    job.config.unlink()
    job.submit()
    assert job.wait_for_end()["ExitCode"] == "2:0"
    assert re.fullmatch(r"pretrain.sh: config .* cannot be read from .*\n", job.read_log())


def test_a_cancelled_job_leaves_nothing_within_15_seconds(job: Job, request: pytest.FixtureRequest) -> None:
    job.submit().wait_for_step(20)
    job.rig.ctl("scancel", str(job.number))
    left: list[str] = []

    def is_gone() -> bool:
        left[:] = job.rig.list_leftovers()
        return not left

    gone = wait_until(is_gone, 15, "the machines to be as they were", left)
    note_figure(request, "scancel to nothing left, s", gone)
    assert job.wait_for_end(60)["JobState"] == "CANCELLED"


def test_a_ladder_of_node_counts_is_submitted_and_every_rung_has_the_same_curve(
    rig: Rig, pairs: Path, alone: Path, tmp_path: Path
) -> None:
    job = Job(rig, pairs, tmp_path)
    environ = {"PLACE_SBATCH": " ".join((*SITE, f"--output={job.log}")), "PLACE_SCALE_DIR": str(tmp_path)}
    told = rig.ctl(str(ROOT / "slurm/scale.sh"), "1 2", str(job.config), "train.epochs=3", **environ)
    jobs = [int(number) for number in re.findall(r"job (\d+)", told)]
    assert len(jobs) == 2
    for number in jobs:
        assert rig.wait_for_end(number, 600)["JobState"] == "COMPLETED", job.read_log()
    for count in (1, 2):
        assert_curve(tmp_path / f"nodes_{count}", alone, rel=1e-4)


def test_a_measured_ladder_runs_each_rung_as_a_job_and_one_that_is_cancelled_is_a_row(
    rig: Rig, pairs: Path, tmp_path: Path
) -> None:
    rungs = [{"workers": 3}, {"workers": 2, "nodes": 1}, {"workers": 12, "nodes": 12, "name": "too large"}]
    rungs += [{"workers": 2, "name": "wrong", "config": ["train.global_batch=47"]}]
    ladder = {"base": str(Job(rig, pairs, tmp_path).config), "folder": str(tmp_path / "scale"), "launcher": "slurm"}
    ladder |= {"rungs": rungs, "probes": [], "steps": 12, "warmup_steps": 4}
    path = tmp_path / "ladder.yaml"
    path.write_text(yaml.safe_dump(ladder))
    log = tmp_path / "scale.log"
    words = (sys.executable, "-m", "place", "scale", "--config", str(path))
    environ = {"PLACE_SBATCH": " ".join(SITE), "SLURM_CONF": str(rig.folder / "rig" / "slurm.conf")}
    started = rig.start_on("ctl", *words, log=log, **environ)

    def is_second_queued() -> bool:
        assert started.poll() is None, log.read_text()
        return log.read_text().count("is queued") == 2

    wait_until(is_second_queued, 300, "the second job", log)
    rig.ctl("scancel", re.findall(r"job (\d+) is queued", log.read_text())[1])
    assert started.wait(600) == 1, log.read_text()
    results = json.loads((tmp_path / "scale" / "scaling.json").read_text())
    rows = {row["rung"]: row for row in results["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "3 workers": "ok",
        "2 workers": "failed",
        "too large": "failed",
        "wrong": "failed",
    }
    assert "ended CANCELLED" in rows["2 workers"]["reason"]
    assert rows["too large"]["reason"].endswith("cannot start here: PartitionConfig")
    assert (
        "ended FAILED, 2: place pretrain: train.global_batch=47 is not divisible by 2 workers"
        in rows["wrong"]["reason"]
    )
    assert rig.ctl("squeue", "-h") == ""
    assert rows["3 workers"]["unexplained"] < 0.1
    assert 0 < rows["3 workers"]["start_s"] < 100
    assert [worker["host"] for worker in read_workers(tmp_path / "scale/3_workers/full0/run")] == rig.names
    again = rig.ctl(*words, check=False, **environ)
    assert again.count("is queued") == 3, "what was measured was done again"
    # As many epochs as no machine gets through before Slurm's warning, which comes within a minute.
    endless = [{"workers": 1, "config": ["train.epochs=5000"]}]
    path.write_text(yaml.safe_dump(ladder | {"rungs": endless, "steps": 60_000, "timeout_s": 60}))
    environ["PLACE_SBATCH"] = " ".join(word for word in SITE if not word.startswith("--time"))
    for signal_name, is_left in (("HUP", False), ("KILL", True)):
        # Its terminal went, then it was killed without a word.
        log = tmp_path / f"{signal_name}.log"
        started = rig.start_on("ctl", *words, log=log, **environ)
        wait_until(lambda log=log: "is queued" in log.read_text(), 300, "a job", log)
        rig.on("ctl", "pkill", f"-{signal_name}", "-f", f"place scale --config {path}")
        assert started.wait(60) != 0
        wait_until(lambda is_left=is_left: bool(rig.ctl("squeue", "-h")) == is_left, 60, "the job's end", log)
    last = rig.ctl(*words, check=False, **environ)
    assert "of an earlier call, which did not see its end, is cancelled" in last
    assert "it was stopped before its end, by the warning of its time limit" in last
    hosts = [worker["host"] for worker in read_workers(tmp_path / "scale/2_workers/full0/run")]
    assert (len(hosts), len(set(hosts))) == (2, 1), "pretrain.sh counted the nodes"
    assert rig.list_leftovers() == []


def test_doctor_looks_at_all_nodes_of_an_allocation(rig: Rig, pairs: Path, tmp_path: Path) -> None:
    ask = ("srun", f"-N{rig.machines}", "--ntasks-per-node=1", *SITE, f"--chdir={ROOT}", sys.executable, "-m", "place")
    config = Job(rig, pairs, tmp_path).config
    said = rig.ctl(*ask, "doctor", "--config", str(config), "--json", OMP_NUM_THREADS="1")
    findings = json.loads(said[said.index("[") :])
    by_check = {finding["check"]: finding for finding in findings}
    assert {finding["state"] for finding in findings} <= {"OK", "WARN", "SKIP"}, said
    assert by_check["shared folder"]["state"] == by_check["collectives"]["state"] == "OK", said
    assert sorted(by_check["shared folder"]["hosts"]) == sorted(rig.names), said
    assert f"on {rig.machines} nodes" in by_check["collectives"]["text"]
    wait_until(lambda: rig.list_leftovers() == [], 15, "an empty machine", said)


# ---- it is told to end, or something befalls it: the curve is the undisturbed one


def test_a_job_told_of_its_time_limit_saves_requeues_itself_and_goes_on(
    job: Job, undisturbed: Path, pairs: Path
) -> None:
    job.submit().wait_for_step(25)
    job.rig.ctl("scancel", "-b", "-s", "USR1", str(job.number))
    end = job.wait_for_end()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), job.read_log()
    assert "requeueing: SIGUSR1" in job.read_log()
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


def test_a_killed_worker_is_replaced(job: Job, undisturbed: Path, pairs: Path, request: pytest.FixtureRequest) -> None:
    job.submit().wait_for_step(33)
    victim = job.read_workers()[1]
    job.rig.kill(victim["host"], [victim["pid"]])
    began = time.monotonic()
    job.wait_for_step(34, attempt=1)
    note_figure(request, "killed worker to next step, s", time.monotonic() - began)
    assert job.wait_for_end()["JobState"] == "COMPLETED"
    assert "1 of 3 workers failed: rank 1 on h2 died" in job.read_log()
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


def test_a_machine_that_loses_power_and_comes_back_is_used_again(job: Job, undisturbed: Path, pairs: Path) -> None:
    job.submit().wait_for_step(33)
    job.rig.off("h3")
    time.sleep(5)
    job.rig.boot("h3")
    end = job.wait_for_end()
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), job.read_log()
    assert job.count_attempts() >= 2
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


def test_a_cable_cut_for_20_seconds_costs_a_restart_at_most(job: Job, undisturbed: Path, pairs: Path) -> None:
    job.submit().wait_for_step(33)
    job.rig.cut("h3")
    time.sleep(20)
    job.rig.heal("h3")
    end = job.wait_for_end()
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), job.read_log()
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


def test_a_killed_driver_ends_the_job_in_one_line_and_the_same_command_goes_on(
    job: Job, undisturbed: Path, pairs: Path
) -> None:
    job.submit().wait_for_step(33)
    job.rig.kill("h1", job.rig.find_pids("h1", "place pretrain --config"))
    end = job.wait_for_end()
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "137:0"), job.read_log()
    assert "the driver was killed (exit 137); submit the same command again" in job.read_log()
    assert job.rig.list_leftovers() == []
    end = job.submit().wait_for_end()
    assert end["JobState"] == "COMPLETED", job.read_log()
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


def test_a_dead_head_is_started_again_inside_the_job(job: Job, undisturbed: Path, pairs: Path) -> None:
    job.submit().wait_for_step(33)
    job.rig.kill("h1", job.rig.find_pids("h1", "gcs_server"))
    end = job.wait_for_end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), job.read_log()
    assert "Ray's head on h1 ended before the run did" in job.read_log()
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


def test_a_step_that_hangs_leaves_stacks_and_is_done_again(job: Job, undisturbed: Path, pairs: Path) -> None:
    job.submit("cluster.hang_timeout_s=20").wait_for_step(33)
    victim = job.read_workers()[2]
    job.rig.kill(victim["host"], [victim["pid"]], signal="STOP")
    assert job.wait_for_end()["JobState"] == "COMPLETED", job.read_log()
    assert "a step hung: 2 of 3 ranks wrote their stacks" in job.read_log()
    assert "rank 2 did not answer" in job.read_log()
    (folder,) = (job.run / "stacks").iterdir()
    stacks = [path.read_text() for path in sorted(folder.glob("rank_*.txt"))]
    assert all("in train" in stack for stack in stacks if stack)
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


def test_a_slow_rank_is_named_with_its_lag(job: Job) -> None:
    job.submit("run.log_every_steps=2", "train.epochs=60").wait_for_step(10)
    victim = job.read_workers()[1]

    def is_named() -> bool:
        job.rig.kill(victim["host"], [victim["pid"]], signal="STOP")
        time.sleep(0.4)
        job.rig.kill(victim["host"], [victim["pid"]], signal="CONT")
        records = list(read_jsonl(job.run / "metrics.jsonl"))
        return sum(r.get("straggler") == "rank 1 on h2" and r["lag_s"] > 0.1 for r in records) >= 3

    wait_until(is_named, 120, "the slow rank to be named three times")
    wait_until(lambda: "rank 1 on h2 is 0." in job.read_log(), 10, "the log to say so")


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    job: Job, undisturbed: Path, pairs: Path
) -> None:
    job.run = job.rig.small / "run"
    job.submit(f"run.dir={job.run}").wait_for_step(33)
    filler = job.rig.small / "filler"
    free = shutil.disk_usage(job.rig.small).free
    subprocess.run(["fallocate", "-l", str(free - (64 << 10)), filler], check=True)
    end = job.wait_for_end()
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "1:0"), job.read_log()
    (line,) = [line for line in job.read_log().splitlines() if line.startswith("place pretrain: ")]
    assert "disk" in line
    assert "start it again" in line or "start again" in line
    filler.unlink()
    assert job.submit(f"run.dir={job.run}").wait_for_end()["JobState"] == "COMPLETED", job.read_log()
    assert_as_if_nothing_had_happened(job, undisturbed, pairs)


# ---- fewer machines, and more again


def test_a_machine_that_stays_away_is_done_without(
    job: Job, undisturbed: Path, pairs: Path, request: pytest.FixtureRequest
) -> None:
    job.submit("cluster.min_nodes=2", "cluster.rejoin_timeout_s=20").wait_for_step(33)
    job.rig.off("h3")
    began = time.monotonic()
    job.wait_for_step(34, attempt=1)
    took_s = time.monotonic() - began
    note_figure(request, "machine off to next step on two, s", took_s)
    assert took_s < 120
    assert [worker["host"] for worker in job.read_workers()] == ["h1", "h2"]
    assert job.wait_for_end()["JobState"] == "COMPLETED", job.read_log()
    assert "going on with 2 workers on h1, h2" in job.read_log()
    # Two workers add up in another order than three.
    assert_curve(job.run, undisturbed, rel=1e-4)
    assert_exact_samples(job.run, pairs)
    job.rig.boot("h3")
    assert job.rig.list_leftovers() == [f"h3: /tmp/ray/place-{job.number}"]
    wait_until(lambda: are_all_idle(job.rig), 60, "the machine to be back")
    end = job.submit(f"run.dir={job.run.parent / 'next'}", "train.epochs=1").wait_for_end()
    assert end["JobState"] == "COMPLETED", job.read_log()
    assert job.rig.list_leftovers() == []


def test_a_machine_that_comes_back_is_taken_in_again(job: Job, undisturbed: Path, pairs: Path) -> None:
    job.submit("cluster.min_nodes=2", "cluster.rejoin_timeout_s=5", "cluster.grow_after_s=5", "train.epochs=24")
    job.wait_for_step(20)
    # What Slurm takes out of a job does not come back to it; 300 s is its default.
    with job.rig.waiting_for_nodes(300):
        job.rig.cut("h3")
        wait_until(lambda: "going on with 2 workers on h1, h2" in job.read_log(), 60, "the run to go on with two")
        job.rig.heal("h3")
        job.wait_for_step(21, attempt=1)
        assert len(job.read_workers()) == 2
        wait_until(lambda: len(job.read_workers()) == 3, 240, "three workers again")
        assert job.wait_for_end()["JobState"] == "COMPLETED", job.read_log()
    assert_exact_samples(job.run, pairs)


# ---- a standing cluster


class Standing(NamedTuple):
    """Ray on the three machines, as an administrator starts it."""

    address: str
    environ: dict[str, str]


@pytest.fixture
def standing(rig: Rig, tmp_path: Path) -> Any:
    environ = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "TMPDIR": "/tmp/ray",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    addresses = {name: rig.on(name, "hostname", "-I").split()[0] for name in rig.names}
    head = addresses["h1"]
    common = ["--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    dashboard = ["--include-dashboard=true", f"--dashboard-host={head}"]
    for name, address in addresses.items():
        role = ["--head", *dashboard] if name == "h1" else [f"--address={head}:6379"]
        command = " ".join(["exec ray start", f"--node-ip-address={address}", *role, *common])
        wait = "" if name == "h1" else f"until (exec 3<>/dev/tcp/{head}/6379) 2>/dev/null; do sleep 0.5; done; "
        rig.start_on(name, "bash", "-c", wait + command, log=tmp_path / f"ray.{name}.log", **environ)
    yield Standing(f"http://{head}:8265", environ)
    for name in rig.names:
        rig.on(name, str(Path(sys.executable).with_name("ray")), "stop", "--force", check=False)
    left: list[str] = []

    def is_gone() -> bool:
        left[:] = [line for line in rig.list_leftovers() if "process" in line]
        return not left

    wait_until(is_gone, 60, "Ray to be gone", left)


def run_ray(rig: Rig, standing: Standing, *arguments: str, timeout_s: float = 300, **environ: str) -> tuple[int, str]:
    """`ray ...` on the head's machine: exit code and what it printed."""
    done = subprocess.run(
        [ROOT / "tests/rig/hosts.sh", "exec", "h1", "ray", *arguments],
        env={**rig.environ, **standing.environ, "RAY_API_SERVER_ADDRESS": standing.address, **environ},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    return done.returncode, done.stdout + done.stderr


def submit_job(rig: Rig, standing: Standing, job: Job, name: str, *overrides: str) -> None:
    """`ray job submit` as the README says, on three workers."""

    def is_taken() -> bool:
        code, out = run_ray(
            rig, standing, "job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml",
            "--submission-id", name, "--no-wait", "--", "python", "-m", "place", "pretrain",
            "--config", str(job.config), "cluster.num_workers=3", *overrides,
        )  # fmt: skip
        said.append(out)
        return code == 0

    said: list[str] = []
    wait_until(is_taken, 120, "the job server to take a job", said)


def wait_for_end(rig: Rig, standing: Standing, name: str, timeout_s: float) -> None:
    """Wait for a job's end, however it ended; Ray's words are "succeeded", "failed" or "was stopped"."""
    said = [""]

    def is_ended() -> bool:
        time.sleep(2)  # each look starts a Python with Ray: more often would slow the run down
        said[0] = run_ray(rig, standing, "job", "status", name)[1]
        return any(word in said[0] for word in ("succeeded", "failed", "was stopped"))

    wait_until(is_ended, timeout_s, f"the job {name} to end", said)


def test_a_job_on_a_standing_cluster_ends_with_the_same_curve(
    rig: Rig, standing: Standing, pairs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    job = Job(rig, pairs, tmp_path)
    submit_job(rig, standing, job, "one")
    wait_for_end(rig, standing, "one", 400)
    assert "succeeded" in run_ray(rig, standing, "job", "status", "one")[1]
    assert_curve(job.run, undisturbed, rel=1e-5, last=10)
    torch.testing.assert_close(embed(job.run, pairs), embed(undisturbed, pairs), rtol=0, atol=1e-4)
    assert len({worker["host"] for worker in job.read_workers()}) == 3
    code, out = run_ray(rig, standing, "job", "list", RAY_AUTH_TOKEN="f" * 64)
    assert code != 0
    assert "Invalid authentication token" in out


@pytest.mark.parametrize("way", ["ray job stop", "place runs stop"])
def test_a_job_that_is_stopped_saves_a_checkpoint_first(
    way: str, rig: Rig, standing: Standing, pairs: Path, tmp_path: Path
) -> None:
    job = Job(rig, pairs, tmp_path)
    submit_job(rig, standing, job, "two", "train.epochs=200")
    wait_until(lambda: any(r["step"] >= 15 for r in read_jsonl(job.run / "metrics.jsonl")), 300, "step 15")
    if way == "ray job stop":
        assert "was stopped" in run_ray(rig, standing, "job", "stop", "two")[1]
    else:
        rig.on("h1", sys.executable, "-m", "place", "runs", "stop", str(job.run))
        wait_for_end(rig, standing, "two", 120)
    last = max(record["step"] for record in read_jsonl(job.run / "metrics.jsonl"))
    assert int((job.run / "checkpoints" / "latest").read_text().removeprefix("step_")) == last >= 15
    assert "checkpoint saved" in run_ray(rig, standing, "job", "logs", "two")[1]
