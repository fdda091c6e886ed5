"""The loss as a torch operator: what autograd, torch.compile and export see of the implementations.

Saved for backward are x, y and the two masks; everything else is computed again.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from place.kernels.patch_correlation import chunked, gram
from place.kernels.patch_correlation.reference import Options
from place.kernels.precision import leave_autocast
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


@torch.library.custom_op("place::patch_corr", mutates_args=())
def patch_corr(
    x: Tensor,
    y: Tensor,
    valid: Tensor | None,
    focus: Tensor | None,
    normalize: bool,
    loss: str,
    beta: float,
    exclude_diag: bool,
    eps_x: float,
    eps_y: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Sum of distances over the pairs that count, and their number, per image."""
    options = Options(normalize, loss, beta, exclude_diag, eps_x, eps_y)
    with leave_autocast(x.device.type):
        return find_implementation(implementation).sum_distances(x, y, valid, focus, options)


@torch.library.custom_op("place::patch_corr_gradient", mutates_args=())
def patch_corr_gradient(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    valid: Tensor | None,
    focus: Tensor | None,
    normalize: bool,
    loss: str,
    beta: float,
    exclude_diag: bool,
    eps_x: float,
    eps_y: float,
    implementation: str,
) -> Tensor:
    """Gradient to x. The distance is even in the difference of the two matrices: swap x and y for the gradient to y."""
    options = Options(normalize, loss, beta, exclude_diag, eps_x, eps_y)
    with leave_autocast(x.device.type):
        return find_implementation(implementation).compute_gradient(gradient, x, y, valid, focus, options)


@patch_corr.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=torch.int64)


@patch_corr_gradient.register_fake
def _(gradient: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, valid, focus, *ctx.options = inputs
    ctx.save_for_backward(x, y, valid, focus)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, y, valid, focus = ctx.saved_tensors
    normalize, loss, beta, exclude_diag, eps_x, eps_y, implementation = ctx.options
    alike = (valid, focus, normalize, loss, beta, exclude_diag)
    to_x = to_y = None
    if ctx.needs_input_grad[0]:
        to_x = patch_corr_gradient(gradient, x, y, *alike, eps_x, eps_y, implementation)
    if ctx.needs_input_grad[1]:
        to_y = patch_corr_gradient(gradient, y, x, *alike, eps_y, eps_x, implementation)
    return to_x, to_y, *[None] * 9


patch_corr.register_autograd(_backward, setup_context=_save)


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _HAS_TRITON


def find_implementation(name: str) -> ModuleType:
    """The module behind a name of `choose_implementation`; Triton is imported only when its kernels are called."""
    if name == "triton":
        from place.kernels.patch_correlation import launch

        return launch
    return {"chunked": chunked, "gram": gram}[name]
