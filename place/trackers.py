"""Where a run's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Figures and the configuration alone: no image, no report, no name of a patient.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

from place.config import Config, UsageError
from place.kept import write_text


class Tracker(Protocol):
    """Takes the figures of a run; made on rank 0."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """The figures of a step."""

    def close(self) -> None:
        """Hand over what is still here."""


def check_trackers(config: Config) -> None:
    """Raises UsageError where the package of one is not installed."""
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"run.trackers: {name} is not installed; pip install -c constraints.txt -e .[track]")


def open_trackers(config: Config, first_step: int) -> list[Tracker]:
    """Those that the configuration asks for."""
    run_dir = Path(config.run.dir)
    trackers: list[Tracker] = [TensorBoard(run_dir, first_step)] if config.run.tensorboard else []
    for name in config.run.trackers:
        trackers.append(Wandb(config, run_dir) if name == "wandb" else Mlflow(config, run_dir))
    return trackers


class TensorBoard:
    """Events below RUN/events; later ones replace those of a start that got further than its last checkpoint. Final.

    Args:
        first_step: the checkpoint's, which stays; those after it are done again.
    """

    def __init__(self, run_dir: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "events"), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project `place`, the same one after every start. Final.

    Offline unless WANDB_MODE says otherwise: files below RUN/wandb, for `wandb sync`.
    """

    def __init__(self, config: Config, run_dir: Path):
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        self._run = wandb.init(
            project="place",
            dir=str(run_dir),
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            name=run_dir.name,
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", disable_git=True, x_disable_stats=True, silent=True),
        )
        # W&B's own step never goes back: it would drop what is done again after a restart.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of the experiment `place`, the same one after every start. Final.

    At MLFLOW_TRACKING_URI, or in RUN/mlflow.db.
    """

    def __init__(self, config: Config, run_dir: Path):
        import mlflow

        self._mlflow, kept = mlflow, run_dir / "mlflow.txt"
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').resolve()}")
        mlflow.set_experiment("place")
        known = kept.read_text() if kept.is_file() else None
        started = mlflow.start_run(run_id=known, run_name=None if known else run_dir.name)
        if known is None:
            write_text(kept, started.info.run_id)
            mlflow.log_params(_flatten(config.model_dump(mode="json")))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _flatten(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested knobs by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and value
        flat |= _flatten(value, f"{above}{name}.") if is_section else {f"{above}{name}": value}
    return flat
