"""Workers that torchrun started: a GPU and cores of their own, and a checkpoint when torchrun is told to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from place.cluster import worker
from place.cluster.topology import read_sockets, share_cores
from tiny import build_tiny_config
from training.runs import start_place, wait_until, write_config

from place.distributed import World
from place.runlog import read_jsonl
from place.training.checkpoint import find_checkpoint


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A host with four GPUs, as far as torch says; what is asked of it, in order."""
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: asked.append(("group", backend)))
    return asked


@pytest.mark.parametrize(("local_rank", "device"), [(0, 0), (3, 3), (5, 1)])
def test_a_rank_takes_its_gpu_before_it_joins_the_group(
    local_rank: int, device: int, four_gpus: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    worker.join_torchrun(build_tiny_config())
    assert four_gpus == [("device", device), ("group", "nccl")]


@pytest.mark.parametrize("binds", [True, False])
def test_ranks_with_gpus_keep_to_cores_of_their_own(
    binds: bool, four_gpus: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    monkeypatch.setattr(worker, "read_world", lambda: World(3, 4, 1, 2))
    monkeypatch.setattr(worker, "run_worker", lambda *_: "done")
    config = build_tiny_config(cluster={"bind_cores": binds, "cpus_per_worker": torch.get_num_threads()})
    assert worker.run_alone(config) == "done"
    assert bound == ([share_cores(read_sockets(), 1, 2)] if binds else [])


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_leaves_a_checkpoint(number: signal.Signals, prepared: Path, tmp_path: Path) -> None:
    train = {"epochs": 400, "checkpoint_every_steps": 10_000}
    config = write_config(tmp_path, prepared, cluster={"launcher": "torchrun"}, train=train)
    run = tmp_path / "run"
    process = start_place("pretrain", "--config", str(config), "data.num_workers=1", processes=2)
    wait_until(lambda: any(record["step"] >= 3 for record in read_jsonl(run / "metrics.jsonl")), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "[rank" not in err, f"a rank failed:\n{err}"
    *_, ended = read_jsonl(run / "attempts.jsonl")
    assert ended == {**ended, "outcome": "stopped", "why": number.name}
    assert find_checkpoint(run)[0] is not None
