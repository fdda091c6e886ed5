"""A pretraining run: what is checked before it starts, and what each worker builds."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import torch
from safetensors import SafetensorError, safe_open

from place.batch import Batch, Losses, Outputs
from place.config import Config, RunError, UsageError, dump_config
from place.data.loader import PairLoader
from place.data.mixture import check_reports, count_epoch, read_fingerprint, read_intensity, read_training_samples
from place.data.streaming import select_sentences
from place.data.tokens import ReportTokenizer, train_tokenizer
from place.distributed import Node, barrier, broadcast_text, choose_device, gather_objects, read_node, read_world
from place.kept import write_text
from place.losses.objective import compute_losses
from place.model.place import PlaceModel, build_model
from place.node import clean_node, note_cache, note_shared_memory
from place.runlog import RunLog, count_attempts, hold_run, read_commit, write_attempt
from place.trackers import Tracker, check_trackers, open_trackers
from place.training.checkpoint import agree_on_checkpoint, read_state, write_definition
from place.training.engine import Engine, TorchEngine
from place.training.footprint import build_without_weights
from place.training.gpu import open_gpu
from place.training.loop import Progress, describe_lineage, train
from place.training.phases import Phases
from place.training.plan import RunPlan, build_plan
from place.training.state import WEIGHTS, check_layout, read_layout
from place.training.stop import withdraw_stop
from place.training.watchdog import Watchdog

BuildEngine = Callable[[PlaceModel, Config, torch.device], Engine]
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
            _check_lineage(folder, config, plan)
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


def build_run_plan(config: Config, world: int) -> RunPlan:
    """The plan of a run on `world` workers."""
    data = config.data
    num_train, num_val = count_epoch(data, data.train_split, train=True), count_epoch(data, data.val_split, train=False)
    return build_plan(config, world, num_train, num_val)


def run_worker(
    config: Config, launch: str, build_engine: BuildEngine | None = None, trackers: Sequence[Tracker] = ()
) -> str:
    """What every training process does, from building the model to the last checkpoint.

    Args:
        launch: names this start of the run; a second worker group of one launch resumes whatever `run.resume` says.
        build_engine: None takes the plain torch engine.
        trackers: of the launcher; rank 0 logs to them and to those of `run.trackers`.
    Returns:
        `done` or `stopped`.
    Raises:
        RunError, UsageError: see `train`, `find_checkpoint` and the builders.
    """
    device = choose_device()
    phases = Phases(device) if config.run.time_phases else None
    # From before the engine is built: DeepSpeed keeps some of torch's collectives under names of its own.
    with phases.watch_collectives() if phases else nullcontext():
        return _work(config, launch, build_engine or TorchEngine, device, phases, trackers)


def _work(
    config: Config,
    launch: str,
    build_engine: BuildEngine,
    device: torch.device,
    phases: Phases | None,
    trackers: Sequence[Tracker],
) -> str:
    run_dir, world = Path(config.run.dir), read_world()
    torch.manual_seed(config.run.seed)
    cv2.setNumThreads(1)
    # Packed reports have another length at each step, and oneDNN keeps what it makes for 1,024 shapes: on a CPU a run
    # grew from 950 MiB to 2 GiB. With 64 it stays where it is, 2 % slower.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    attempt = _open_attempt(run_dir, launch, device)
    newest, notes = agree_on_checkpoint(run_dir)
    tokenizer = _read_or_train_tokenizer(config, is_resumed=newest is not None)
    model, attention = build_model(config, tokenizer.vocab_size, device)
    num_patches = (config.data.image_size_px // model.vision.patch_px) ** 2
    if config.engine.compile:
        model.compile_encoders()
        attention += "; torch.compile: the first steps take longer"
    engine = build_engine(model, config, device)
    plan = build_run_plan(config, world.world)
    progress, notes = _resume(config, engine, plan, newest, notes)
    if world.is_first:
        # The tokenizer of `scratch` is there, and slower ranks may still read it.
        write_definition(run_dir, config, model, None if config.model.text.source == "scratch" else tokenizer)
    if progress["step"] >= plan.total_steps:
        notes.append(f"all {plan.total_steps} steps are done already: nothing to train")
    gpu, blind = open_gpu(device)
    notes += [blind] if blind else []
    node = read_node()
    cache = _make_cache(config, launch, attempt, node)
    log = None
    if world.is_first:
        log = RunLog(run_dir, attempt, [*open_trackers(config, progress["step"]), *trackers])
        write_attempt(run_dir, {"attempt": attempt, "from_step": progress["step"], "notes": [attention, *notes]})
    watchdog = Watchdog(run_dir, attempt, world.rank, config.cluster.hang_timeout_s)
    build_loader = functools.partial(
        PairLoader, config.data, tokenizer=tokenizer, seed=config.run.seed, num_patches=num_patches, cache=cache
    )
    try:
        loader = build_loader(config.data.train_split, local_batch=plan.local_batch, train=True)
        val_loader = None
        if plan.val_steps:
            val_loader = build_loader(config.data.val_split, local_batch=plan.val_local_batch, train=False)
        if node.is_first:
            note_shared_memory(run_dir, [item.shm_prefix for item in (loader, val_loader) if item])
        objective = functools.partial(_objective, config, 1 / (255 * loader.dataset.std))
        outcome = train(config, plan, engine, loader, val_loader, objective, log, watchdog, progress, phases, gpu)
        barrier()
        return outcome
    finally:
        watchdog.close()
        if log is not None:
            log.close()
        if node.is_first:
            shutil.rmtree(cache, ignore_errors=True)


def _objective(config: Config, grey_level: float, outputs: Outputs, batch: Batch) -> Losses:
    return compute_losses(outputs, batch, config.loss, grey_level)


def _resume(
    config: Config, engine: Engine, plan: RunPlan, folder: Path | None, notes: list[str]
) -> tuple[Progress, list[str]]:
    """Go on from a checkpoint, or begin where there is none.

    Args:
        notes: what was said of checkpoints that were passed over.
    Returns:
        Where the run stands, and the notes with what is said of this one.
    """
    progress = Progress(step=0, best_val=None, best_step=None)
    if folder is None:
        return progress, notes
    state = _check_lineage(folder, config, plan)
    engine.load(folder, state["numbers"])
    progress.update({key: state[key] for key in progress})
    if state["world"] != plan.world:
        notes = [*notes, f"{folder.name} was written by {state['world']} workers, {plan.world} go on"]
    return progress, [*notes, f"resumed from {folder.name}"]


def _check_lineage(folder: Path, config: Config, plan: RunPlan) -> dict[str, Any]:
    """The state of a checkpoint that this run may go on from. Raises UsageError where it may not."""
    state = read_state(folder)
    for key, value in describe_lineage(config, plan).items():
        # Older checkpoints do not hold all of it.
        if state.get(key, value) != value:
            raise UsageError(
                f"checkpoint {folder} was written with {key}={state[key]}, this run has {value}; "
                "resume with the same value or choose another run.dir"
            )
    return state


def _check_shapes(folder: Path, config: Config) -> None:
    """Raises UsageError where the model of this run, built without weights, is not that of a checkpoint."""
    from transformers import AutoConfig

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


def _read_or_train_tokenizer(config: Config, is_resumed: bool) -> ReportTokenizer:
    data, folder = config.data, Path(config.run.dir) / "tokenizer"
    if config.model.text.source != "scratch":
        return ReportTokenizer.load(config.model.text.source, data.max_tokens, data.max_sentences)
    # Without a checkpoint, a tokenizer that is there is of a start that failed, perhaps on other data.
    if read_world().is_first and not (is_resumed and (folder / "tokenizer.json").is_file()):
        samples = read_training_samples(data)
        sections = "all" if data.sections == "one" else data.sections
        sentences = (text for sample in samples for text in select_sentences(sample["sentences"], sections))
        train_tokenizer(sentences, config.model.text.vocab_size, data.max_tokens, data.max_sentences).save(folder)
    barrier()
    return ReportTokenizer.load(folder, data.max_tokens, data.max_sentences)


def _open_attempt(run_dir: Path, launch: str, device: torch.device) -> int:
    """Number of this worker group, from 0 over the life of the run; attempts.jsonl says who is in it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    workers = gather_objects({"host": socket.gethostname(), "pid": os.getpid(), "device": name})
    if not read_world().is_first:
        return int(broadcast_text(None) or 0)
    started = count_attempts(run_dir)
    write_attempt(run_dir, {"attempt": started, "launch": launch, "workers": workers})
    return int(broadcast_text(str(started)) or 0)


def _make_cache(config: Config, launch: str, attempt: int, node: Node) -> Path:
    """A fresh folder for unpacked shards, the same for all workers of a node."""
    cache = Path(config.data.cache_dir or tempfile.gettempdir()) / f"place-{launch}-{attempt}-{node.device}"
    if node.is_first:
        clean_node(Path(config.run.dir))
        note_cache(Path(config.run.dir), cache)
        try:
            cache.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"data.cache_dir={cache.parent} on {socket.gethostname()}: {error.strerror}; give a folder that every "
                "node can write, or none for the temporary one"
            ) from None
    barrier()
    return cache


def check_disk(run_dir: Path, need_mib: int) -> None:
    """Raises RunError where the run folder's disk has less room."""
    free_mib = shutil.disk_usage(run_dir).free >> 20
    if free_mib < need_mib:
        raise RunError(
            f"run.dir={run_dir}: {free_mib} MiB of its disk are free, a run needs at least {need_mib}; "
            "make room and start it again, or move it"
        )


def _read_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def new_launch() -> str:
    """A name for one start of a run."""
    return f"{os.getpid()}-{time.time_ns():x}"
