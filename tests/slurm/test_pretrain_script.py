"""What slurm/pretrain.sh says before it starts anything, with a Slurm that only describes the job."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from rig.rig import ROOT

SCRIPT = ROOT / "slurm" / "pretrain.sh"


def run_script(folder: Path, limit: str) -> list[str]:
    """The lines of a job of this time limit, which ends as PLACE_ROOT is no checkout."""
    scontrol = folder / "scontrol"
    described = f"JobId=7 JobName=place RunTime=00:00:01 TimeLimit={limit} TimeMin=N/A Command={SCRIPT} WorkDir=/"
    scontrol.write_text(f"#!/bin/sh\necho '{described}'\n")
    scontrol.chmod(0o755)
    environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PLACE_ROOT": str(folder)}
    config = str(ROOT / "configs" / "demo.yaml")
    done = subprocess.run(["bash", SCRIPT, config], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 2
    assert done.stderr == f"pretrain.sh: {folder} is no checkout of PLACE (no slurm/ray_node.sh); set PLACE_ROOT\n"
    return done.stdout.splitlines()


@pytest.mark.parametrize("limit", ["00:02:00", "00:09:59"])
def test_a_time_limit_that_the_signal_comes_too_early_for_is_one_line(limit: str, tmp_path: Path) -> None:
    (line,) = run_script(tmp_path, limit)
    assert f"the time limit is {limit}" in line
    assert "--time=30 or more, or with --signal=B:USR1@60" in line


@pytest.mark.parametrize("limit", ["00:10:00", "1-00:05:00", "02:05:00", "UNLIMITED"])
def test_a_longer_time_limit_is_not_spoken_of(limit: str, tmp_path: Path) -> None:
    assert run_script(tmp_path, limit) == []
