"""A pretraining run: what each worker builds and trains."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import cv2
import torch

from place.batch import Batch, Losses, Outputs
from place.config import Config, UsageError
from place.data.loader import PairLoader
from place.data.mixture import read_training_samples
from place.data.streaming import select_sentences
from place.data.tokens import ReportTokenizer, train_tokenizer
from place.distributed import Node, barrier, broadcast_text, choose_device, gather_objects, read_node, read_world
from place.losses.objective import compute_losses
from place.model.place import PlaceModel, build_model
from place.node import clean_node, note_cache, note_shared_memory
from place.runlog import RunLog, count_attempts, write_attempt
from place.trackers import Tracker, open_trackers
from place.training.checkpoint import agree_on_checkpoint, write_definition
from place.training.engine import Engine, TorchEngine
from place.training.gpu import open_gpu
from place.training.loop import Progress, train
from place.training.phases import Phases
from place.training.plan import RunPlan
from place.training.start import build_run_plan, check_lineage
from place.training.watchdog import Watchdog

BuildEngine = Callable[[PlaceModel, Config, torch.device], Engine]


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
    loaders: list[PairLoader] = []
    try:
        loader, val_loader = build_loader(config.data.train_split, local_batch=plan.local_batch, train=True), None
        loaders.append(loader)
        if plan.val_steps:
            val_loader = build_loader(config.data.val_split, local_batch=plan.val_local_batch, train=False)
            loaders.append(val_loader)
        if node.is_first:
            note_shared_memory(run_dir, [item.shm_prefix for item in loaders])
        objective = functools.partial(_objective, config, 1 / (255 * loader.dataset.std))
        outcome = train(config, plan, engine, loader, val_loader, objective, log, watchdog, progress, phases, gpu)
        barrier()
        return outcome
    finally:
        for item in loaders:
            item.close()
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
    state = check_lineage(folder, config, plan)
    engine.load(folder, state["numbers"])
    progress.update({key: state[key] for key in progress})
    if state["world"] != plan.world:
        notes = [*notes, f"{folder.name} was written by {state['world']} workers, {plan.world} go on"]
    return progress, [*notes, f"resumed from {folder.name}"]


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
