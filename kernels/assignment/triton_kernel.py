"""Batched assignment in one launch: one program a problem, all of its state in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def assign(cost_BSK: Tensor, mask_BS: Tensor) -> Tensor:
    """See `place.kernels.assignment.assign`; the arithmetic is that of `reference`, step by step."""
    batch, rows, columns = cost_BSK.shape
    column_BS = torch.empty(batch, rows, dtype=torch.long, device=cost_BSK.device)
    lanes = max(2, triton.next_power_of_2(columns))
    assign_kernel[(batch,)](
        cost_BSK.contiguous(), mask_BS.contiguous().to(torch.int8), column_BS, rows, columns, LANES=lanes, num_warps=1
    )
    return column_BS


@triton.jit
def assign_kernel(cost_ptr, mask_ptr, column_ptr, rows, columns, LANES: tl.constexpr):
    """Shortest augmenting paths; a lane is a column in `v`, `row_of`, `shortest`, `path`, a row in `u`, `column_of`."""
    study = tl.program_id(0)
    lane = tl.arange(0, LANES)
    cost_ptr += study * rows * columns
    u = tl.zeros((LANES,), tl.float64)
    v = tl.zeros((LANES,), tl.float64)
    row_of = tl.full((LANES,), 0, tl.int32) + rows
    column_of = tl.full((LANES,), -1, tl.int32)
    for row in range(rows):
        active = tl.load(mask_ptr + study * rows + row) != 0
        shortest = tl.full((LANES,), float("inf"), tl.float64)
        path = tl.zeros((LANES,), tl.int32)
        visited = lane < 0
        length = tl.sum(u * 0, 0)
        current = tl.where(active, row, rows)
        column = tl.where(active, 0, -1)
        while current < rows:
            cost = tl.load(cost_ptr + current * columns + lane, mask=lane < columns, other=float("inf")).to(tl.float64)
            reached = length + (cost - tl.sum(tl.where(lane == current, u, 0.0), 0) - v)
            better = (reached < shortest) & ~visited
            shortest = tl.where(better, reached, shortest)
            path = tl.where(better, current, path)
            unvisited = tl.where(visited, float("inf"), shortest)
            length = tl.min(unvisited, 0)
            column = tl.argmin(unvisited, 0)
            visited = visited | (lane == column)
            current = tl.sum(tl.where(lane == column, row_of, 0), 0)
        slack = tl.where(visited, length - shortest, 0.0)
        v -= slack
        u += tl.sum(tl.where(column_of[:, None] == lane[None, :], slack[None, :], 0.0), 1)
        u += tl.where(lane == row, length, 0.0)
        # Swap the matching along the path, from its last column back to the new row, which has no column yet.
        while column >= 0:
            owner = tl.sum(tl.where(lane == column, path, 0), 0)
            following = tl.sum(tl.where(lane == owner, column_of, 0), 0)
            row_of = tl.where(lane == column, owner, row_of)
            column_of = tl.where(lane == owner, column, column_of)
            column = following
    tl.store(column_ptr + study * rows + lane, column_of.to(tl.int64), mask=lane < rows)
