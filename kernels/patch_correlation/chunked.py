"""The loss and its gradient in row panels of a few images: what a CPU runs, with no N x N matrix for the batch.

Plain torch in fp32 (fp64 where x is fp64). Only the upper triangle of panels is computed: both matrices are symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from place.kernels.patch_correlation.reference import Options
from torch import Tensor

PANEL = 256
"""Rows of a panel."""
CHUNK_PAIRS = 1 << 18
"""As many images are taken together as keep their panels within this many pairs (1 MiB in fp32)."""


def sum_distances(
    x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """As `reference.sum_distances`, without gradient."""
    dtype = torch.promote_types(x_BND.dtype, torch.float32)
    total_B = x_BND.new_zeros(x_BND.shape[0], dtype=dtype)
    pairs_B = x_BND.new_zeros(x_BND.shape[0], dtype=torch.int64)
    for images in _chunks(x_BND):
        x_CND, y_CNT, _, rows_CN = scale_images(x_BND, y_BNT, valid_BN, options, images)
        focus_CN = None if focus_BN is None else focus_BN[images]
        pairs_B[images] = count_pairs(rows_CN, focus_CN, options)
        for _, d_CPM in _differences(x_CND, y_CNT, focus_CN, options):
            distance_CPM = _distance(d_CPM, options)
            own = distance_CPM[..., : distance_CPM.shape[1]]
            total_B[images] += 2 * distance_CPM.sum((1, 2)) - own.sum((1, 2))
    return total_B, pairs_B


def compute_gradient(
    gradient_B: Tensor,
    x_BND: Tensor,
    y_BNT: Tensor,
    valid_BN: Tensor | None,
    focus_BN: Tensor | None,
    options: Options,
) -> Tensor:
    """Gradient to x of the sum over images of `gradient_B` times their totals; recomputes the differences."""
    result_BND = torch.empty(x_BND.shape, dtype=x_BND.dtype, device=x_BND.device)
    for images in _chunks(x_BND):
        x_CND, y_CNT, scale_CN, _ = scale_images(x_BND, y_BNT, valid_BN, options, images)
        sum_CND = torch.zeros_like(x_CND)
        for start, d_CPM in _differences(x_CND, y_CNT, None if focus_BN is None else focus_BN[images], options):
            slope_CPM, stop = _slope(d_CPM, options), start + d_CPM.shape[1]
            sum_CND[:, start:stop].baddbmm_(slope_CPM, x_CND[:, start:])
            sum_CND[:, stop:].baddbmm_(slope_CPM[..., stop - start :].mT, x_CND[:, start:stop])
        if options.normalize:
            sum_CND.addcmul_((sum_CND * x_CND).sum(-1, keepdim=True), x_CND, value=-1)
        result_BND[images] = sum_CND.mul_((2 * gradient_B[images, None] * scale_CN)[..., None])
    return result_BND


def _chunks(x_BND: Tensor) -> list[slice]:
    batch, patches, _ = x_BND.shape
    size = max(1, CHUNK_PAIRS // max(1, patches * min(patches, PANEL)))
    return [slice(start, start + size) for start in range(0, batch, size)]


def scale_images(
    x_BND: Tensor,
    y_BNT: Tensor,
    valid_BN: Tensor | None,
    options: Options,
    images: slice,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred and scaled rows of x and y, x's scales, and which rows count; rows that do not count are 0.

    A row that is not finite counts, so that it reaches the loss and is seen. Rows are in `dtype`, None takes at least
    fp32.
    """
    dtype = dtype or torch.promote_types(x_BND.dtype, torch.float32)
    sides, scales, rows = [], [], None if valid_BN is None else valid_BN[images]
    for side, eps in ((x_BND, options.eps_x), (y_BNT, options.eps_y)):
        # A copy even where the type is right: it is centred and scaled in place.
        row = side[images].to(dtype, copy=True)
        row -= row.mean(-1, keepdim=True)
        square = torch.linalg.vector_norm(row, dim=-1).square()
        varies = ~((square / row.shape[-1]).sqrt() <= eps)
        rows = varies if rows is None else rows & varies
        sides.append(row)
        scales.append(square.rsqrt() if options.normalize else torch.full_like(square, row.shape[-1] ** -0.5))
    assert rows is not None
    scales = [scale.masked_fill_(~rows, 0) for scale in scales]
    for row, scale in zip(sides, scales):
        # Padding may hold anything, also what a product with 0 does not remove.
        row.masked_fill_(~rows[..., None], 0).mul_(scale[..., None])
    return sides[0], sides[1], scales[0], rows


def count_pairs(rows_BN: Tensor, focus_BN: Tensor | None, options: Options) -> Tensor:
    """Number of pairs that count, per image, without looking at pairs."""
    rows_B = rows_BN.sum(-1)
    if focus_BN is None:
        return rows_B * (rows_B - 1) if options.exclude_diag else rows_B * rows_B
    apart_B = (rows_BN & ~focus_BN).sum(-1)
    pairs_B = rows_B * rows_B - apart_B * apart_B
    return pairs_B - (rows_B - apart_B) if options.exclude_diag else pairs_B


def _differences(
    x_CND: Tensor, y_CNT: Tensor, focus_CN: Tensor | None, options: Options
) -> Iterator[tuple[int, Tensor]]:
    """(first row, C - T for its panel of rows and the columns from there on), 0 where a pair does not count."""
    for start in range(0, x_CND.shape[1], PANEL):
        stop = start + PANEL
        d_CPM = torch.bmm(x_CND[:, start:stop], x_CND[:, start:].mT)
        d_CPM.baddbmm_(y_CNT[:, start:stop], y_CNT[:, start:].mT, alpha=-1)
        if options.exclude_diag:
            d_CPM.diagonal(dim1=1, dim2=2).zero_()
        if focus_CN is not None:
            d_CPM.masked_fill_(~(focus_CN[:, start:stop, None] | focus_CN[:, None, start:]), 0)
        yield start, d_CPM


def _distance(d_CPM: Tensor, options: Options) -> Tensor:
    """Distance from the difference, which it may overwrite."""
    if options.loss == "mse":
        return d_CPM.square_()
    zero = d_CPM.new_zeros(()).expand_as(d_CPM)
    return torch.nn.functional.smooth_l1_loss(d_CPM, zero, reduction="none", beta=options.beta)


def _slope(d_CPM: Tensor, options: Options) -> Tensor:
    """Derivative of the distance, in place of the difference."""
    return d_CPM.mul_(2) if options.loss == "mse" else d_CPM.div_(options.beta).clamp_(-1, 1)
