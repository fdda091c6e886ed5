"""Checkpoints: checked before they are read, found again, and loaded without what trained them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash
from safetensors.torch import load_file

from place.config import Config, RunError, UsageError, build_config
from place.data.tokens import ReportTokenizer
from place.distributed import broadcast_text, read_world
from place.kept import write_text
from place.model.place import PlaceModel, build_model
from place.model.vision import read_model_args
from place.training.state import WEIGHTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


def agree_on_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """What `find_checkpoint` finds on rank 0, which reads and hashes for all; `latest` and `best` then say the same.

    Raises:
        RunError: on every rank, as `find_checkpoint` does.
    """
    found: dict[str, Any] = {}
    if read_world().is_first:
        try:
            folder, notes = find_checkpoint(run_dir)
            found = {"name": folder and folder.name, "notes": notes}
            if folder is not None:
                _point_at(folder)
        except RunError as error:
            found = {"fault": str(error)}
    found = json.loads(broadcast_text(json.dumps(found)) or "")
    if "fault" in found:
        raise RunError(found["fault"])
    return found["name"] and run_dir / "checkpoints" / found["name"], found["notes"]


def _point_at(folder: Path) -> None:
    """Make the pointers say what a run that goes on from here knows: a kill may have come between two of them."""
    root, step = folder.parent, read_state(folder).get("best_step")
    write_text(root / "latest", folder.name)
    if step is not None and (root / f"step_{step:08d}").is_dir():
        write_text(root / "best", f"step_{step:08d}")
    else:
        (root / "best").unlink(missing_ok=True)


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
        if path.stat().st_size != size or hash_file(path) != digest:
            return f"checkpoint {folder}: file {name} is damaged"
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """What the run said of itself when it saved."""
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
    portable, definition = read_definition(run_dir, config)
    model, _ = build_model(portable, tokenizer.vocab_size, torch.device("cpu"), definition)
    model.load_state_dict(load_file(folder / WEIGHTS))
    info = json.loads((run_dir / "run.json").read_text())
    return LoadedRun(
        model.eval(), tokenizer, config, info["mean"], info["std"], read_state(folder)["step"], info["commit"]
    )


def write_definition(run_dir: Path, config: Config, model: PlaceModel, tokenizer: ReportTokenizer | None) -> None:
    """Write what rebuilds the model without its sources: the encoders' definitions and the tokenizer.

    Args:
        tokenizer: None where the run folder has it already.
    """
    folder = run_dir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    model.text.encoder.config.to_json_file(folder / "config.json")
    vision = config.model.vision
    architecture = model.vision.vit.pretrained_cfg.get("architecture", vision.architecture)
    overrides = {**read_model_args(vision.source), **vision.overrides}
    write_text(folder / "vision.json", json.dumps({"architecture": architecture, "overrides": overrides}))
    if tokenizer is not None:
        tokenizer.save(run_dir / "tokenizer")


def read_definition(run_dir: Path, config: Config) -> tuple[Config, PretrainedConfig]:
    """The run's config with a model that can be built without its sources, and the report encoder's definition."""
    from transformers import AutoConfig

    folder = run_dir / "model"
    definition = json.loads((folder / "vision.json").read_text())
    vision = config.model.vision.model_copy(update={"source": "scratch", **definition})
    model = config.model.model_copy(update={"vision": vision, "attention": "auto"})
    return config.model_copy(update={"model": model}), AutoConfig.from_pretrained(folder)


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


def hash_file(path: Path) -> str:
    """xxh64 of a file."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
