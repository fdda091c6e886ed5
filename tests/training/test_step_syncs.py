"""A step that writes no line waits for no value of the device: on a CPU by its operators, on a GPU by torch's guard."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import VOCAB, build_batch, build_tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from place.batch import ON_HOST, Batch, Losses, Outputs
from place.losses.objective import compute_losses
from place.model.place import build_model
from place.training.engine import TorchEngine
from place.training.gradcache import backward_contrast
from place.training.transfer import send_ahead

WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}
"""Operators whose result, or its shape, the host knows only once the device is done; `item` is the first of them."""


class Waits(TorchDispatchMode):
    """Notes where such operators are called on what comes from tensors that stand for those of a device. Final.

    Shapes follow from tensors of the host, which may be asked for values: nobody waits for them. torch's own AdamW
    counts its steps on the host where the parameters lie on a CPU; the fused one of a GPU does not.
    """

    def __init__(self, of_device: list[Tensor]):
        super().__init__()
        self.found: list[str] = []
        self._kept = list(of_device)  # or a storage that is gone would be taken for the next one at its place
        self._keys = {_key(tensor) for tensor in of_device}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_list_tensors((args, kwargs)))
        is_of_device = any(map(self.is_of_device, given))
        if is_of_device and _waits(func.overloadpacket.__name__, given, kwargs):
            self.note(func.overloadpacket.__name__)
        result = func(*args, **kwargs)
        for tensor in _list_tensors(result) if is_of_device else ():
            self._kept.append(tensor)
            self._keys.add(_key(tensor))
        return result

    def is_of_device(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._keys

    def note(self, what: str) -> None:
        """Keep what was called and by whom."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        if not any("/torch/optim/" in frame.filename for frame in frames):
            self.found.append(f"{what} by " + ", by ".join(f"{f.filename}:{f.lineno}" for f in frames[:-4:-1]))


def _waits(name: str, given: list[Tensor], options: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_"):
        return any(index.dtype == torch.bool for index in given[1:])
    return name in WAITING and options.get("output_size") is None


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _list_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _list_tensors(part)
    elif isinstance(value, dict):
        yield from _list_tensors(list(value.values()))


def build_step(device: torch.device, accumulation: int, precision: str, method: str) -> tuple[TorchEngine, Batch, Any]:
    """An engine, a batch on the host, and the step of a loop that writes no line: copy, both passes, clip, AdamW."""
    config = build_tiny_config(
        optim={"clip_norm": 1.0},
        loss={"correlation": {"method": method}},
        train={"accumulation": accumulation},
        engine={"precision": precision},
    )
    torch.manual_seed(0)
    engine = TorchEngine(build_model(config, VOCAB, device)[0], config, device)
    batch = build_batch(config.train.global_batch)

    def compute(outputs: Outputs, of: Batch) -> Losses:
        return compute_losses(outputs, of, config.loss, 1 / 255)

    def take_step() -> Tensor:
        losses, _ = backward_contrast(engine, next(send_ahead(iter([batch]), device)).receive(), accumulation, compute)
        return losses.total.detach() + engine.step(1e-3)

    return engine, batch, take_step


def count_waits(
    engine: TorchEngine, batch: Batch, take_step: Callable[[], Tensor], patch: pytest.MonkeyPatch
) -> list[str]:
    """Where a step on a CPU would wait, if batch, model and optimiser lay on a device."""
    of_batch = [tensor for name, tensor in batch._asdict().items() if name not in ON_HOST]
    states = [*_list_tensors([*engine.optimizer.state.values()])]
    waits = Waits([*of_batch, *engine.model.parameters(), *engine.model.buffers(), *states])
    # These read a CPU's memory without any operator.
    for name in ("tolist", "numpy", "cpu"):
        plain = getattr(Tensor, name)

        def read(tensor: Tensor, *words: Any, name: str = name, plain: Any = plain, **options: Any) -> Any:
            if waits.is_of_device(tensor):
                waits.note(name)
            return plain(tensor, *words, **options)

        patch.setattr(Tensor, name, read)
    with waits:
        take_step()
    return waits.found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_writes_no_line_asks_for_no_value(
    accumulation: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, batch, take_step = build_step(torch.device("cpu"), accumulation, precision, "reference")
    take_step()
    assert count_waits(engine, batch, take_step, monkeypatch) == []


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (lambda norm: norm.item(), "_local_scalar_dense"),
        (lambda norm: bool(norm > 1), "_local_scalar_dense"),
        (lambda norm: norm.tolist(), "tolist"),
        (lambda norm: torch.nonzero(norm[None]), "nonzero"),
        (lambda norm: torch.masked_select(norm, norm > 1), "masked_select"),
        (lambda norm: norm[None][norm[None] > 1], "index"),
    ],
)
def test_a_step_that_asks_is_told_of(ask: Callable[[Tensor], Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch, take_step = build_step(torch.device("cpu"), 1, "fp32", "reference")
    (found,) = count_waits(engine, batch, lambda: ask(take_step()), monkeypatch)
    assert found.startswith(f"{name} by ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_writes_no_line_does_not_wait_for_a_gpu(accumulation: int, precision: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    _, _, take_step = build_step(device, accumulation, precision, "auto")
    for _ in range(3):
        take_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = take_step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            total.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.isfinite()
