"""Mean squares without any N x N matrix: |W J W'|^2 = sum of J_a J_b (W'W)_ab^2 with W = [X|Y] and J = (+1, -1).

Pairs that touch a marked patch are all pairs less those between unmarked ones; the diagonal is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from place.kernels.patch_correlation.chunked import count_pairs, scale_images
from place.kernels.patch_correlation.reference import Options
from torch import Tensor


def sum_distances(
    x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """As `reference.sum_distances` for `loss="mse"`, without gradient.

    Where x and y are nearly alike, large sums cancel: fp32 is summed in fp64 (1.4e-5 of the loss were lost on a GPU).
    """
    dtype = torch.promote_types(x_BND.dtype, torch.float32)
    wide = torch.float64 if x_BND.dtype == torch.float32 else None
    total_B = x_BND.new_empty(x_BND.shape[0], dtype=dtype)
    pairs_B = x_BND.new_empty(x_BND.shape[0], dtype=torch.int64)
    for part in _parts(x_BND, y_BNT):
        w_BNW, _, rows_BN, focus = _join(x_BND, y_BNT, valid_BN, focus_BN, options, part, wide)
        pairs_B[part] = count_pairs(rows_BN, focus, options)
        total_B[part] = _sum_all(w_BNW, x_BND)
        if focus is not None:
            total_B[part] -= _sum_all(w_BNW * ~focus[..., None], x_BND)
        if options.exclude_diag and not options.normalize:
            diagonal_BN = _diagonal(w_BNW, x_BND.shape[-1])
            total_B[part] -= (diagonal_BN if focus is None else diagonal_BN * focus).square().sum(-1)
    return total_B.clamp_(min=0), pairs_B


def compute_gradient(
    gradient_B: Tensor,
    x_BND: Tensor,
    y_BNT: Tensor,
    valid_BN: Tensor | None,
    focus_BN: Tensor | None,
    options: Options,
) -> Tensor:
    """As `chunked.compute_gradient` for `loss="mse"`."""
    width = x_BND.shape[-1]
    result_BND = torch.empty(x_BND.shape, dtype=x_BND.dtype, device=x_BND.device)
    for part in _parts(x_BND, y_BNT):
        w_BNW, scale_BN, _, focus = _join(x_BND, y_BNT, valid_BN, focus_BN, options, part)
        sum_BND = _sum_slopes(w_BNW, x_BND)
        if focus is not None:
            apart_BN1 = ~focus[..., None]
            sum_BND -= _sum_slopes(w_BNW * apart_BN1, x_BND) * apart_BN1
        x_part = w_BNW[..., :width]
        if options.normalize:
            sum_BND -= (sum_BND * x_part).sum(-1, keepdim=True) * x_part
        elif options.exclude_diag:
            diagonal_BN = _diagonal(w_BNW, width)
            sum_BND -= 2 * (diagonal_BN if focus is None else diagonal_BN * focus)[..., None] * x_part
        result_BND[part] = sum_BND * (2 * gradient_B[part, None] * scale_BN)[..., None]
    return result_BND


def _parts(x_BND: Tensor, y_BNT: Tensor) -> list[slice]:
    """As many images at a time as take no more memory than bf16 inputs do: a quarter of them, or fewer.

    An image takes fp32 rows, the halves of both factors and what rounding left (24 bytes an element), and three W x W
    products.
    """
    images, patches = x_BND.shape[:2]
    width = x_BND.shape[2] + y_BNT.shape[2]
    fitting = 2 * images * patches * width // (24 * patches * width + 12 * width**2)
    size = max(1, min(fitting, images // 4))
    return [slice(start, start + size) for start in range(0, images, size)]


def _join(
    x_BND: Tensor,
    y_BNT: Tensor,
    valid_BN: Tensor | None,
    focus_BN: Tensor | None,
    options: Options,
    part: slice,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x_part, y_part, scale_BN, rows_BN = scale_images(x_BND, y_BNT, valid_BN, options, part, dtype)
    return torch.cat([x_part, y_part], -1), scale_BN, rows_BN, None if focus_BN is None else focus_BN[part]


def _sum_all(w_BNW: Tensor, x_BND: Tensor) -> Tensor:
    sign_W = _signs(w_BNW, x_BND.shape[-1])
    square_BWW = multiply(w_BNW.transpose(1, 2), w_BNW, x_BND.dtype).square_()
    return (square_BWW @ sign_W) @ sign_W


def _sum_slopes(w_BNW: Tensor, x_BND: Tensor) -> Tensor:
    """sum over j of G_ij x_j with G = 2 (C - T), all pairs."""
    width = x_BND.shape[-1]
    small_BWD = multiply(w_BNW.transpose(1, 2), w_BNW[..., :width], x_BND.dtype)
    small_BWD *= 2 * _signs(w_BNW, width)[:, None]
    return multiply(w_BNW, small_BWD, x_BND.dtype)


def _signs(w_BNW: Tensor, width: int) -> Tensor:
    sign_W = w_BNW.new_ones(w_BNW.shape[-1])
    sign_W[width:] = -1
    return sign_W


def _diagonal(w_BNW: Tensor, width: int) -> Tensor:
    """C_ii - T_ii; 0 for correlations."""
    return w_BNW[..., :width].square().sum(-1) - w_BNW[..., width:].square().sum(-1)


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched product in fp32. On a GPU, and for inputs that came in half precision, three products of halves."""
    if not a.is_cuda or dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return multiply_halves(a, b, lambda left, right: torch.bmm(left, right, out_dtype=torch.float32))


def multiply_halves(a: Tensor, b: Tensor, multiply_half: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Batched product of fp32 factors by fp16 products with fp32 sums: some 21 bits of mantissa at the speed of fp16.

    Each image's factor is scaled to at most 1 and split into what fp16 holds of it and what it leaves. Two bf16 parts
    hold 16 bits, which was not enough: 5e-4 of the loss were lost where x and y are nearly alike.
    """
    scales, parts = [], []
    for factor in (a, b):
        scale = factor.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = factor / scale
        high = scaled.half()
        parts += [high, (scaled - high).half()]
        scales.append(scale)
    a_high, a_low, b_high, b_low = parts
    result = multiply_half(a_high, b_high)
    result += multiply_half(a_high, b_low)
    result += multiply_half(a_low, b_high)
    return result.mul_(scales[0] * scales[1])
