"""What an engine saves, by the name of each parameter and free of world size, ZeRO stage and engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from place.config import RunError, UsageError
from place.distributed import read_world

WEIGHTS = "model.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A run of one parameter's elements that this rank updates: `owner[offset:offset + length]`, both flattened."""

    name: str
    start: int
    length: int
    owner: Tensor
    offset: int


class Share(NamedTuple):
    """A host copy of what one rank saves: fp32 runs under `NAME@START`, whole buffers under `NAME@0`; no pickle."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    numbers: dict[str, float]


Layout = dict[str, tuple[str, tuple[int, ...]]]
"""For each key of the model's state dict the name it is saved under (tied parameters share one) and its shape."""


def read_layout(model: nn.Module) -> Layout:
    """The layout of a whole model; call it before ZeRO-3 empties the parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = model.state_dict(keep_vars=True)
    return {key: (names.get(id(tensor), key), tuple(tensor.shape)) for key, tensor in tensors.items()}


def list_whole(model: nn.Module) -> list[Piece]:
    """Pieces of an engine whose every rank holds and updates all parameters."""
    return [Piece(name, 0, p.numel(), p, 0) for name, p in model.named_parameters() if p.requires_grad]


def copy_share(model: nn.Module, pieces: Iterable[Piece], optimizer: Optimizer, numbers: dict[str, float]) -> Share:
    """Copy pieces and their AdamW moments, on rank 0 also the buffers, to host memory, without a collective."""
    buffers = read_buffers(model) if read_world().is_first else {}
    weights = {f"{name}@0": _copy(buffer.flatten()) for name, buffer in buffers.items()}
    moments: dict[str, Tensor] = {}
    # A parameter without a gradient has taken no step: the number is that of those that have.
    steps = [float(state.get("step", 0)) for state in optimizer.state.values()]
    numbers = {"optimizer_step": max(steps, default=0.0), **numbers}
    for piece in pieces:
        key = f"{piece.name}@{piece.start}"
        weights[key] = _copy(_cut(piece.owner, piece))
        state = optimizer.state.get(piece.owner, {})
        for kind in MOMENTS:
            # Before the first step AdamW has no moments: zeros say the same.
            moments[f"{kind}:{key}"] = _copy(_cut(state[kind], piece)) if kind in state else torch.zeros(piece.length)
    return Share(weights, moments, numbers)


def load_share(
    folder: Path,
    model: nn.Module,
    layout: Layout,
    pieces: list[Piece],
    optimizer: Optimizer,
    numbers: dict[str, float],
) -> None:
    """Fill pieces, AdamW's moments and the model's buffers from a checkpoint that any number of ranks wrote.

    Raises:
        UsageError: another model wrote the checkpoint.
        RunError: the checkpoint holds no optimiser state, or not all of it.
    """
    moments = MomentReader(folder)
    with torch.no_grad(), safe_open(folder / WEIGHTS, framework="pt") as weights:
        check_layout(folder, weights, layout)
        for owner in {id(piece.owner): piece.owner for piece in pieces}.values():
            # The fused AdamW counts its steps on the device.
            device = owner.device if optimizer.defaults.get("fused") else None
            optimizer.state[owner] = {"step": torch.tensor(numbers["optimizer_step"], device=device)}
            optimizer.state[owner].update({kind: torch.zeros_like(owner) for kind in MOMENTS})
        for name, buffer in read_buffers(model).items():
            buffer.copy_(weights.get_tensor(name))
        for piece in pieces:
            _cut(piece.owner, piece).copy_(read_run(weights, piece.name, piece.start, piece.length))
            for kind in MOMENTS:
                run = moments.read(kind, piece.name, piece.start, piece.length)
                _cut(optimizer.state[piece.owner][kind], piece).copy_(run)


def check_layout(folder: Path, weights: Any, layout: Layout) -> None:
    """Raises UsageError at a tensor that the checkpoint and the model do not have alike.

    One of another shape would be filled with what lies at its place; one that the model lacks would be lost when saved.
    """
    there, how = set(weights.keys()), "resume with the model and loss sections that wrote it, or choose another run.dir"
    for key, (_, shape) in layout.items():
        stored = tuple(weights.get_slice(key).get_shape()) if key in there else None
        if stored != shape:
            has = f"has {key} of shape {list(stored)}" if stored is not None else f"has no {key}"
            raise UsageError(f"checkpoint {folder} {has}, this model has it of shape {list(shape)}; {how}")
    if there - layout.keys():
        raise UsageError(f"checkpoint {folder} has {min(there - layout.keys())}, which this model lacks; {how}")


def read_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict that are no parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def read_run(file: Any, name: str, start: int, length: int) -> Tensor:
    """Elements [start, start + length) of a flattened tensor; reads only the rows that hold them."""
    view = file.get_slice(name)
    shape = view.get_shape()
    if not shape:
        return file.get_tensor(name).flatten()
    row = torch.Size(shape[1:]).numel()
    first, last = start // row, -(-(start + length) // row)
    return view[first:last].flatten()[start - first * row :][:length]


def join_runs(layout: Layout, runs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from the runs of all ranks, keyed as `NAME@START`."""
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    sizes = {name: torch.Size(shape).numel() for name, shape in layout.values()}
    for key, run in runs:
        name, _, start = key.rpartition("@")
        flat = whole.setdefault(name, torch.empty(sizes[name], dtype=run.dtype))
        flat[int(start) : int(start) + run.numel()] = run
        filled[name] = filled.get(name, 0) + run.numel()
    assert filled == sizes, "the runs of all ranks do not add up to the model"
    tensors = {key: whole[name].view(shape) for key, (name, shape) in layout.items()}
    # safetensors refuses tied tensors, which share memory
    return {key: tensor.clone() if key != layout[key][0] else tensor for key, tensor in tensors.items()}


def name_moments(rank: int) -> str:
    """File of one rank's share of the moments."""
    return f"optimizer_{rank:05d}.safetensors"


class MomentReader:
    """Reads runs of AdamW's moments out of all shares of a checkpoint, whoever wrote which. Final."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[str, list[tuple[int, int, Any, str]]] = {}
        paths = sorted(folder.glob(name_moments(0).replace("00000", "*")))
        if not paths:
            raise RunError(f"checkpoint {folder} holds no optimiser state; start again in another run.dir")
        for path in paths:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  a safetensors file is no dict
                name, _, start = key.rpartition("@")
                length = file.get_slice(key).get_shape()[0]
                self.runs.setdefault(name, []).append((int(start), length, file, key))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of one flattened moment."""
        parts = list(self._overlaps(f"{kind}:{name}", start, start + length))
        if sum(part.numel() for part in parts) != length:
            raise RunError(f"checkpoint {self.folder} lacks {kind} of {name}; resume with the model that wrote it")
        return torch.cat(parts)

    def _overlaps(self, key: str, start: int, end: int) -> Iterator[Tensor]:
        for first, length, file, stored in sorted(self.runs.get(key, []), key=lambda run: run[0]):
            low, high = max(start, first), min(end, first + length)
            if low < high:
                yield file.get_slice(stored)[low - first : high - first]


def _cut(flat: Tensor, piece: Piece) -> Tensor:
    return flat.detach().view(-1)[piece.offset : piece.offset + piece.length]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
