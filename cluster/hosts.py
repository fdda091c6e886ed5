"""The hosts of a Ray cluster that a worker group can be started on, now or within a while."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from place.cluster.topology import Topology, count_rooms, describe_room, place_workers, read_ray

from place.config import Config, UsageError
from place.training.plan import build_plan

NODE_LABEL = "ray.io/node-id"
_CLEAN_TIMEOUT_S = 20.0


class Hosts(NamedTuple):
    """A node of Ray for each rank, ranks of one node side by side."""

    ray_ids: list[str]
    names: list[str]
    use_gpu: bool

    def describe(self) -> str:
        """The names, each once."""
        return ", ".join(dict.fromkeys(self.names))


def find_hosts(config: Config, wait_s: float, is_off: Callable[[], bool] = lambda: False) -> Hosts | None:
    """Hosts for all workers; after `wait_s`, with cluster.min_nodes set, for as many as there is room for.

    Args:
        is_off: asked while waiting; true gives up.
    Returns:
        None where there are too few.
    """
    deadline = time.monotonic() + wait_s
    while True:
        topology = _read_topology()
        found = _lay_out(topology, config, config.cluster.num_workers, config.cluster.num_nodes)
        if found is not None:
            return found
        if is_off():
            return None
        if time.monotonic() >= deadline:
            return _lay_out_fewer(topology, config)
        time.sleep(0.5)


def describe_lack(config: Config, waited_s: float) -> str:
    """What is there against what is needed."""
    cluster, topology = config.cluster, _read_topology()
    room = describe_room(topology, cluster.cpus_per_worker)
    where = f" on cluster.num_nodes={cluster.num_nodes} nodes" if cluster.num_nodes else ""
    where += f", on at least cluster.min_nodes={cluster.min_nodes} nodes" if cluster.min_nodes else ""
    return (
        f"cluster.num_workers={cluster.num_workers} of {cluster.cpus_per_worker} CPU cores each{where}: after "
        f"{waited_s:.0f} s there is {topology.describe()}, with {room}, equally many on each node; lower "
        "cluster.num_workers or cluster.cpus_per_worker, or add nodes"
    )


def clean_hosts(run_dir: Path) -> None:
    """Remove what killed workers of this run left on the other hosts of the cluster."""
    import ray

    from place.node import clean_node

    if not ray.is_initialized():
        return
    task = ray.remote(num_cpus=0, max_retries=0)(clean_node)
    ids = [node.ray_id for node in _read_topology().nodes]
    tasks = [task.options(label_selector={NODE_LABEL: ray_id}).remote(run_dir) for ray_id in ids]
    ray.wait(tasks, num_returns=len(tasks), timeout=_CLEAN_TIMEOUT_S)


def _lay_out_fewer(topology: Topology, config: Config) -> Hosts | None:
    cluster = config.cluster
    if cluster.min_nodes is None:
        return None
    room = sum(count_rooms(topology, cluster.cpus_per_worker))
    plan = json.loads((Path(config.run.dir) / "run.json").read_text())["plan"]
    for size in range(min(cluster.num_workers, room), 0, -1):
        found = _lay_out(topology, config, size) if _can_share(config, plan, size) else None
        if found is not None and len({*found.ray_ids}) >= cluster.min_nodes:
            return found
    return None


def _can_share(config: Config, plan: dict[str, Any], num_workers: int) -> bool:
    """Whether so many workers can share out the batches of a run with this plan."""
    with contextlib.suppress(UsageError):
        build_plan(config, num_workers, plan["num_samples"], plan["num_val_samples"])
        return True
    return False


def _lay_out(topology: Topology, config: Config, num_workers: int, num_nodes: int | None = None) -> Hosts | None:
    try:
        counts = place_workers(topology, num_workers, config.cluster.cpus_per_worker, num_nodes)
    except UsageError:
        return None
    nodes = [node for node, count in zip(topology.nodes, counts) for _ in range(count)]
    use_gpu = any(node.gpus for node in topology.nodes)
    return Hosts([node.ray_id for node in nodes], [node.name for node in nodes], use_gpu)


def _read_topology() -> Topology:
    """The nodes that Ray calls alive and that answer: Ray learns of a dead host some seconds later than its workers."""
    import ray

    nodes = ray.nodes()
    return read_ray([{**node, "Alive": node["Alive"] and _answers(node)} for node in nodes])


def _answers(node: dict) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=2).close()
        return True
    return False
