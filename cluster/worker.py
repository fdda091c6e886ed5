"""One worker of a launched run: threads, engine, and one clear line when it gives up."""

from __future__ import annotations

import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from place.cluster.deepspeed_engine import DeepSpeedEngine
from place.cluster.metrics import RayMetrics
from place.cluster.topology import read_sockets, share_cores

from place.config import Config, PassingError, RunError, UsageError
from place.distributed import World, broadcast_text, choose_device, is_distributed, read_world
from place.kept import write_text
from place.training.engine import TorchEngine
from place.training.pretrain import BuildEngine, run_worker
from place.training.start import new_launch

ENGINES: dict[str, BuildEngine] = {"deepspeed": DeepSpeedEngine, "torch": TorchEngine}


def run_guarded(config: Config, launch: str) -> None:
    """Run a worker and write outcome.json.

    What a user did wrong would fail again after a restart: where it is written down, the launcher starts no other
    worker group.
    """
    path = Path(config.run.dir) / "outcome.json"
    torch.set_num_threads(config.cluster.cpus_per_worker)
    _bind_cores(config)
    try:
        outcome = {"outcome": run_worker(config, launch, ENGINES[config.engine.kind], [RayMetrics(path.parent)])}
    except PassingError:
        raise  # a worker group that starts anew may not meet it
    except (UsageError, RunError) as error:
        kind = "UsageError" if isinstance(error, UsageError) else "RunError"
        write_text(path, json.dumps({"launch": launch, "outcome": "failed", "kind": kind, "message": str(error)}))
        # Ray ends the whole group once it hears of this: ranks that fail alike write and close their files first.
        time.sleep(0.5)
        raise
    if read_world().is_first:
        write_text(path, json.dumps({"launch": launch, "pid": os.getpid(), **outcome}))


def _bind_cores(config: Config) -> None:
    """On a host with GPUs, keep this worker and its loader processes to cores of their own."""
    world = read_world()
    if config.cluster.bind_cores and torch.cuda.is_available() and world.local_world > 1:
        os.sched_setaffinity(0, share_cores(read_sockets(), world.local_rank, world.local_world))


def join_torchrun(config: Config) -> World:
    """Join the process group that torchrun's environment describes. Raises UsageError outside torchrun."""
    if "RANK" not in os.environ:
        raise UsageError(
            "cluster.launcher=torchrun: no RANK in the environment; start with torchrun -m place pretrain ..."
        )
    # Before the first collective, which would begin on GPU 0 of every rank.
    backend = "nccl" if choose_device().type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.cluster.timeout_s))
    return read_world()


def run_alone(config: Config) -> str:
    """Run this process's worker without Ray; a process alone gets a group of one where DeepSpeed wants one."""
    launch = broadcast_text(new_launch()) or ""
    torch.set_num_threads(config.cluster.cpus_per_worker)
    _bind_cores(config)
    with tempfile.TemporaryDirectory() as folder:
        alone = config.engine.kind == "deepspeed" and not is_distributed()
        if alone:
            # DeepSpeed asks the environment, not the group.
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            return run_worker(config, launch, ENGINES[config.engine.kind])
        finally:
            if alone:
                dist.destroy_process_group()
