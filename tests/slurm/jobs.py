"""A run as a Slurm job on the rig, and what must hold at its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rig.rig import ROOT, Rig, wait_until
from tiny import TINY, merge
from training.runs import assert_exact_samples, embed, run_place

from place.runlog import read_jsonl, read_surviving

SCRIPT = str(ROOT / "slurm" / "pretrain.sh")
# What a site writes into the #SBATCH header, for machines of two cores without a GPU.
SITE = ("--gpus-per-node=0", "--cpus-per-task=2", "--mem=3000", "--time=30")
CHAOS_EPOCHS = 40
SECTIONS: dict[str, Any] = {
    "data": {"num_canonical_nodes": 6},
    "engine": {"kind": "deepspeed", "zero_stage": 1},
    "train": {"global_batch": 48, "epochs": 12, "checkpoint_every_steps": 10, "evaluate_every_epochs": 6},
    "cluster": {"launcher": "ray", "rejoin_timeout_s": 90},
}


def write_run_config(pairs: Path, folder: Path) -> Path:
    """The config of a run in folder/run."""
    base = {"data": {"path": str(pairs)}, "run": {"dir": str(folder / "run")}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merge(merge(TINY, SECTIONS), base)))
    return path


def run_here(pairs: Path, folder: Path, *overrides: str, processes: int = 1) -> Path:
    """A run on this machine alone; returns its folder."""
    code, out, err = run_place(
        "pretrain", "--config", str(write_run_config(pairs, folder)), *overrides, processes=processes
    )
    assert code == 0, out + err
    return folder / "run"


class Job:
    """A run submitted with sbatch, and the files it writes. Final."""

    def __init__(self, rig: Rig, pairs: Path, folder: Path):
        self.rig, self.run, self.log = rig, folder / "run", folder / "job.log"
        self.config = write_run_config(pairs, folder)
        self.submitted = 0.0
        self.number = 0

    def submit(self, *overrides: str, site: tuple[str, ...] = (), **environ: str) -> Job:
        """sbatch over all machines."""
        nodes = (f"-N{self.rig.machines}", *SITE, *site)
        self.submitted = time.time()
        self.number = self.rig.submit(*nodes, SCRIPT, str(self.config), *overrides, log=self.log, **environ)
        return self

    def wait_for_step(self, step: int, attempt: int = 0, timeout_s: float = 300) -> None:
        """Until a step of an attempt, or of a later one, is logged."""

        def is_there() -> bool:
            state = self.rig.read_job(self.number).get("JobState")
            assert state not in ("FAILED", "COMPLETED", "CANCELLED"), f"{state}\n{self.log.read_text()}"
            return any(r["step"] >= step and r["attempt"] >= attempt for r in read_jsonl(self.run / "metrics.jsonl"))

        wait_until(is_there, timeout_s, f"step {step} of attempt {attempt}; log:\n{self.read_log()[-3000:]}")

    def wait_for_end(self, timeout_s: float = 600) -> dict[str, str]:
        """Slurm's fields at the end."""
        return self.rig.wait_for_end(self.number, timeout_s)

    def read_log(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def read_workers(self) -> list[dict[str, Any]]:
        """Host and process id of each rank of the newest attempt."""
        return read_workers(self.run)

    def count_attempts(self) -> int:
        return sum("workers" in record for record in read_jsonl(self.run / "attempts.jsonl"))


def read_workers(run: Path) -> list[dict[str, Any]]:
    """Host and process id of each rank of the newest attempt of a run."""
    return [record for record in read_jsonl(run / "attempts.jsonl") if "workers" in record][-1]["workers"]


def are_all_idle(rig: Rig) -> bool:
    """Whether every machine waits for jobs."""
    states = rig.ctl("sinfo", "-h", "-N", "-o", "%T", check=False).split()
    return states == ["idle"] * rig.machines


def assert_curve(ours: Path, theirs: Path, rel: float, last: int | None = None) -> None:
    """Losses of the surviving lineage, all or the last ones."""
    a, b = (read_surviving(run / "metrics.jsonl") for run in (ours, theirs))
    assert [record["step"] for record in a] == [record["step"] for record in b]
    for x, y in list(zip(a, b))[-last if last else None :]:
        for term in ("total", "instance", "pathology", "correlation"):
            assert x[term] == pytest.approx(y[term], rel=rel), f"step {x['step']}, {term}"


def assert_as_if_nothing_had_happened(job: Job, undisturbed: Path, pairs: Path) -> None:
    """The last losses, the embeddings and the samples of an undisturbed run; nothing left on any machine."""
    assert_curve(job.run, undisturbed, rel=1e-5, last=10)
    torch.testing.assert_close(embed(job.run, pairs), embed(undisturbed, pairs), rtol=0, atol=1e-4)
    assert_exact_samples(job.run, pairs)
    assert job.rig.list_leftovers() == []


def note_figure(request: pytest.FixtureRequest, name: str, value: float) -> None:
    """A measured figure, for the summary that the make target prints."""
    request.node.user_properties.append((name, round(value, 1)))
