"""The world of a training process and the few collectives that the losses need; each is an identity at world size 1."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """Where this process stands: rank of world, local_rank of local_world on its node."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def is_first(self) -> bool:
        """True on rank 0, the only one that writes shared files."""
        return self.rank == 0


def read_world() -> World:
    """The world as it is now: the process group's, or a single process. Source: ours."""
    if not is_distributed():
        return World(0, 1, 0, 1)
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_world)


def choose_device() -> torch.device:
    """This process's GPU, or the CPU; by LOCAL_RANK, so that it can be asked before the ranks have met."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


class Node(NamedTuple):
    """Where this process stands among the size processes that share its machine's shared memory.

    `device` tells that memory from others of the same machine, which containers may have.
    """

    rank: int
    size: int
    device: int

    @property
    def is_first(self) -> bool:
        """True for the one that sets up and cleans up for the others."""
        return self.rank == 0


def read_node() -> Node:
    """This process's node, by what it shares and not by what the launcher says: a collective call.

    Launchers number local ranks by their own nodes, of which a machine may hold several, and not all of one size.
    Source: ours.
    """
    shared = os.stat("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
    records = gather_objects({"boot": _read_boot(), "device": shared.st_dev, "rank": read_world().rank})
    mine = records[read_world().rank]
    mates = [record["rank"] for record in records if {**record, "rank": 0} == {**mine, "rank": 0}]
    return Node(mates.index(mine["rank"]), len(mates), mine["device"])


def _read_boot() -> str:
    """What tells one machine from another: host names are not unique, boots are."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def is_distributed() -> bool:
    """True when a process group exists; asked at call time."""
    return dist.is_available() and dist.is_initialized()


def gather(tensor: Tensor) -> Tensor:
    """Concatenate equal-shaped tensors of all ranks along the first dimension, without gradient."""
    if not is_distributed() or dist.get_world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Concatenate equal-shaped tensors of all ranks along the first dimension; gradients of all ranks come back summed.

    With each rank's loss a mean over its own rows and gradients averaged over ranks, as DeepSpeed does, the encoders
    get the gradient of the loss over the global batch. Source: inferred (open_clip issues 616 and 894).
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over all ranks, without gradient."""
    if not is_distributed() or dist.get_world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(value: int, device: torch.device) -> int:
    """Largest of all ranks' values; the exchange takes place on the device."""
    if not is_distributed() or dist.get_world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def average_global(total: Tensor, count: Tensor) -> Tensor:
    """This rank's share of a mean over the global batch: the mean of it over ranks is all totals by all counts.

    Without anything to count it is 0.
    """
    return total * read_world().world / sum_over_ranks(count).clamp(min=1)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over all ranks, without gradient."""
    return sum_over_ranks(tensor) / read_world().world


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()


def broadcast_text(text: str | None) -> str | None:
    """What rank 0 says, on every rank."""
    if not is_distributed():
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Small JSON-like values of all ranks, in order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
