"""What tests and benchmark share: awkward inputs, the truth in float64, plain torch at the same precision."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from place.kernels.patch_correlation import reference
from place.kernels.patch_correlation.reference import Options
from torch import Tensor

SHAPES = [(256, 196, 128, 256), (256, 196, 768, 256), (64, 1024, 768, 256), (64, 1024, 128, 256), (16, 4096, 256, 256)]
"""(B, N, D, Dt) that the benchmark reports on."""


class Case(NamedTuple):
    """One call of the patch-correlation loss."""

    patches: int
    width: int = 33
    target_width: int = 48
    batch: int = 3
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None
    """None takes that of x."""
    options: Options = Options()
    focus: bool = False
    strided: bool = False
    """x and y are slices of wider tensors, with batch and patches in the other order."""
    awkward: bool = True
    """The last image is padding alone; others hold constant rows, padded rows with large numbers, and large means."""
    noise: float | None = None
    """y is x plus this much noise, as late in training; None draws y by itself."""


class Inputs(NamedTuple):
    x_BND: Tensor
    y_BNT: Tensor
    valid_BN: Tensor
    focus_BN: Tensor | None
    weight_B: Tensor
    """What the totals are weighted with before backward."""


def build_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case; the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.patches)
    x_BND = torch.randn(*shape, case.width, generator=rng)
    y_BNT = torch.randn(*shape, case.target_width, generator=rng)
    valid_BN = torch.ones(shape, dtype=torch.bool)
    if case.noise is not None:
        assert case.width == case.target_width
        y_BNT = x_BND + case.noise * y_BNT
    if case.awkward:
        valid_BN = torch.rand(shape, generator=rng) > 0.2
        valid_BN[-1] = False
        x_BND[0] += 3
        x_BND[~valid_BN] = 1e4
        x_BND[0, case.patches // 2] = 1.5
        y_BNT[1, case.patches // 3] = -2
    focus_BN = torch.rand(shape, generator=rng) > 0.6 if case.focus else None
    x_BND, y_BNT = _convert(x_BND, case.dtype), _convert(y_BNT, case.target_dtype or case.dtype)
    if case.strided:
        x_BND, y_BNT = _spread(x_BND), _spread(y_BNT)
    weight_B = 1 + torch.rand(case.batch, generator=rng)
    focus_BN = None if focus_BN is None else focus_BN.to(device)
    return Inputs(_move(x_BND, device), _move(y_BNT, device), valid_BN.to(device), focus_BN, weight_B.to(device))


def _convert(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return values.to(dtype)
    limits = torch.iinfo(dtype)
    return (40 * values + (limits.min + limits.max + 1) // 2).round().clamp(limits.min, limits.max).to(dtype)


def _spread(values_BND: Tensor) -> Tensor:
    batch, patches, width = values_BND.shape
    wide = values_BND.new_zeros(patches, batch, width + 3)
    wide[..., :width] = values_BND.transpose(0, 1)
    return wide[..., :width].transpose(0, 1)


def _move(tensor: Tensor, device: str) -> Tensor:
    """To a device with its strides."""
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor)


class Result(NamedTuple):
    total_B: Tensor
    pairs_B: Tensor
    to_x: Tensor
    to_y: Tensor | None


def compute_truth(inputs: Inputs, options: Options) -> Result:
    """Totals and gradients of the definition in float64."""
    wide = inputs._replace(x_BND=inputs.x_BND.double(), y_BNT=inputs.y_BNT.double())
    return _differentiate(wide, options)


def compute_plain(inputs: Inputs, options: Options) -> Result:
    """The same in plain torch at the precision of x: under autocast for halves, as it is for fp32."""
    dtype = inputs.x_BND.dtype
    with torch.autocast(inputs.x_BND.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return _differentiate(inputs, options)


def _differentiate(inputs: Inputs, options: Options) -> Result:
    x_BND, y_BNT = inputs.x_BND.detach().requires_grad_(), inputs.y_BNT.detach()
    if y_BNT.is_floating_point():
        y_BNT.requires_grad_()
    with torch.enable_grad():
        total_B, pairs_B = reference.sum_distances(x_BND, y_BNT, inputs.valid_BN, inputs.focus_BN, options)
    (total_B * inputs.weight_B).sum().backward()
    assert x_BND.grad is not None
    return Result(total_B.detach(), pairs_B, x_BND.grad, y_BNT.grad)


def measure_error(value: Tensor, truth: Tensor, floor: float = 1e-3) -> float:
    """Norm of the difference over the norm of the truth (at least `floor`); infinite if something is not finite."""
    difference = value.double() - truth.double()
    if not difference.isfinite().all():
        return float("inf")
    return float(difference.detach().norm() / truth.double().norm().clamp(min=floor))


def measure_peak_bytes(function: Callable[[], object]) -> int:
    """Largest sum of what a call allocates at once on a CPU, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@contextlib.contextmanager
def poison_buffers() -> Iterator[None]:
    """Every buffer that is allocated inside starts as NaN (the largest number, if integer)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
