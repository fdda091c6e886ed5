"""Run `place` as a user does, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import yaml
from tiny import TINY, merge

from place.data.prepared import read_samples
from place.data.transforms import eval_transform, read_image
from place.runlog import read_surviving
from place.training.checkpoint import load_run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_config(folder: Path, data: Path, **sections: dict) -> Path:
    """A config file of a tiny run on `data`, in folder/run."""
    base = {
        "data": {"path": str(data)},
        "run": {"dir": str(folder / "run")},
        "train": {"global_batch": 32, "epochs": 3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merge(merge(TINY, base), sections)))
    return path


def start_place(*arguments: str, processes: int = 1) -> subprocess.Popen:
    """Start `place ...`, under torchrun where there are several processes."""
    module = ["-m", "place"]
    if processes > 1:
        module = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", *module]
    command = [sys.executable, *module, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run_place(*arguments: str, processes: int = 1) -> tuple[int, str, str]:
    """Run `place ...` to its end: exit code, standard output, standard error."""
    process = start_place(*arguments, processes=processes)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, timeout_s: float = 120) -> None:
    """Wait for a condition while a process runs; fails loudly when the process ends first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended with {process.returncode} before the condition held:\n{out}\n{err}")
        assert time.monotonic() < deadline, "condition did not hold in time"
        time.sleep(0.02)


def embed(run: Path, data: Path) -> torch.Tensor:
    """Image and report features of the first 64 validation pairs."""
    loaded = load_run(run, "latest")
    samples = list(islice(read_samples(data, "val"), 64))
    assert len(samples) == 64
    size = loaded.config.data.image_size_px
    images = torch.stack([eval_transform(read_image(s["image"]), size, loaded.mean, loaded.std) for s in samples])
    reports = [loaded.tokenizer.encode([item["text"] for item in s["sentences"]]) for s in samples]
    ids, attention, owner, _ = loaded.tokenizer.collate(reports)
    with torch.no_grad():
        text_BE = loaded.model.encode_text(ids, attention, owner).text_BE
        return torch.cat([loaded.model.encode_image(images).image_BE, text_BE], 1)


def assert_exact_samples(run: Path, data: Path) -> None:
    """Each epoch saw as many samples as it has, none twice, over the surviving lineage."""
    plan = json.loads((run / "run.json").read_text())["plan"]
    records = read_surviving(run / "samples.jsonl")
    assert [record["step"] for record in records] == list(range(1, plan["total_steps"] + 1))
    known = {sample["sample_id"] for sample in read_samples(data, "train")}
    for epoch in range(plan["epochs"]):
        seen = [i for record in records if record["epoch"] == epoch for i in record["ids"]]
        assert len(seen) == len(set(seen)) == plan["steps_per_epoch"] * plan["global_batch"]
        assert set(seen) <= known
