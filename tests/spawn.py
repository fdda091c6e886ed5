"""Run a function in several gloo processes and collect what each returns.

They are forked from a server that has imported what is slow to import; the test process itself cannot fork once it has
run a backward pass.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["place.cluster.worker", "place.losses.objective", "deepspeed"]


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, lone_ranks: tuple[int, ...] = ()) -> list[Any]:
    """`function(*arguments)` on each of `world` ranks; results in order of ranks (tensors, numbers, dicts, lists).

    Args:
        lone_ranks: each gets a machine of its own, as far as shared memory and temporary files tell.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
        arguments = (world, folder, function, arguments, lone_ranks)
        mp.start_processes(_enter, arguments, nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _enter(
    rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple, lone_ranks: tuple[int, ...]
) -> None:
    mates = [rank] if rank in lone_ranks else [mate for mate in range(world) if mate not in lone_ranks]
    local = {"LOCAL_RANK": str(mates.index(rank)), "LOCAL_WORLD_SIZE": str(len(mates))}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), **local)
    if rank in lone_ranks:
        _leave_machine(Path(folder))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def can_leave_machine() -> bool:
    """Whether this user may have a mount namespace."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


def _leave_machine(shared: Path) -> None:
    """Shared memory and temporary files of its own, all but the folder that results go to."""
    libc, private = _unshare_mounts(), tempfile.mkdtemp(dir=shared)
    for folder in ("/dev/shm", private):
        assert not libc.mount(b"none", folder.encode(), b"tmpfs", 0, None)
    tempfile.tempdir = private


def join_machine(memory: Path) -> None:
    """Let a folder be this process's shared memory, as it is of all others that join it."""
    bind = 0x1000  # MS_BIND
    assert not _unshare_mounts().mount(str(memory).encode(), b"/dev/shm", None, bind, None)


def _unshare_mounts() -> ctypes.CDLL:
    new_mounts, private_mounts = 0x00020000, 0x44000  # CLONE_NEWNS; MS_REC | MS_PRIVATE
    libc = ctypes.CDLL(None)
    assert not libc.unshare(new_mounts)
    assert not libc.mount(b"none", b"/", None, private_mounts, None)
    return libc
