"""What the patch-correlation loss is measured against: each takes (x, y) and gives the loss, with gradient to x."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from place.kernels.patch_correlation import patch_corr_loss, reference
from place.kernels.patch_correlation.reference import Options
from torch import Tensor

Contender = Callable[[Tensor, Tensor], Tensor]
OPTIONS = Options()


def run_eager(x_BND: Tensor, y_BNT: Tensor) -> Tensor:
    """The definition, in fp32."""
    total_B, pairs_B = reference.sum_distances(x_BND, y_BNT, None, None, OPTIONS)
    return reference.reduce_images(total_B, pairs_B, "image")[0]


def run_autocast(x_BND: Tensor, y_BNT: Tensor) -> Tensor:
    """The definition under autocast: products of features that were rounded to bf16."""
    with torch.autocast(x_BND.device.type, dtype=torch.bfloat16):
        return run_eager(x_BND, y_BNT)


def run_fused(method: str, x_BND: Tensor, y_BNT: Tensor) -> Tensor:
    """Ours."""
    return patch_corr_loss(x_BND, y_BNT, method=method)[0]


def _multiply_raw(x_BND: Tensor) -> Tensor:
    if x_BND.is_cuda and x_BND.dtype != torch.float32:
        return torch.bmm(x_BND, x_BND.mT, out_dtype=torch.float32)
    return torch.bmm(x_BND.float(), x_BND.float().mT)


def _measure_rows(x_BND: Tensor) -> tuple[Tensor, Tensor]:
    wide = x_BND.float()
    mu_BN = wide.mean(-1)
    return mu_BN, (wide - mu_BN[..., None]).square().sum(-1).rsqrt()


def _compare(raw_x: Tensor, raw_y: Tensor, x_BND: Tensor, y_BNT: Tensor) -> tuple[Tensor, ...]:
    """Difference of the correlations from raw products: elementwise, so it compiles into few passes."""
    results = []
    for raw_BNN, side in ((raw_x, x_BND), (raw_y, y_BNT)):
        mu_BN, r_BN = _measure_rows(side)
        centred = raw_BNN - side.shape[-1] * mu_BN[:, :, None] * mu_BN[:, None]
        results += [r_BN[:, :, None] * r_BN[:, None] * centred, mu_BN, r_BN]
    c_BNN, mu_BN, r_BN, t_BNN, _, _ = results
    index_N = torch.arange(c_BNN.shape[1], device=c_BNN.device)
    return (c_BNN - t_BNN) * (index_N[:, None] != index_N), c_BNN, mu_BN, r_BN


def _finish_forward(raw_x: Tensor, raw_y: Tensor, x_BND: Tensor, y_BNT: Tensor) -> Tensor:
    return _compare(raw_x, raw_y, x_BND, y_BNT)[0].square().sum((1, 2))


def _start_backward(raw_x: Tensor, raw_y: Tensor, x_BND: Tensor, y_BNT: Tensor) -> tuple[Tensor, ...]:
    d_BNN, c_BNN, mu_BN, r_BN = _compare(raw_x, raw_y, x_BND, y_BNT)
    h_BNN = (2 * d_BNN * r_BN[:, :, None] * r_BN[:, None]).to(x_BND.dtype)
    t_BN = (h_BNN.float() * mu_BN[:, None]).sum(-1)
    return h_BNN, (2 * d_BNN * c_BNN).sum(-1), t_BN, mu_BN, r_BN


def _finish_backward(sum_BND: Tensor, x_BND: Tensor, s_BN: Tensor, t_BN: Tensor, mu_BN: Tensor, r_BN: Tensor) -> Tensor:
    out = sum_BND - t_BN[..., None] - (s_BN * r_BN.square())[..., None] * (x_BND.float() - mu_BN[..., None])
    return (2 * out).to(x_BND.dtype)


@functools.cache
def _compiled() -> tuple[Callable[..., Any], ...]:
    return tuple(torch.compile(function) for function in (_finish_forward, _start_backward, _finish_backward))


class _Library(torch.autograd.Function):
    """cuBLAS for the products of raw rows, torch.compile for what is between them; same algebra as the kernels."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, y_BNT: Tensor) -> Tensor:
        ctx.save_for_backward(x_BND, y_BNT)
        return _compiled()[0](_multiply_raw(x_BND), _multiply_raw(y_BNT), x_BND, y_BNT)

    @staticmethod
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, None]:
        x_BND, y_BNT = ctx.saved_tensors
        h_BNN, *rest = _compiled()[1](_multiply_raw(x_BND), _multiply_raw(y_BNT), x_BND, y_BNT)
        sum_BND = torch.bmm(h_BNN, x_BND)
        return _compiled()[2](sum_BND, x_BND, *rest) * gradient_B[:, None, None].to(x_BND.dtype), None


def run_library(x_BND: Tensor, y_BNT: Tensor) -> Tensor:
    """Products by cuBLAS, the rest compiled."""
    patches = x_BND.shape[1]
    return (_Library.apply(x_BND, y_BNT) / (patches * (patches - 1))).sum()


def build_contenders(device: str) -> dict[str, Contender]:
    """By name; compiled ones compile at their first call."""
    contenders: dict[str, Contender] = {
        "eager": run_eager,
        "eager autocast": run_autocast,
        "compile": torch.compile(run_autocast),
        "compile max-autotune": torch.compile(run_autocast, mode="max-autotune-no-cudagraphs"),
        "cublas + compiled": run_library,
        "gram": functools.partial(run_fused, "gram"),
        "fused": functools.partial(run_fused, "tiled"),
    }
    if device == "cpu":
        # Nothing to tune there, and the names would mislead.
        del contenders["compile max-autotune"], contenders["cublas + compiled"]
    return contenders
