"""Checkpoints: written whole or not at all, checked before they are read, thinned out, found again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors.torch import load_file, save_file

from place.config import Config, RunError, UsageError, build_config
from place.data.tokens import ReportTokenizer
from place.distributed import barrier, read_world
from place.model.place import PlaceModel, build_model
from place.model.vision import read_model_args
from place.training.engine import Engine

WEIGHTS = "model.safetensors"
STATE = "state.json"
LISTING = "files.json"


class LoadedRun(NamedTuple):
    """A trained run: the model (eval mode, on the CPU) and what it needs to read images and reports."""

    model: PlaceModel
    tokenizer: ReportTokenizer
    config: Config
    mean: float
    std: float
    step: int
    commit: str


def write_checkpoint(run_dir: Path, engine: Engine, state: dict[str, Any], keep: int, is_best: bool) -> Path:
    """Write `checkpoints/step_NNNNNNNN`; called by all ranks. Nobody sees the folder before it is complete.

    Args:
        state: JSON values, among them `step`.
        keep: newest checkpoints kept beside the best.
    Source: ours.
    """
    root = run_dir / "checkpoints"
    final = root / f"step_{state['step']:08d}"
    partial = root / f"{final.name}.partial"
    first = read_world().is_first
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial)
    weights = engine.read_weights()
    barrier()
    if first:
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, partial / WEIGHTS)
        (partial / STATE).write_text(json.dumps(state, indent=1))
        (partial / LISTING).write_text(json.dumps(_list_files(partial), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_text(root / "latest", final.name)
        if is_best:
            write_text(root / "best", final.name)
        _thin_out(root, keep, final.name)
    barrier()
    return final


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a line for each newer one that is not complete.

    Raises:
        RunError: there are checkpoints, but none is complete.
    """
    faults: list[str] = []
    folders = sorted((run_dir / "checkpoints").glob("step_????????"), reverse=True)
    for folder in folders:
        fault = find_fault(folder)
        if not fault:
            return folder, faults
        faults.append(fault)
    if faults:
        raise RunError(f"{faults[0]}; no complete checkpoint is left, start again in another run.dir")
    return None, []


def find_fault(folder: Path) -> str:
    """What is wrong with a checkpoint folder; empty when every file is there with its hash."""
    listing = folder / LISTING
    if not listing.is_file():
        return f"checkpoint {folder}: {LISTING} is missing"
    try:
        files = json.loads(listing.read_text())
    except ValueError:
        return f"checkpoint {folder}: file {LISTING} is damaged"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"checkpoint {folder}: file {name} is missing"
        if path.stat().st_size != size or _hash_file(path) != digest:
            return f"checkpoint {folder}: file {name} is damaged"
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given."""
    return json.loads((folder / STATE).read_text())


def load_run(run_dir: str | Path, which: str = "best") -> LoadedRun:
    """Load a trained model from its run folder, without DeepSpeed and at any world size.

    Args:
        which: `best`, `latest` or a folder name such as step_00000100; a run without a best takes the latest.
    Raises:
        UsageError: no such run or checkpoint. RunError: the checkpoint is not complete.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UsageError(f"{run_dir} is no run folder (no config.yaml); give the run.dir of a `place pretrain`")
    config = build_config(run_dir / "config.yaml")
    folder = _resolve(run_dir, which)
    fault = find_fault(folder)
    if fault:
        raise RunError(f"{fault}; choose another one with --checkpoint, or resume the run")
    tokenizer = ReportTokenizer.load(run_dir / "tokenizer", config.data.max_tokens, config.data.max_sentences)
    portable = config.model_copy(update={"model": _portable_model(config, run_dir)})
    model, _ = build_model(portable, tokenizer.vocab_size, torch.device("cpu"), definition=run_dir / "model")
    model.load_state_dict(load_file(folder / WEIGHTS))
    info = json.loads((run_dir / "run.json").read_text())
    return LoadedRun(
        model.eval(), tokenizer, config, info["mean"], info["std"], read_state(folder)["step"], info["commit"]
    )


def write_definition(run_dir: Path, config: Config, model: PlaceModel, tokenizer: ReportTokenizer) -> None:
    """Write what rebuilds the model without its sources: the encoders' definitions and the tokenizer."""
    folder = run_dir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    model.text.encoder.config.to_json_file(folder / "config.json")
    vision = config.model.vision
    architecture = model.vision.vit.pretrained_cfg.get("architecture", vision.architecture)
    overrides = {**read_model_args(vision.source), **vision.overrides}
    write_text(folder / "vision.json", json.dumps({"architecture": architecture, "overrides": overrides}))
    tokenizer.save(run_dir / "tokenizer")


def write_text(path: Path, text: str) -> None:
    """Write a small file by rename, so that a reader sees the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _portable_model(config: Config, run_dir: Path) -> Any:
    definition = json.loads((run_dir / "model" / "vision.json").read_text())
    vision = config.model.vision.model_copy(update={"source": "scratch", **definition})
    return config.model.model_copy(update={"vision": vision, "attention": "auto"})


def _resolve(run_dir: Path, which: str) -> Path:
    root = run_dir / "checkpoints"
    for name in (which, "latest") if which == "best" else (which,):
        pointer = root / name
        if pointer.is_dir():
            return pointer
        if pointer.is_file():
            return root / pointer.read_text().strip()
    there = sorted(path.name for path in root.glob("step_????????"))
    raise UsageError(f"{run_dir} has no checkpoint '{which}'; there are {there or 'none'}")


def _list_files(folder: Path) -> dict[str, tuple[int, str]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, _hash_file(path)) for path in files}


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _thin_out(root: Path, keep: int, newest: str) -> None:
    """Keep the best and the `keep` newest. What is newer than the one just written was incomplete at the resume."""
    best = (root / "best").read_text().strip() if (root / "best").is_file() else ""
    names = sorted(path.name for path in root.glob("step_????????"))
    done = [name for name in names if name <= newest]
    for name in {*names} - {*done[-keep:], best}:
        shutil.rmtree(root / name)
