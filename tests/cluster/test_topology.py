"""What a job runs on, as Slurm and Ray tell it, and how workers are laid over it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from place.cluster import hosts
from place.cluster.hosts import _lay_out_fewer
from place.cluster.topology import (
    Node,
    Topology,
    describe_room,
    expand_hosts,
    place_workers,
    read_host,
    read_ray,
    read_slurm,
    read_sockets,
    share_cores,
)
from tiny import build_tiny_config

from place.config import UsageError
from place.training.plan import build_plan

TWO_SOCKETS = [[0, 1, 2, 3], [4, 5, 6, 7]]


def build_topology(*sizes: tuple[int, int]) -> Topology:
    return Topology([Node(f"h{n}", f"10.0.0.{n}", cpus, gpus) for n, (cpus, gpus) in enumerate(sizes)], "slurm")


@pytest.mark.parametrize(
    ("listing", "names"),
    [
        ("h1", ["h1"]),
        ("h[1-3,7],gpu-x", ["h1", "h2", "h3", "h7", "gpu-x"]),
        ("n[008-010]", ["n008", "n009", "n010"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("", []),
    ],
)
def test_slurms_short_form_of_host_names_is_spelt_out(listing: str, names: list[str]) -> None:
    assert expand_hosts(listing) == names


def test_a_slurm_job_tells_its_nodes_cores_and_gpus() -> None:
    found = read_slurm(
        {
            "SLURM_JOB_NODELIST": "h[1-3],big",
            "SLURM_JOB_CPUS_PER_NODE": "64(x3),128",
            "SLURM_GPUS_PER_NODE": "h100:8",
        }
    )
    assert found is not None
    assert [(node.name, node.cpus, node.gpus) for node in found.nodes] == [
        ("h1", 64, 8),
        ("h2", 64, 8),
        ("h3", 64, 8),
        ("big", 128, 8),
    ]
    assert found.describe() == "4 nodes by slurm: 3 x (64 cores, 8 GPUs) + 1 x (128 cores, 8 GPUs)"


def test_outside_a_slurm_job_there_is_no_slurm_topology() -> None:
    assert read_slurm({"HOME": "/"}) is None


def test_a_ray_cluster_tells_its_living_nodes_with_the_head_first() -> None:
    def build_node(name: str, alive: bool, **resources: float) -> dict:
        return {
            "NodeID": name + "-id",
            "NodeManagerHostname": name,
            "NodeManagerAddress": name + "-ip",
            "Alive": alive,
            "Resources": resources,
        }

    found = read_ray(
        [
            build_node("a", True, CPU=4.0, GPU=2.0),
            build_node("dead", False, CPU=4.0),
            build_node("z", True, CPU=8.0, **{"node:__internal_head__": 1.0}),
        ]
    )
    assert found.nodes == [Node("z", "z-ip", 8, 0, ray_id="z-id"), Node("a", "a-ip", 4, 2, ray_id="a-id")]


def test_this_host_counts_the_cores_it_may_use() -> None:
    (node,) = read_host().nodes
    assert node.cpus == len(os.sched_getaffinity(0))
    assert node.sockets >= 1


def test_cores_are_grouped_by_the_socket_the_kernel_names(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    for number, core in enumerate(cores):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{number % 2}\n")
    assert read_sockets(tmp_path) == [group for group in (cores[::2], cores[1::2]) if group]


@pytest.mark.parametrize(
    ("sizes", "workers", "layout"),
    [
        ([(8, 4), (8, 4)], 8, [4, 4]),
        ([(8, 4), (8, 4), (8, 4)], 4, [4, 0, 0]),
        ([(8, 4), (2, 1), (8, 4)], 8, [4, 0, 4]),
        ([(4, 0), (4, 0)], 8, [4, 4]),
        ([(4, 0), (4, 0), (4, 0)], 6, [2, 2, 2]),
        ([(4, 0), (4, 0), (1, 0)], 6, [3, 3, 0]),
    ],
)
def test_workers_go_to_few_nodes_with_gpus_and_to_many_without(sizes: list, workers: int, layout: list[int]) -> None:
    assert place_workers(build_topology(*sizes), workers, 1) == layout


@pytest.mark.parametrize(
    ("sizes", "workers", "num_nodes", "layout"),
    [
        ([(8, 4), (8, 4), (8, 4)], 4, 2, [2, 2, 0]),
        ([(8, 4), (2, 1), (8, 4)], 4, 2, [2, 0, 2]),
        ([(8, 4), (8, 4), (8, 4)], 3, 3, [1, 1, 1]),
        ([(4, 0), (4, 0), (4, 0)], 2, 1, [2, 0, 0]),
    ],
)
def test_workers_lie_on_as_many_nodes_as_was_asked(
    sizes: list, workers: int, num_nodes: int, layout: list[int]
) -> None:
    assert place_workers(build_topology(*sizes), workers, 1, num_nodes) == layout


def test_workers_that_do_not_fit_equally_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"num_workers=7 .* room for \[4, 4\]"):
        place_workers(build_topology((8, 4), (8, 4)), 7, 2)
    with pytest.raises(UsageError, match=r"num_workers=4 .* equally on 3 of 2 nodes by .* room for \[4, 4\]"):
        place_workers(build_topology((8, 4), (8, 4)), 4, 1, 3)


def test_hosts_are_laid_out_on_the_nodes_asked_for_and_their_lack_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_tiny_config(cluster={"num_workers": 4, "num_nodes": 2})
    for sizes, names in (([(8, 4), (8, 4)], ["h0", "h0", "h1", "h1"]), ([(8, 4)], None)):
        monkeypatch.setattr(hosts, "_read_topology", lambda sizes=sizes: build_topology(*sizes))
        found = hosts.find_hosts(config, 0)
        assert (found and found.names) == names
    assert "num_workers=4 of 1 CPU cores each on cluster.num_nodes=2 nodes: after" in hosts.describe_lack(config, 0)


@pytest.mark.parametrize(
    ("sizes", "cpus", "said"),
    [
        ([(8, 1)], 1, "room for 1 worker, one a GPU"),
        ([(96, 8), (96, 8)], 12, "room for 16 workers"),
        ([(96, 8), (96, 8)], 16, "room for 12 workers"),
        ([(8, 4), (8, 0)], 2, "room for 4 workers, one a GPU"),
        ([(8, 0), (3, 0)], 2, "room for 5 workers"),
        ([], 1, "room for 0 workers"),
    ],
)
def test_the_room_is_told_with_what_limits_it(sizes: list, cpus: int, said: str) -> None:
    assert describe_room(build_topology(*sizes), cpus) == said


@pytest.mark.parametrize(
    ("sizes", "val", "min_nodes", "layout"),
    [
        ([(4, 4), (4, 4), (4, 4)], 96, 1, {"h0": 4, "h1": 4, "h2": 4}),
        # 16 pairs of validation, in one batch: 12 workers could not share them, 8 can.
        ([(4, 4), (4, 4), (4, 4)], 16, 1, {"h0": 4, "h1": 4}),
        ([(4, 4), (4, 4), (4, 4)], 16, 3, None),
        # There is room on two nodes, but 8 workers go to one.
        ([(8, 8), (2, 2)], 16, 1, {"h0": 8}),
        ([(8, 8), (2, 2)], 16, 2, None),
        ([(8, 8)], 16, None, None),
    ],
)
def test_fewer_hosts_get_as_many_workers_as_can_share_the_batches(
    sizes: list, val: int, min_nodes: int | None, layout: dict[str, int] | None, tmp_path: Path
) -> None:
    config = build_tiny_config(
        train={"global_batch": 48},
        cluster={"num_workers": 16, "min_nodes": min_nodes, "cpus_per_worker": 1},
        run={"dir": str(tmp_path)},
    )
    (tmp_path / "run.json").write_text(json.dumps({"plan": build_plan(config, 16, 1000, val).model_dump()}))
    topology = build_topology(*sizes)
    nodes = [node._replace(ray_id=f"{node.name}-id") for node in topology.nodes]
    found = _lay_out_fewer(topology._replace(nodes=nodes), config)
    assert (found and {name: found.names.count(name) for name in found.names}) == layout


@pytest.mark.parametrize(
    ("world", "shares"),
    [
        (2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (3, [[0, 1], [2, 3], [4, 5]]),
        (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_workers_of_a_node_share_no_core_and_stay_in_a_socket(world: int, shares: list[list[int]]) -> None:
    assert [share_cores(TWO_SOCKETS, rank, world) for rank in range(world)] == shares


def test_more_workers_than_cores_share_all_of_them() -> None:
    assert share_cores([[0, 1]], 2, 3) == [0, 1]
