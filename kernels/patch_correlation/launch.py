"""Launches the Triton kernels: buffers, grids, tiles. On the meta device it allocates and launches nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from place.kernels.patch_correlation import triton_kernel as kernels
from place.kernels.patch_correlation.configurations import Tile, choose_tile
from place.kernels.patch_correlation.reference import Options
from torch import Tensor

INTERPRETED = not isinstance(kernels.sum_kernel, triton.JITFunction)
H_BUDGET_BYTES = 32 << 20
"""H of as many images as fit in this is held at once: what a Hopper L2 cache of 50 MB keeps beside the rest."""
KEEPS = {torch.bfloat16: (tl.bfloat16, torch.bfloat16)}


def sum_distances(
    x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """As `reference.sum_distances`, without gradient."""
    x_BND, y_BNT, valid, focus = _ready(x_BND, y_BNT, valid_BN, focus_BN)
    batch, patches, width = x_BND.shape
    tile = _choose("distance", x_BND, y_BNT)
    assert tile is not None
    tiles = triton.cdiv(patches, tile.rows)
    stats = _compute_statistics(x_BND, y_BNT, valid, options)
    partial = x_BND.new_empty(batch, tiles * (tiles + 1) // 2, dtype=torch.float32)
    total_B = x_BND.new_empty(batch, dtype=torch.float32)
    pairs_B = x_BND.new_empty(batch, dtype=torch.int64)
    _run(
        kernels.distance_kernel, (tiles, tiles, batch), tile,
        x_BND, y_BNT, _pointer(focus, stats), stats, partial, patches, width, y_BNT.shape[2], *_strides(x_BND, y_BNT),
        tiles, options.beta, LOSS=options.loss, **_flags(x_BND, y_BNT, focus, options), BLOCK=tile.rows,
        BLOCK_K=tile.reduced, INTERPRETED=INTERPRETED,
    )  # fmt: skip
    _run(
        kernels.sum_kernel, (batch,), Tile(0, 0, 0, 4, 1),
        partial, stats, _pointer(focus, stats), total_B, pairs_B, patches, partial.shape[1],
        HAS_FOCUS=focus is not None, EXCLUDE_DIAG=options.exclude_diag, BLOCK=512,
    )  # fmt: skip
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
    x_BND, y_BNT, valid, focus = _ready(x_BND, y_BNT, valid_BN, focus_BN)
    stats = _compute_statistics(x_BND, y_BNT, valid, options)
    gradient_B = gradient_B.float().contiguous()
    result_BND = torch.empty(x_BND.shape, dtype=x_BND.dtype, device=x_BND.device)
    panel = _choose("panel", x_BND, y_BNT) if x_BND.dtype == torch.bfloat16 else None
    if panel is not None:
        _apply_on_chip(panel, x_BND, y_BNT, focus, stats, gradient_B, result_BND, options)
    else:
        _apply_by_chunks(x_BND, y_BNT, focus, stats, gradient_B, result_BND, options)
    return result_BND


def _apply_on_chip(
    tile: Tile,
    x_BND: Tensor,
    y_BNT: Tensor,
    focus: Tensor | None,
    stats: Tensor,
    gradient_B: Tensor,
    result_BND: Tensor,
    options: Options,
) -> None:
    batch, patches, width = x_BND.shape
    _run(
        kernels.panel_kernel, (triton.cdiv(patches, tile.rows), batch), tile,
        x_BND, y_BNT, _pointer(focus, stats), stats, gradient_B, result_BND, patches, width, y_BNT.shape[2],
        *_strides(x_BND, y_BNT), options.beta, LOSS=options.loss, **_flags(x_BND, y_BNT, focus, options),
        NORMALIZE=options.normalize, KEEP=tl.bfloat16, BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_D=64,
        BLOCK_K=tile.reduced, INTERPRETED=INTERPRETED,
    )  # fmt: skip


def _apply_by_chunks(
    x_BND: Tensor,
    y_BNT: Tensor,
    focus: Tensor | None,
    stats: Tensor,
    gradient_B: Tensor,
    result_BND: Tensor,
    options: Options,
) -> None:
    """H of some images at a time. An image's arithmetic does not depend on its chunk."""
    batch, patches, width = x_BND.shape
    slope, apply = _choose("slope", x_BND, y_BNT), _choose("apply", x_BND, x_BND)
    assert slope is not None
    assert apply is not None
    tiles = triton.cdiv(patches, slope.rows)
    keep, h_dtype = KEEPS.get(x_BND.dtype, (tl.float32, torch.float32))
    # H's rows are padded so that whole 16-byte stores stay inside them whatever N is.
    stride_h = triton.cdiv(patches, 16) * 16
    size = max(1, min(batch, H_BUDGET_BYTES // (patches * stride_h * h_dtype.itemsize)))
    h = x_BND.new_empty(size, patches, stride_h, dtype=h_dtype)
    sums = x_BND.new_empty(size, 2, tiles, patches, dtype=torch.float32)
    flags = _flags(x_BND, y_BNT, focus, options)
    for first in range(0, batch, size):
        count = min(size, batch - first)
        _run(
            kernels.slope_kernel, (tiles, tiles, count), slope,
            x_BND, y_BNT, _pointer(focus, stats), stats, h, sums, first, patches, width, y_BNT.shape[2],
            *_strides(x_BND, y_BNT), stride_h, tiles, options.beta, LOSS=options.loss, **flags, KEEP=keep,
            BLOCK=slope.rows, BLOCK_K=slope.reduced, INTERPRETED=INTERPRETED,
        )  # fmt: skip
        _run(
            kernels.apply_kernel, (triton.cdiv(width, apply.cols), triton.cdiv(patches, apply.rows), count), apply,
            x_BND, stats, h, sums, gradient_B, result_BND, first, patches, width, x_BND.stride(0), x_BND.stride(1),
            stride_h, tiles, NORMALIZE=options.normalize, CENTRE_X=flags["CENTRE_X"], BLOCK_M=apply.rows,
            BLOCK_D=apply.cols, BLOCK_K=apply.reduced, INTERPRETED=INTERPRETED,
        )  # fmt: skip


def _compute_statistics(x_BND: Tensor, y_BNT: Tensor, valid: Tensor | None, options: Options) -> Tensor:
    """(B,4,N) fp32: mean and scale of x, mean and scale of y."""
    batch, patches, width = x_BND.shape
    stats = x_BND.new_empty(batch, 4, patches, dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(max(width, y_BNT.shape[2])))
    rows = max(1, 4096 // block)
    _run(
        kernels.statistics_kernel, (triton.cdiv(patches, rows), batch), Tile(rows, 0, block, 4, 1),
        x_BND, y_BNT, _pointer(valid, stats), stats, patches, width, y_BNT.shape[2], *_strides(x_BND, y_BNT),
        options.eps_x, options.eps_y, HAS_VALID=valid is not None, NORMALIZE=options.normalize, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return stats


def _run(kernel: Any, grid: tuple[int, ...], tile: Tile, *args: Any, **constants: Any) -> None:
    device = args[0].device
    if device.type == "meta" or 0 in grid:
        return
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _ready(
    x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rows contiguous (all other strides are free) and masks as bytes."""
    x_BND, y_BNT = (side if side.stride(-1) == 1 else side.contiguous() for side in (x_BND, y_BNT))
    valid, focus = (None if mask is None else mask.contiguous().view(torch.uint8) for mask in (valid_BN, focus_BN))
    return x_BND, y_BNT, valid, focus


def _choose(kernel: str, x_BND: Tensor, y_BNT: Tensor) -> Tile | None:
    kind = "float" if torch.float32 in (x_BND.dtype, y_BNT.dtype) else "half"
    if x_BND.is_cuda:
        major, minor = torch.cuda.get_device_capability(x_BND.device)
        return choose_tile(kernel, major * 10 + minor, kind, x_BND.shape[1])
    return choose_tile(kernel, 90, kind, x_BND.shape[1])


def _flags(x_BND: Tensor, y_BNT: Tensor, focus: Tensor | None, options: Options) -> dict[str, bool]:
    return {
        "HAS_FOCUS": focus is not None,
        "EXCLUDE_DIAG": options.exclude_diag,
        "CENTRE_X": x_BND.dtype == torch.float32,
        "CENTRE_Y": y_BNT.dtype == torch.float32,
    }


def _strides(x_BND: Tensor, y_BNT: Tensor) -> tuple[int, int, int, int]:
    return x_BND.stride(0), x_BND.stride(1), y_BNT.stride(0), y_BNT.stride(1)


def _pointer(mask: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes some pointer where there is no mask; it does not read it."""
    return other if mask is None else mask
