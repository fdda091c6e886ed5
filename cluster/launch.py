"""Start a run's workers with Ray Train, and start them again after every fault, on the hosts that are left."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from place.cluster.hosts import NODE_LABEL, Hosts, clean_hosts, describe_lack, find_hosts

from place.config import Config, RunError, UsageError, check_config
from place.runlog import count_attempts, write_attempt
from place.training.start import check_disk
from place.training.stop import RESIZE, ask_to_stop, read_stop, withdraw_resize
from place.training.watchdog import describe_stacks

# Ray's controller hears of a dead worker when it polls; its default is 2 s.
HEALTH_CHECK_INTERVAL_S = "0.5"
# A host that dies while workers start would hold them up for this long.
START_TIMEOUT_S = "30"
_DIED, _LOST_A_PEER = "died", "lost the connection to another rank"


class Fault(NamedTuple):
    """Why a worker group ended: one line."""

    line: str


def launch(config: Config, launch_name: str, on_start: Callable[[], None]) -> str:
    """Run `run_worker` on every worker of a Ray cluster: the one at RAY_ADDRESS, or one started for this run.

    Args:
        launch_name: names this start of the run.
        on_start: called once Ray runs and before the workers do.
    Returns:
        `done` or `stopped`.
    Raises:
        UsageError, RunError: what a worker said in one line, or too many failures in a row.
    """
    import ray

    started = _start_ray(config.cluster.num_workers * config.cluster.cpus_per_worker)
    on_start()
    try:
        return _run_to_the_end(config, launch_name, 0 if started else config.cluster.start_timeout_s)
    finally:
        if not started:
            clean_hosts(Path(config.run.dir).resolve())
        else:
            ray.shutdown()


def _run_to_the_end(config: Config, launch_name: str, start_wait_s: float) -> str:
    run_dir = Path(config.run.dir).resolve()
    hosts = find_hosts(config, start_wait_s, lambda: bool(read_stop(run_dir)))
    if hosts is None and not read_stop(run_dir):
        raise UsageError(describe_lack(config, start_wait_s))
    if hosts is None:
        return "stopped"
    failures, saved = 0, _find_newest_step(run_dir)
    for group in range(10**6):
        (run_dir / "outcome.json").unlink(missing_ok=True)
        fault = _run_group(config, launch_name, f"{launch_name}-{group}", hosts)
        outcome = read_outcome(run_dir, launch_name)
        if fault is None and not (outcome == "stopped" and read_stop(run_dir) == RESIZE):
            return outcome
        withdraw_resize(run_dir)
        if fault is not None:
            check_disk(run_dir, need_mib=1)
            before, saved = saved, _find_newest_step(run_dir)
            failures = failures + 1 if saved == before else 1
            stacks = describe_stacks(run_dir, count_attempts(run_dir) - 1, len(hosts.ray_ids))
            write_attempt(run_dir, {"notes": [note for note in (fault.line, stacks) if note]})
            if failures > config.cluster.max_failures:
                raise RunError(
                    f"workers failed {failures} times without a new checkpoint between "
                    f"(cluster.max_failures={config.cluster.max_failures}); the last time: {fault.line}"
                )
        found = find_hosts(config, config.cluster.rejoin_timeout_s, lambda: bool(read_stop(run_dir)))
        if found is None:
            lack = describe_lack(config, config.cluster.rejoin_timeout_s)
            if saved is None:
                raise RunError(f"{lack}; there is no checkpoint yet, start the run again")
            ask_to_stop(run_dir, read_stop(run_dir) or f"hosts are missing: {lack}")
            return "stopped"
        if len(found.ray_ids) != len(hosts.ray_ids):
            note = f"going on with {len(found.ray_ids)} workers on {found.describe()}"
            write_attempt(run_dir, {"notes": [note]})
        hosts = found
    raise AssertionError("a run does not restart a million times")


def _find_newest_step(run_dir: Path) -> int | None:
    """By the folders themselves: a power failure may leave `latest` empty, which the workers mend as they start."""
    folders = (run_dir / "checkpoints").glob("step_????????")
    return max((int(folder.name.removeprefix("step_")) for folder in folders), default=None)


def _run_group(config: Config, launch_name: str, name: str, hosts: Hosts) -> Fault | None:
    """One worker group from start to end; None when every worker returned.

    Ray Train runs in a thread: signals stay with this one, which looks for hosts that came back meanwhile.
    """
    ended: list[Fault | None] = []
    thread = threading.Thread(
        target=lambda: ended.append(_fit(config, launch_name, name, hosts)), daemon=True, name="ray-train"
    )
    thread.start()
    larger_since: float | None = None
    looked = time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        if config.cluster.min_nodes is None or len(hosts.ray_ids) == config.cluster.num_workers:
            continue
        if time.monotonic() - looked > 5:
            looked = time.monotonic()
            found = find_hosts(config, 0)
            is_larger = found is not None and len(found.ray_ids) > len(hosts.ray_ids)
            larger_since = (larger_since or looked) if is_larger else None
            if larger_since and looked - larger_since >= config.cluster.grow_after_s:
                ask_to_stop(Path(config.run.dir), RESIZE)
    return ended[0] if ended else Fault("Ray Train's controller ended without a word")


def _fit(config: Config, launch_name: str, name: str, hosts: Hosts) -> Fault | None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_INTERVAL_S)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if hosts.use_gpu else {})}
    trainer = TorchTrainer(
        _run_ray_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "launch": launch_name, "cwd": os.getcwd()},
        scaling_config=ScalingConfig(
            num_workers=len(hosts.ray_ids),
            use_gpu=hosts.use_gpu,
            resources_per_worker=resources,
            label_selector=[{NODE_LABEL: ray_id} for ray_id in hosts.ray_ids],
        ),
        torch_config=TorchConfig(backend="nccl" if hosts.use_gpu else "gloo", timeout_s=cluster.timeout_s),
        run_config=RunConfig(
            name=name,
            storage_path=str(Path(config.run.dir).resolve() / "ray"),
            # Restarts are ours: on other hosts, in another number, from the newest checkpoint on disk.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  Ray wraps whatever a worker raised
        return Fault(describe_fault(error, hosts.names))
    return None


def describe_fault(error: BaseException, names: list[str]) -> str:
    """One line for what Ray Train raised: which rank on which host, and how.

    Args:
        names: host of each rank.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return f"workers did not start: {_last_line(getattr(error, 'controller_failure', error))}"
    told = {rank: _tell(error) for rank, error in failures.items()}
    # Where one rank dies the others lose their connections, and are perhaps heard first: the dead one is the cause.
    causes = {rank: how for rank, how in told.items() if how.startswith(_DIED)}
    if not causes and all(how == _LOST_A_PEER for how in told.values()):
        causes = {rank: "is not heard of any more" for rank in range(len(names)) if rank not in told}
    causes = causes or told
    said = [f"rank {rank} on {names[rank]} {causes[rank]}" for rank in sorted(causes)]
    return f"{len(causes)} of {len(names)} workers failed: {'; '.join(said[:4])}{'; ...' if len(said) > 4 else ''}"


