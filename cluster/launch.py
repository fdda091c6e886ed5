"""Start a run's workers with Ray Train and see it through worker failures."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from place.config import Config, RunError, UsageError, check_config

# Ray's controller hears of a dead worker when it polls; the default of 2 s is half a minute of training lost on some
# faults.
HEALTH_CHECK_INTERVAL_S = "0.5"


def launch(config: Config, launch_name: str, on_start: Callable[[], None]) -> str:
    """Run `run_worker` on every worker of a Ray cluster: the one at RAY_ADDRESS, or one started for this run.

    Args:
        launch_name: names this start of the run.
        on_start: called once Ray runs and before the workers do.
    Returns:
        `done` or `stopped`.
    Raises:
        UsageError, RunError: what a worker said in one line.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_INTERVAL_S)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = config.cluster
    started = _start_ray(cluster.num_workers * cluster.cpus_per_worker)
    on_start()
    use_gpu = ray.cluster_resources().get("GPU", 0) >= cluster.num_workers
    _check_resources(config, ray.cluster_resources(), use_gpu)
    run_dir = Path(config.run.dir).resolve()
    trainer = TorchTrainer(
        _run_ray_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "launch": launch_name, "cwd": os.getcwd()},
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker=_resources(config, use_gpu)
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=cluster.timeout_s),
        run_config=RunConfig(
            name=launch_name,
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  Ray wraps whatever a worker raised
        read_outcome(run_dir, launch_name)
        raise RunError(
            f"workers failed more than cluster.max_failures={cluster.max_failures} times: {_last_line(error)}"
        ) from error
    finally:
        if started:
            ray.shutdown()
    return read_outcome(run_dir, launch_name)


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
    ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=True, **own)
    return True


def _resources(config: Config, use_gpu: bool) -> dict[str, float]:
    return {"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}


def _check_resources(config: Config, there: dict[str, float], use_gpu: bool) -> None:
    need = config.cluster.num_workers * config.cluster.cpus_per_worker
    if there.get("CPU", 0) < need:
        raise UsageError(
            f"cluster.num_workers={config.cluster.num_workers} needs {need} CPU cores, the Ray cluster has "
            f"{there.get('CPU', 0):.0f}; lower cluster.num_workers or cluster.cpus_per_worker"
        )


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
