"""The machines of a job as Slurm, Ray or this host describe them, and how workers are laid over them.

topology = read_slurm(os.environ) or read_ray(ray.nodes()) or read_host()
topology.nodes[0].gpus, topology.describe()
place_workers(topology, num_workers=16, cpus_per_worker=12)     # workers of each node, in order of nodes
share_cores(read_sockets(), local_rank=3, local_world=8)        # cores of one worker, inside one socket
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from place.config import UsageError


class Node(NamedTuple):
    """A machine; `sockets` is 0 where nobody says."""

    name: str
    address: str
    cpus: int
    gpus: int
    sockets: int = 0
    ray_id: str = ""
    """What Ray calls it; empty where Ray does not run."""


class Topology(NamedTuple):
    """Machines in the order of their ranks, and who said so: `slurm`, `ray` or `host`."""

    nodes: list[Node]
    source: str

    def describe(self) -> str:
        """One line: alike machines are counted together."""
        kinds: dict[tuple[int, int, int], int] = {}
        for node in self.nodes:
            kind = (node.cpus, node.gpus, node.sockets)
            kinds[kind] = kinds.get(kind, 0) + 1
        said = [f"{count} x ({_describe(*kind)})" for kind, count in kinds.items()]
        return f"{_count(len(self.nodes), 'node')} by {self.source}: {' + '.join(said) or 'none'}"


def read_slurm(environ: Mapping[str, str]) -> Topology | None:
    """The nodes of the Slurm job whose environment this is; None outside a job.

    CPU counts are those granted to the job; GPUs are taken as equal on all nodes, as `--gpus-per-node` makes them.
    Source: sbatch's manual, output environment variables.
    """
    names = expand_hosts(environ.get("SLURM_JOB_NODELIST", ""))
    if not names:
        return None
    cpus = _expand_counts(environ.get("SLURM_JOB_CPUS_PER_NODE", "1"), len(names))
    gpus = _read_gpus(environ)
    return Topology([Node(name, name, count, gpus) for name, count in zip(names, cpus)], "slurm")


def read_ray(nodes: list[dict[str, Any]]) -> Topology:
    """The living nodes of a Ray cluster, from `ray.nodes()`; the head first, the others by name."""
    alive = [node for node in nodes if node["Alive"]]
    alive.sort(key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeManagerHostname"]))
    return Topology(
        [
            Node(
                node["NodeManagerHostname"],
                node["NodeManagerAddress"],
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
                ray_id=node["NodeID"],
            )
            for node in alive
        ],
        "ray",
    )


def read_host() -> Topology:
    """This machine alone: the cores this process may use, and the GPUs torch sees."""
    import torch

    sockets = read_sockets()
    cores = sum(len(cores) for cores in sockets)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Topology([Node(socket.gethostname(), "127.0.0.1", cores, gpus, len(sockets))], "host")


def read_sockets(root: Path = Path("/sys/devices/system/cpu")) -> list[list[int]]:
    """Cores of each CPU socket that this process may use; one socket where the kernel does not say."""
    by_socket: dict[str, list[int]] = {}
    for core in sorted(os.sched_getaffinity(0)):
        mark = root / f"cpu{core}" / "topology" / "physical_package_id"
        by_socket.setdefault(mark.read_text().strip() if mark.is_file() else "0", []).append(core)
    return list(by_socket.values())


def count_rooms(topology: Topology, cpus_per_worker: int) -> list[int]:
    """How many workers fit on each node: one a GPU where there are GPUs, else by cores."""
    with_gpus = any(node.gpus for node in topology.nodes)
    by_cores = [node.cpus // cpus_per_worker for node in topology.nodes]
    return [min(cores, node.gpus) if with_gpus else cores for cores, node in zip(by_cores, topology.nodes)]


def describe_room(topology: Topology, cpus_per_worker: int) -> str:
    """How many workers fit on all nodes together, and whether it is GPUs that let no more in."""
    room, by_cores = sum(count_rooms(topology, cpus_per_worker)), sum(n.cpus // cpus_per_worker for n in topology.nodes)
    return f"room for {_count(room, 'worker')}" + (", one a GPU" if room < by_cores else "")


def place_workers(
    topology: Topology, num_workers: int, cpus_per_worker: int, num_nodes: int | None = None
) -> list[int]:
    """Workers of each node, equally many on each that has any.

    Args:
        num_nodes: how many have any; none takes as few as hold them where there are GPUs, whose links inside a node
            are fast, else as many as there are.
    Raises:
        UsageError: they do not fit, or not equally: DeepSpeed's groups inside a node want nodes of equal size.
    Source: ours.
    """
    rooms = count_rooms(topology, cpus_per_worker)
    counts = list(range(1, len(rooms) + 1)) if num_nodes is None else [num_nodes]
    if not any(node.gpus for node in topology.nodes):
        counts.reverse()
    for count in counts:
        per_node = num_workers // count
        chosen = [index for index, room in enumerate(rooms) if room >= per_node > 0][:count]
        if num_workers % count == 0 and len(chosen) == count:
            return [per_node if index in chosen else 0 for index in range(len(rooms))]
    raise UsageError(
        f"cluster.num_workers={num_workers} of {cpus_per_worker} CPU cores do not fit equally on "
        f"{f'{num_nodes} of ' if num_nodes else ''}{topology.describe()}; there is room for {rooms} workers a node"
    )


def share_cores(sockets: list[list[int]], local_rank: int, local_world: int) -> list[int]:
    """The cores of one worker: neighbours of one socket where the workers divide over sockets, none shared."""
    if local_world % len(sockets) == 0 and len({len(cores) for cores in sockets}) == 1:
        per_socket = local_world // len(sockets)
        cores, rank, world = sockets[local_rank // per_socket], local_rank % per_socket, per_socket
    else:
        cores, rank, world = [core for cores in sockets for core in cores], local_rank, local_world
    if len(cores) < world:
        return cores
    share = len(cores) // world
    return cores[rank * share : (rank + 1) * share]


def expand_hosts(listing: str) -> list[str]:
    """Slurm's short form of host names: `a[1-3,7],b` gives a1 a2 a3 a7 b; zeros in front are kept."""
    names = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", listing):
        parts = re.split(r"\[([^\]]*)\]", item)
        found = [parts[0]]
        for ranges, tail in zip(parts[1::2], parts[2::2]):
            found = [f"{name}{number}{tail}" for name in found for number in _expand_ranges(ranges)]
        names += found
    return names


def _expand_ranges(ranges: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
    return numbers


def _expand_counts(listing: str, num_nodes: int) -> list[int]:
    """Slurm's `64(x3),32` as [64, 64, 64, 32]."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listing):
        counts += [int(number)] * int(times or 1)
    return (counts + counts[-1:] * num_nodes)[:num_nodes]


def _read_gpus(environ: Mapping[str, str]) -> int:
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        number = re.search(r"(\d+)$", environ.get(name, ""))
        if number:
            return int(number[1])
    return 0


def _describe(cpus: int, gpus: int, sockets: int) -> str:
    parts = [_count(cpus, "core"), _count(gpus, "GPU")] + ([_count(sockets, "socket")] if sockets else [])
    return ", ".join(parts)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
