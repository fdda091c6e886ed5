"""A run before its workers start: what is checked and written.

Imports neither torch nor streaming before they are needed: whoever starts a run by Ray waits for its imports.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from place.config import Config, RunError, UsageError, dump_config
from place.data.mixture import check_reports, count_epoch, read_fingerprint, read_intensity
from place.kept import write_text
from place.runlog import hold_run, read_commit
from place.trackers import check_trackers
from place.training.plan import RunPlan, build_plan
from place.training.stop import withdraw_stop

VERSIONS = ("torch", "deepspeed", "transformers", "timm", "ray", "mosaicml-streaming", "xformers", "numpy")


def prepare_run(config: Config, world: int) -> RunPlan:
    """Check everything that can be checked before workers start, and write config.yaml and run.json.

    Raises:
        UsageError: data, plan or run folder do not permit the run, or another one works there.
        RunError: see `check_disk`.
    """
    run_dir = Path(config.run.dir)
    plan = build_run_plan(config, world)
    check_reports(config.data)
    check_trackers(config)
    if config.run.resume == "never" and any((run_dir / "checkpoints").glob("step_????????")):
        raise UsageError(
            f"{run_dir} already holds a run and run.resume=never; choose another run.dir or run.resume=auto"
        )
    for folder in sorted((run_dir / "checkpoints").glob("step_????????"), reverse=True):
        # All are of one lineage; whether one is whole, the workers find out, who hash it.
        with suppress(OSError, json.JSONDecodeError, SafetensorError):
            check_lineage(folder, config, plan)
            _check_shapes(folder, config)
            break
    about = _describe_run(config, world, plan)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with hold_run(run_dir):
            write_text(run_dir / "config.yaml", dump_config(config))
            check_disk(run_dir, need_mib=512)
            write_text(run_dir / "run.json", json.dumps(about, indent=1))
            withdraw_stop(run_dir)
    except OSError as error:
        raise UsageError(f"run.dir={run_dir} cannot be written: {error.strerror}; choose another folder") from None
    return plan


def _describe_run(config: Config, world: int, plan: RunPlan) -> dict[str, Any]:
    mean, std = read_intensity(config.data)
    return {
        "commit": read_commit(),
        "versions": {name: _read_version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "world": world,
        "data_fingerprint": read_fingerprint(config.data),
        "mean": mean,
        "std": std,
        "plan": plan.model_dump(),
    }


def _read_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def build_run_plan(config: Config, world: int) -> RunPlan:
    """The plan of a run on `world` workers."""
    data = config.data
    num_train, num_val = count_epoch(data, data.train_split, train=True), count_epoch(data, data.val_split, train=False)
    return build_plan(config, world, num_train, num_val)


def check_lineage(folder: Path, config: Config, plan: RunPlan) -> dict[str, Any]:
    """The state of a checkpoint that this run may go on from. Raises UsageError where it may not."""
    from place.training.checkpoint import read_state

    state = read_state(folder)
    for key, value in describe_lineage(config, plan).items():
        # Older checkpoints do not hold all of it.
        if state.get(key, value) != value:
            raise UsageError(
                f"checkpoint {folder} was written with {key}={state[key]}, this run has {value}; "
                "resume with the same value or choose another run.dir"
            )
    return state


def describe_lineage(config: Config, plan: RunPlan) -> dict[str, Any]:
    """What must be the same when a run goes on, for its sample order and its curve to be those of one run."""
    return {
        "global_batch": plan.global_batch,
        "seed": config.run.seed,
        "num_canonical_nodes": config.data.num_canonical_nodes,
        "shuffle_block_size": config.data.shuffle_block_size,
        "train_split": config.data.train_split,
        "data_fingerprint": read_fingerprint(config.data),
    }


def _check_shapes(folder: Path, config: Config) -> None:
    """Raises UsageError where the model of this run, built without weights, is not that of a checkpoint."""
    from safetensors import safe_open
    from transformers import AutoConfig

    from place.data.tokens import ReportTokenizer
    from place.training.footprint import build_without_weights
    from place.training.state import WEIGHTS, check_layout, read_layout

    source, definition, vocab_size = config.model.text.source, None, 0
    try:
        if source == "scratch":
            vocab_size = ReportTokenizer.load(Path(config.run.dir) / "tokenizer").vocab_size
        else:
            definition = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return  # not on this machine: the workers compare
    layout = read_layout(build_without_weights(config, definition, vocab_size))
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        check_layout(folder, weights, layout)


def check_disk(run_dir: Path, need_mib: int) -> None:
    """Raises RunError where the run folder's disk has less room."""
    free_mib = shutil.disk_usage(run_dir).free >> 20
    if free_mib < need_mib:
        raise RunError(
            f"run.dir={run_dir}: {free_mib} MiB of its disk are free, a run needs at least {need_mib}; "
            "make room and start it again, or move it"
        )


def new_launch() -> str:
    """A name for one start of a run."""
    return f"{os.getpid()}-{time.time_ns():x}"