def _tell(error: BaseException) -> str:
    text = str(error)
    if any(sign in text for sign in ("node has died", "node was terminated", "NODE_DIED", "node is dead")):
        return f"{_DIED} with its host"
    if any(sign in text for sign in ("actor is dead", "actor died", "worker process has died", "ActorDiedError")):
        return _DIED
    if any(sign in text for sign in ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")):
        return _LOST_A_PEER
    return f"said: {_last_line(error)[:200]}"


def read_outcome(run_dir: Path, launch_name: str) -> str:
    """How a launch ended, `unknown` if no worker came so far. Raises the error that a worker gave up with."""
    path = run_dir / "outcome.json"
    outcome: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"launch": None}
    if outcome["launch"] != launch_name:
        return "unknown"
    if outcome["outcome"] == "failed":
        raise (UsageError if outcome["kind"] == "UsageError" else RunError)(outcome["message"])
    return outcome["outcome"]


def _run_ray_worker(arguments: dict[str, Any]) -> None:
    from place.cluster.worker import run_guarded

    os.chdir(arguments["cwd"])
    run_guarded(check_config(arguments["config"]), arguments["launch"])


def _start_ray(num_cpus: int) -> bool:
    """Connect to RAY_ADDRESS, or start a Ray of our own on this host. Returns whether it was started."""
    import ray

    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"num_cpus": max(num_cpus + 1, os.cpu_count() or 1), "include_dashboard": False}
    # `local`: without an address Ray would join whatever cluster left its mark in the temporary folder.
    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    try:
        ray.init(address=address or "local", **quiet, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"RAY_ADDRESS={address}: no Ray cluster answers ({_last_line(error)})") from None
    return not address


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
