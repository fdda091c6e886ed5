"""Collectives over a real process group: bandwidth as nccl-tests counts it, latency, and how far clocks are apart.

Run as a program it is one rank: `python -m place.cluster.doctor.network '{"rank": 0, "world": 2, ...}'`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from place.cluster.doctor.findings import FAIL, OK, WARN, Finding

import place

GIB = 1 << 30
ROUNDS = 5
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def measure_collectives(size_mib: int, budget_s: float = 5.0) -> dict[str, Any]:
    """Measure on every rank of the process group as it is. Called by all ranks; the same answer on each."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.ones(size_mib << 18, device=device)
    parts = list(torch.empty(world, len(data) // world, device=device))
    own = data[: len(data) // world].clone()
    small = torch.ones(1, device=device)
    reduce_s = _time(lambda: dist.all_reduce(data), device, budget_s)
    gather_s = _time(lambda: dist.all_gather(parts, own), device, budget_s)
    latency_s = _time(lambda: dist.all_reduce(small), device, budget_s)
    share, size = (world - 1) / world, data.nbytes
    return {
        "world": world,
        "backend": dist.get_backend(),
        "size_mib": size_mib,
        "all_reduce_gib_s": 2 * share * size / reduce_s / GIB,
        "all_gather_gib_s": share * size / gather_s / GIB,
        "latency_ms": latency_s * 1000,
        **_measure_clocks(device),
    }


def describe_collectives(measured: dict[str, Any], where: str) -> list[Finding]:
    """Bandwidth and clocks as findings. Bus bandwidth as of nccl-tests: bytes that cross the slowest link."""
    text = (
        f"{measured['world']} ranks {where}, {measured['backend']}, {measured['size_mib']} MiB: all-reduce "
        f"{measured['all_reduce_gib_s']:.2f} GiB/s, all-gather {measured['all_gather_gib_s']:.2f} GiB/s (bus), "
        f"latency {measured['latency_ms']:.2f} ms"
    )
    state, advice = OK, ""
    if measured["all_reduce_gib_s"] < 0.1:
        state = WARN
        advice = "1 Gbit/s Ethernet or the wrong interface: set NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME to the fast one"
    findings = [Finding("collectives", state, text, advice)]
    skew, jitter = measured["clock_skew_s"], measured["clock_jitter_s"]
    text = f"clocks differ by {max(0.0, skew - jitter):.3f} s at most (measured to {jitter:.3f} s)"
    if skew - jitter > 1:
        return [
            *findings,
            Finding("clock", WARN, text, "run chrony or ntpd on all nodes: logs go by clocks"),
        ]
    return [*findings, Finding("clock", OK, text)]


def check_local_collectives(timeout_s: float) -> list[Finding]:
    """Processes of this host: one a GPU over NCCL, or two over gloo."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, world = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    with tempfile.TemporaryDirectory() as folder:
        setup = {"world": world, "backend": backend, "init_method": f"file://{folder}/group", "size_mib": 16}
        if backend == "nccl":
            setup["size_mib"] = 256
        measured = _run_processes(setup, world, timeout_s)
    return describe_collectives(measured, "on this host")[:1]  # of one clock there is nothing to say


def join_and_measure(setup: dict[str, Any]) -> dict[str, Any]:
    """Join a group of its own, measure, leave."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if setup["backend"] == "nccl":
        torch.cuda.set_device(setup.get("device", setup["rank"]) % torch.cuda.device_count())
    dist.init_process_group(
        setup["backend"],
        init_method=setup["init_method"],
        rank=setup["rank"],
        world_size=setup["world"],
        timeout=timedelta(seconds=setup.get("timeout_s", 60)),
    )
    try:
        return measure_collectives(setup["size_mib"])
    finally:
        dist.destroy_process_group()


def start_module(name: str, setup: dict[str, Any]) -> subprocess.Popen:
    """Start a module of PLACE as a process, with the PLACE that runs here; `setup` is its argument as JSON."""
    paths = [str(Path(place.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    # A rank of torchrun or srun must not make its child one.
    environ = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", name, json.dumps(setup)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def describe_failure(error: BaseException | str, where: str) -> Finding:
    """A group that did not come together."""
    line = " ".join(str(error).split())[-300:]
    advice = (
        "nodes must reach each other on all ports; where there are several networks set GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME, and see NCCL_DEBUG=INFO"
    )
    return Finding("collectives", FAIL, f"ranks {where} did not come together: {line}", advice)


def _run_processes(setup: dict[str, Any], world: int, timeout_s: float) -> dict[str, Any]:
    ranks = [start_module("place.cluster.doctor.network", {**setup, "rank": rank}) for rank in range(world)]
    try:
        out, err = ranks[0].communicate(timeout=timeout_s)
        if ranks[0].returncode:
            raise RuntimeError(err.strip().splitlines()[-1] if err.strip() else f"exit code {ranks[0].returncode}")
        return json.loads(out.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result within {timeout_s:.0f} s") from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def _time(collective: Callable[[], object], device: Any, budget_s: float) -> float:
    """Seconds of one call, the median; all ranks make the same number of calls."""
    import torch
    import torch.distributed as dist

    took = []
    for number in range(ROUNDS + 1):
        dist.barrier()
        began = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
        longest = torch.tensor([sum(took)], device=device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        if number and longest.item() > budget_s:
            break
    return sorted(took[1:])[len(took[1:]) // 2]


def _measure_clocks(device: Any) -> dict[str, float]:
    """Largest difference of the ranks' clocks at a barrier, the least of several tries, and what a barrier takes."""
    import torch
    import torch.distributed as dist

    best, jitter = float("inf"), float("inf")
    for _ in range(ROUNDS):
        began = time.time()
        dist.barrier()
        now = time.time()
        # float64 on the wire: single precision knows seconds since 1970 to two minutes.
        times = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(times, torch.tensor([now], dtype=torch.float64, device=device))
        span = max(t.item() for t in times) - min(t.item() for t in times)
        if span < best:
            best, jitter = span, now - began
    worst = torch.tensor([best, jitter], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"clock_skew_s": worst[0].item(), "clock_jitter_s": worst[1].item()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(join_and_measure(json.loads(sys.argv[1]))) + "\n")
