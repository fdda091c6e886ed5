"""Checks over a Ray cluster: its head, its nodes, and collectives between them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from place.cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding, run_check
from place.cluster.doctor.host import build_host_checks
from place.cluster.doctor.network import describe_collectives, describe_failure, join_and_measure
from place.cluster.doctor.storage import check_mark
from place.cluster.standing import JOB_MARK, check_address, names_head
from place.cluster.topology import Topology, read_ray

import place
from place.config import UsageError

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 60  # what a checkpoint of a model of 200 M parameters may take on slow storage
USAGE_STATS = "RAY_USAGE_STATS_ENABLED"


@contextlib.contextmanager
def connect(address: str) -> Iterator[Topology]:
    """A connection to a standing Ray cluster, whose nodes import the PLACE that runs here.

    Raises:
        ConnectionError: there is none, or one of another version.
    """
    import ray

    paths = [str(Path(place.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    # Under `ray job submit` the working directory is there already.
    own = {} if JOB_MARK in os.environ else {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", runtime_env=own)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(str(error)) from None
    try:
        yield read_ray(ray.nodes())
    finally:
        ray.shutdown()


def check_head(address: str, environ: Mapping[str, str]) -> list[Finding]:
    """Whether a head answers at the address, and whether it asks for a token."""
    if not names_head(address):
        return [Finding("ray head", SKIP, f"{address} is no HOST:PORT: not asked whether it wants a token")]
    try:
        asks = check_address(address, environ)
    except UsageError as error:
        return [Finding("ray head", FAIL, str(error))]
    if asks:
        return [Finding("ray head", OK, f"{address} answers and asks for a token, which is right")]
    advice = "start it with RAY_AUTH_MODE=token; else whoever reaches its port runs code as you"
    return [Finding("ray head", WARN, f"{address} answers without a token", advice)]


def check_settings(timeout_s: float) -> list[Finding]:
    """What the head was started with, read where its jobs are supervised."""
    values = _ask_nodes([_find_head()], _read_environment, (STOP_WAIT, USAGE_STATS), timeout_s)[0]
    if isinstance(values, Exception):
        return [Finding("head settings", SKIP, f"the head's environment cannot be read: {values}")]
    stop_wait, usage_stats = values
    return [check_stop_wait(stop_wait), check_usage_stats(usage_stats)]


def check_stop_wait(value: str | None) -> Finding:
    """How long `ray job stop` leaves a run before it is killed."""
    seconds = int(value) if value and value.isdigit() else 3
    text = f"`ray job stop` waits {seconds} s for a checkpoint before it kills"
    if seconds >= STOP_WAIT_S:
        return Finding("job stop", OK, text)
    advice = f"{STOP_WAIT}=120 ray start --head, or submit with --runtime-env cluster/runtime_env.yaml, which sets it"
    return Finding("job stop", WARN, text, advice)


def check_usage_stats(value: str | None) -> Finding:
    """Whether Ray tells its makers of the cluster, which `ray start` does unless it is told not to."""
    if value == "0":
        return Finding("usage stats", OK, "Ray reports nothing of this cluster to usage-stats.ray.io")
    text = "Ray reports this cluster's size, versions and libraries to usage-stats.ray.io each hour"
    return Finding("usage stats", WARN, text, "ray start --head --disable-usage-stats")


def check_hosts(
    nodes: dict[str, str], pins: dict[str, str], folders: list[tuple[str, Path]], mark: Path, timeout_s: float
) -> list[Finding]:
    """All checks of one machine on every node.

    Args:
        nodes: name of each node by its id.
        mark: a file written here that every node should see.
    """
    answers = _ask_nodes(list(nodes), run_host_checks, (pins, folders, mark, timeout_s), 3 * timeout_s)
    findings: list[Finding] = []
    for name, answer in zip(nodes.values(), answers, strict=True):
        if isinstance(answer, Exception):
            advice = "nodes need PLACE's dependencies, and the checkout or --working-dir . of ray job submit"
            findings.append(Finding("node", FAIL, f"checks did not run: {_shorten(answer)}", advice, (name,)))
        else:
            findings += [finding._replace(hosts=(name,)) for finding in answer]
    return findings


def run_host_checks(
    pins: dict[str, str], folders: list[tuple[str, Path]], mark: Path | None, timeout_s: float
) -> list[Finding]:
    """What a node finds on itself."""
    checks = build_host_checks(pins, folders, ports=False)
    if mark is not None:
        checks["shared folder"] = lambda: check_mark(mark)
    return [finding for name, check in checks.items() for finding in run_check(name, check, timeout_s)]


def check_collectives(topology: Topology, nodes: dict[str, str], timeout_s: float) -> list[Finding]:
    """A process group over all nodes: one rank a GPU, or one a node and two at least."""
    import ray

    gpus = [node.gpus for node in topology.nodes]
    on_gpus = any(gpus)
    counts = gpus if on_gpus else [max(1, 2 // len(nodes))] * len(nodes)
    places = [(node, local) for node, count in zip(nodes, counts) for local in range(count)]
    if len(places) < 2:
        return [Finding("collectives", SKIP, "one rank alone: nothing to gather")]
    meeting = _ask_nodes(places[0][:1], find_meeting_point, (), timeout_s)[0]
    if isinstance(meeting, Exception):
        return [describe_failure(meeting, "over Ray")]
    backend, size_mib = ("nccl", 256) if on_gpus else ("gloo", 16)
    setup = {"world": len(places), "backend": backend, "init_method": meeting, "size_mib": size_mib}
    setup["timeout_s"] = timeout_s
    task = ray.remote(num_cpus=0, num_gpus=int(on_gpus), max_retries=0)(join_and_measure)
    # Ray shows a task its own GPU alone: device 0.
    refs = [
        task.options(scheduling_strategy=_pin(node)).remote({**setup, "rank": rank, "device": 0})
        for rank, (node, _) in enumerate(places)
    ]
    ready, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    if late:
        for ref in late:
            ray.cancel(ref, force=True)
        if on_gpus and not ready and ray.available_resources().get("GPU", 0) < len(places):
            return [Finding("collectives", SKIP, "GPUs are in use by another job", "run it on an idle cluster")]
        return [describe_failure(f"no result within {timeout_s:.0f} s", f"on {', '.join(nodes.values())}")]
    try:
        measured = ray.get(refs[0])
    except ray.exceptions.RayError as error:
        return [describe_failure(_shorten(error), f"on {', '.join(nodes.values())}")]
    return describe_collectives(measured, f"on {len(nodes)} nodes")


def find_meeting_point() -> str:
    """An address of this node, as the others see it, with a free port."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def list_nodes() -> dict[str, str]:
    """Name of each living node by its id, in the order of `read_ray`."""
    import ray

    alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {alive[node.address]: node.name for node in read_ray(ray.nodes()).nodes}


def _find_head() -> str:
    return next(iter(list_nodes()))


def _read_environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def _ask_nodes(ids: Any, function: Callable[..., Any], arguments: tuple, timeout_s: float) -> list[Any]:
    """What a function returns on each node, or the exception that came instead."""
    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    refs = [task.options(scheduling_strategy=_pin(node)).remote(*arguments) for node in ids]
    ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    answers: list[Any] = []
    for ref in refs:
        try:
            answers.append(ray.get(ref, timeout=0.1))
        except ray.exceptions.RayError as error:
            answers.append(error)
            ray.cancel(ref, force=True)
    return answers


def _pin(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _shorten(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__
