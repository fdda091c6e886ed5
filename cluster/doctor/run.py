"""All checks in order: on this host, over the processes of torchrun or srun, or over a standing Ray cluster."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from place.cluster.doctor import ray_cluster
from place.cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding, merge_hosts, run_check
from place.cluster.doctor.first_batch import check_first_batch
from place.cluster.doctor.host import build_host_checks, read_pins
from place.cluster.doctor.network import (
    check_local_collectives,
    describe_collectives,
    describe_failure,
    measure_collectives,
)
from place.cluster.doctor.storage import check_mark, check_reading, check_writing, write_mark
from place.cluster.topology import expand_hosts, read_host, read_slurm

import place
from place.config import Config


class Options(NamedTuple):
    """What the user gave: `with_data` is false where neither a config nor data.path was given."""

    config: Config
    with_data: bool
    address: str | None
    timeout_s: float


def run_doctor(options: Options) -> list[Finding]:
    """Every finding, in the order they are printed; on ranks other than the first of torchrun or srun: nothing."""
    rank = join_processes(os.environ, options.timeout_s)
    if rank is not None:
        return _check_processes(options, rank)
    findings = _check_storage(options)
    if options.address:
        findings = [*_check_ray(options), *findings]
    else:
        findings = [*_check_here(options), *findings]
    return merge_hosts(findings)


def join_processes(environ: Mapping[str, str], timeout_s: float) -> int | None:
    """Join the group of torchrun, or of srun with several tasks. Returns this process's rank; None for one alone."""
    found = read_launcher(environ)
    if found is None:
        return None
    import torch
    import torch.distributed as dist

    rank, world, local_rank, meeting = found
    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        init_method=meeting,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=max(60.0, timeout_s)),
    )
    return rank


def read_launcher(environ: Mapping[str, str]) -> tuple[int, int, int, str] | None:
    """Rank, world, local rank and meeting point that torchrun or srun set; None for a process alone."""
    if "RANK" in environ and "MASTER_ADDR" in environ:
        world = int(environ["WORLD_SIZE"])
        return (int(environ["RANK"]), world, int(environ.get("LOCAL_RANK", 0)), "env://") if world > 1 else None
    nodes = expand_hosts(environ.get("SLURM_STEP_NODELIST", ""))
    if nodes and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        port = 20000 + int(environ["SLURM_JOB_ID"]) % 10000
        world, local = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_LOCALID"])
        return int(environ["SLURM_PROCID"]), world, local, f"tcp://{nodes[0]}:{port}"
    return None


def _check_here(options: Options) -> list[Finding]:
    topology = read_slurm(os.environ) or read_host()
    findings = [Finding("topology", OK, topology.describe())]
    for name, check in build_host_checks(_find_pins(), _list_folders(options.config), ports=True).items():
        findings += run_check(name, check, options.timeout_s)
    found = run_check("collectives", lambda: check_local_collectives(options.timeout_s), options.timeout_s + 5)
    if len(topology.nodes) > 1:
        advice = "srun --ntasks-per-node=1 place doctor, or RAY_ADDRESS=HEAD:PORT place doctor"
        found.append(Finding("nodes", SKIP, "only this node of the job was looked at", advice))
    return findings + found


def _check_ray(options: Options) -> list[Finding]:
    address, timeout_s = str(options.address), options.timeout_s
    findings = run_check("ray head", lambda: ray_cluster.check_head(address, os.environ), timeout_s)
    if findings[0].state == FAIL:
        return findings
    mark, unwritable = write_mark(Path(options.config.run.dir))
    if mark is None:
        return [*findings, *unwritable]
    try:
        with ray_cluster.connect(address) as topology:
            nodes = ray_cluster.list_nodes()
            findings.append(Finding("topology", OK, topology.describe()))
            findings += ray_cluster.check_settings(timeout_s)
            folders = _list_folders(options.config)
            findings += ray_cluster.check_hosts(nodes, _find_pins(), folders, mark, timeout_s)
            findings += _compare_software(findings)
            findings += ray_cluster.check_collectives(topology, nodes, 2 * timeout_s)
    except ConnectionError as error:
        findings.append(Finding("ray head", FAIL, f"{address}: {str(error).splitlines()[0]}", "check RAY_ADDRESS"))
    finally:
        mark.unlink(missing_ok=True)
    return findings


def _check_processes(options: Options, rank: int) -> list[Finding]:
    """Under torchrun or srun: one process a node looks at the node, all of them measure."""
    import socket

    import torch.distributed as dist

    host = socket.gethostname()
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    box = [write_mark(Path(options.config.run.dir)) if rank == 0 else (None, [])]
    dist.broadcast_object_list(box)
    mark, unwritable = box[0]
    findings = [] if rank else unwritable
    if hosts.index(host) == rank:
        checks = build_host_checks(_find_pins(), _list_folders(options.config), ports=False)
        if mark is not None:
            checks["shared folder"] = lambda: check_mark(mark)
        for name, check in checks.items():
            findings += run_check(name, check, options.timeout_s)
    everyone: list[list[Finding]] = [[]] * len(hosts)
    dist.all_gather_object(everyone, [finding._replace(hosts=(host,)) for finding in findings])
    try:
        measured = measure_collectives(256 if dist.get_backend() == "nccl" else 16)
        network = describe_collectives(measured, f"on {len(set(hosts))} nodes")
    except RuntimeError as error:
        network = [describe_failure(error, f"on {len(set(hosts))} nodes")]
    if rank:
        dist.destroy_process_group()
        return []
    if mark is not None:
        mark.unlink(missing_ok=True)
    findings = [finding for found in everyone for finding in found]
    findings += [*_compare_software(findings), *network, *_check_storage(options)]
    dist.destroy_process_group()
    return merge_hosts(findings)


def _check_storage(options: Options) -> list[Finding]:
    config, timeout_s = options.config, options.timeout_s
    findings = run_check("storage", lambda: check_writing(Path(config.run.dir)), timeout_s)
    if not options.with_data:
        advice = "place doctor --config FILE data.path=DIR"
        return [*findings, Finding("data", SKIP, "no config and no data.path given", advice)]
    for stream in config.data.list_streams():
        findings += run_check("data", functools.partial(check_reading, stream.path), timeout_s)
    return findings + run_check("first batch", lambda: check_first_batch(config, 2 * timeout_s), 2 * timeout_s + 5)


def _compare_software(findings: list[Finding]) -> list[Finding]:
    """Ranks that run other versions than their neighbours hang or crash in ways that do not say so."""
    versions: dict[str, list[str]] = {}
    for finding in findings:
        if finding.check == "software":
            versions.setdefault(finding.text, []).extend(finding.hosts)
    if len(versions) < 2:
        return []
    said = " | ".join(f"{', '.join(hosts)}: {text}" for text, hosts in versions.items())
    return [Finding("same software", WARN, said, "install the same constraints.txt on all nodes")]


def _list_folders(config: Config) -> list[tuple[str, Path]]:
    import tempfile

    cache = Path(config.data.cache_dir or tempfile.gettempdir())
    return [("run.dir", Path(config.run.dir).absolute()), ("shard cache", cache)]


def _find_pins() -> dict[str, str]:
    return read_pins(Path(place.__file__).resolve().parent.parent / "constraints.txt")
