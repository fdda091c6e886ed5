"""Plans and launches the Triton kernels: buffers, grids, tiles. Tools and tests read plans made on the meta device."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

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
PANEL_BLOCK_D = 64
KEEPS = {torch.bfloat16: (tl.bfloat16, torch.bfloat16)}


class Launch(NamedTuple):
    """One launch; `args` and `constants` are the kernel's, the last axis of the grid counts images."""

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def count_bytes(self) -> int:
        """What it reads and writes if each number moves once."""
        tensors = {id(arg): arg for arg in self.args if isinstance(arg, Tensor)}
        return sum(tensor.nbytes * self.grid[-1] // max(1, tensor.shape[0]) for tensor in tensors.values())


def sum_distances(
    x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """As `reference.sum_distances`, without gradient."""
    result, launches = plan_distances(x_BND, y_BNT, valid_BN, focus_BN, options)
    _run(launches, x_BND.device)
    return result


def compute_gradient(
    gradient_B: Tensor,
    x_BND: Tensor,
    y_BNT: Tensor,
    valid_BN: Tensor | None,
    focus_BN: Tensor | None,
    options: Options,
) -> Tensor:
    """Gradient to x of the sum over images of `gradient_B` times their totals; recomputes the differences."""
    result_BND, launches = plan_gradient(gradient_B, x_BND, y_BNT, valid_BN, focus_BN, options)
    _run(launches, x_BND.device)
    return result_BND


def plan_distances(
    x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None, options: Options
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Where totals and pair counts will be, and the launches that put them there."""
    x_BND, y_BNT, valid, focus = _ready(x_BND, y_BNT, valid_BN, focus_BN)
    batch, patches, width = x_BND.shape
    tile = _choose("distance", x_BND, y_BNT)
    assert tile is not None
    tiles = triton.cdiv(patches, tile.rows)
    stats, first = _plan_statistics(x_BND, y_BNT, valid, options)
    partial = x_BND.new_empty(batch, tiles * (tiles + 1) // 2, dtype=torch.float32)
    total_B = x_BND.new_empty(batch, dtype=torch.float32)
    pairs_B = x_BND.new_empty(batch, dtype=torch.int64)
    tensors = (x_BND, y_BNT, stats if focus is None else focus, stats, partial)
    sizes = (patches, width, y_BNT.shape[2], *_strides(x_BND, y_BNT), tiles, options.beta)
    distances = Launch(
        kernels.distance_kernel,
        (tiles, tiles, batch),
        tile,
        (*tensors, *sizes),
        {"LOSS": options.loss, **_flags(x_BND, y_BNT, focus, options), "BLOCK": tile.rows, "BLOCK_K": tile.reduced},
    )
    sums = Launch(
        kernels.sum_kernel,
        (batch,),
        Tile(0, 0, 0, 4, 1),
        (partial, stats, stats if focus is None else focus, total_B, pairs_B, patches, partial.shape[1]),
        {"HAS_FOCUS": focus is not None, "EXCLUDE_DIAG": options.exclude_diag, "BLOCK": 512},
    )
    return (total_B, pairs_B), [first, distances, sums]


def plan_gradient(
    gradient_B: Tensor,
    x_BND: Tensor,
    y_BNT: Tensor,
    valid_BN: Tensor | None,
    focus_BN: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Launch]]:
    """Where the gradient to x will be, and the launches that put it there."""
    x_BND, y_BNT, valid, focus = _ready(x_BND, y_BNT, valid_BN, focus_BN)
    stats, first = _plan_statistics(x_BND, y_BNT, valid, options)
    result_BND = torch.empty(x_BND.shape, dtype=x_BND.dtype, device=x_BND.device)
    panel = _choose("panel", x_BND, y_BNT) if x_BND.dtype == torch.bfloat16 else None
    plan = _plan_chunks if panel is None else _plan_panels
    return result_BND, [first, *plan(x_BND, y_BNT, focus, stats, gradient_B.float().contiguous(), result_BND, options)]


def _plan_panels(
    x_BND: Tensor,
    y_BNT: Tensor,
    focus: Tensor | None,
    stats: Tensor,
    gradient_B: Tensor,
    result_BND: Tensor,
    options: Options,
) -> list[Launch]:
    batch, patches, width = x_BND.shape
    tile = _choose("panel", x_BND, y_BNT)
    assert tile is not None
    tensors = (x_BND, y_BNT, stats if focus is None else focus, stats, gradient_B, result_BND)
    sizes = (patches, width, y_BNT.shape[2], *_strides(x_BND, y_BNT), options.beta)
    constants = {
        "LOSS": options.loss,
        **_flags(x_BND, y_BNT, focus, options),
        "NORMALIZE": options.normalize,
        "KEEP": tl.bfloat16,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.cols,
        "BLOCK_D": PANEL_BLOCK_D,
        "BLOCK_K": tile.reduced,
    }
    grid = (triton.cdiv(patches, tile.rows), batch)
    return [Launch(kernels.panel_kernel, grid, tile, (*tensors, *sizes), constants)]


def _plan_chunks(
    x_BND: Tensor,
    y_BNT: Tensor,
    focus: Tensor | None,
    stats: Tensor,
    gradient_B: Tensor,
    result_BND: Tensor,
    options: Options,
) -> list[Launch]:
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
    slope_constants = {"LOSS": options.loss, **flags, "KEEP": keep, "BLOCK": slope.rows, "BLOCK_K": slope.reduced}
    apply_constants = {
        "NORMALIZE": options.normalize,
        "CENTRE_X": flags["CENTRE_X"],
        "BLOCK_M": apply.rows,
        "BLOCK_D": apply.cols,
        "BLOCK_K": apply.reduced,
    }
    launches = []
    for first in range(0, batch, size):
        count = min(size, batch - first)
        tensors = (x_BND, y_BNT, stats if focus is None else focus, stats, h, sums)
        sizes = (first, patches, width, y_BNT.shape[2], *_strides(x_BND, y_BNT), stride_h, tiles, options.beta)
        launches.append(Launch(kernels.slope_kernel, (tiles, tiles, count), slope, (*tensors, *sizes), slope_constants))
        tensors = (x_BND, stats, h, sums, gradient_B, result_BND)
        strides = (first, patches, width, x_BND.stride(0), x_BND.stride(1), stride_h, tiles)
        grid = (triton.cdiv(width, apply.cols), triton.cdiv(patches, apply.rows), count)
        launches.append(Launch(kernels.apply_kernel, grid, apply, (*tensors, *strides), apply_constants))
    return launches


def _plan_statistics(x_BND: Tensor, y_BNT: Tensor, valid: Tensor | None, options: Options) -> tuple[Tensor, Launch]:
    """(B,4,N) fp32: mean and scale of x, mean and scale of y."""
    batch, patches, width = x_BND.shape
    stats = x_BND.new_empty(batch, 4, patches, dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(max(width, y_BNT.shape[2])))
    rows = max(1, 4096 // block)
    sizes = (patches, width, y_BNT.shape[2], *_strides(x_BND, y_BNT), options.eps_x, options.eps_y)
    constants = {"HAS_VALID": valid is not None, "NORMALIZE": options.normalize, "ROWS": rows, "BLOCK": block}
    tensors = (x_BND, y_BNT, stats if valid is None else valid, stats)
    grid = (triton.cdiv(patches, rows), batch)
    return stats, Launch(kernels.statistics_kernel, grid, Tile(rows, 0, block, 4, 1), (*tensors, *sizes), constants)


def _run(launches: list[Launch], device: torch.device) -> None:
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for kernel, grid, tile, args, constants in launches:
            if 0 in grid:
                continue
            if "INTERPRETED" in kernel.arg_names:
                constants = {**constants, "INTERPRETED": INTERPRETED}
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
        return choose_tile(kernel, major * 10 + minor, kind, *x_BND.shape[1:])
    return choose_tile(kernel, 90, kind, *x_BND.shape[1:])


def _flags(x_BND: Tensor, y_BNT: Tensor, focus: Tensor | None, options: Options) -> dict[str, bool]:
    return {
        "HAS_FOCUS": focus is not None,
        "EXCLUDE_DIAG": options.exclude_diag,
        "CENTRE_X": x_BND.dtype == torch.float32,
        "CENTRE_Y": y_BNT.dtype == torch.float32,
    }


def _strides(x_BND: Tensor, y_BNT: Tensor) -> tuple[int, int, int, int]:
    return x_BND.stride(0), x_BND.stride(1), y_BNT.stride(0), y_BNT.stride(1)
