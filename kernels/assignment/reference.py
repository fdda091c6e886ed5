"""Batched assignment by shortest augmenting paths in plain torch: the definition, without a wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _State(NamedTuple):
    """Duals and matching; the last entry of each dimension is a dummy, to which what is not matched points."""

    u_BS: Tensor
    v_BK: Tensor
    row_of_BK: Tensor
    column_of_BS: Tensor


def assign(cost_BSK: Tensor, mask_BS: Tensor) -> Tensor:
    """See `place.kernels.assignment.assign`; costs are finite, fp64, with at least as many columns as rows.

    Rows are taken in one after the other, for all problems at once: row i is matched along the shortest alternating
    path, which visits at most i + 1 columns. So the number of operations depends on the shape alone.
    Source: quoted (Crouse 2016, 'On implementing 2D rectangular assignment algorithms'), here batched.
    """
    batch, rows, columns = cost_BSK.shape
    cost_BSK = torch.nn.functional.pad(cost_BSK, (0, 1, 0, 1), value=torch.inf)
    state = _State(
        cost_BSK.new_zeros(batch, rows + 1),
        cost_BSK.new_zeros(batch, columns + 1),
        torch.full((batch, columns + 1), rows, device=cost_BSK.device),
        torch.full((batch, rows + 1), columns, device=cost_BSK.device),
    )
    for row in range(rows):
        state = _insert_row(cost_BSK, mask_BS[:, row], state, row)
    return torch.where(mask_BS, state.column_of_BS[:, :rows], -1)


def _insert_row(cost_BSK: Tensor, active_B: Tensor, state: _State, row: int) -> _State:
    """Match one more row where it is active; elsewhere every index points to a dummy and nothing changes."""
    u_BS, v_BK, row_of_BK, column_of_BS = state
    rows, columns = u_BS.shape[1] - 1, v_BK.shape[1] - 1
    reduced_BSK = cost_BSK - u_BS[:, :, None] - v_BK[:, None, :]
    shortest_BK = torch.full_like(v_BK, torch.inf)
    path_BK = torch.full_like(row_of_BK, rows)
    visited_BK = torch.zeros_like(row_of_BK, dtype=torch.bool)
    length_B1 = torch.zeros_like(v_BK[:, :1])
    current_B1 = torch.where(active_B, row, rows)[:, None]
    sink_B1 = torch.full_like(current_B1, columns)
    for _ in range(row + 1):
        going_B1 = current_B1 < rows
        reached_BK = length_B1 + reduced_BSK.take_along_dim(current_B1[..., None], 1)[:, 0]
        better_BK = (reached_BK < shortest_BK) & ~visited_BK
        shortest_BK = torch.where(better_BK, reached_BK, shortest_BK)
        path_BK = torch.where(better_BK, current_B1, path_BK)
        nearest_B1, column_B1 = shortest_BK.masked_fill(visited_BK, torch.inf).min(1, keepdim=True)
        column_B1 = torch.where(going_B1, column_B1, columns)
        visited_BK = visited_BK.scatter(1, column_B1, True)
        length_B1 = torch.where(going_B1, nearest_B1, length_B1)
        sink_B1 = torch.where(going_B1, column_B1, sink_B1)
        current_B1 = row_of_BK.gather(1, column_B1)
    slack_BK = (length_B1 - shortest_BK).where(visited_BK, 0)
    slack_BK[:, -1] = 0
    u_BS = u_BS + slack_BK.gather(1, column_of_BS)
    u_BS[:, row] += length_B1[:, 0]
    return _State(u_BS, v_BK - slack_BK, *_augment(path_BK, sink_B1, row_of_BK, column_of_BS, row + 1))


def _augment(
    path_BK: Tensor, column_B1: Tensor, row_of_BK: Tensor, column_of_BS: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Swap the matching along the path from its last column back; a path that has ended goes on in the dummies."""
    for _ in range(steps):
        row_B1 = path_BK.gather(1, column_B1)
        next_B1 = column_of_BS.gather(1, row_B1)
        row_of_BK = row_of_BK.scatter(1, column_B1, row_B1)
        column_of_BS = column_of_BS.scatter(1, row_B1, column_B1)
        column_B1 = next_B1
    return row_of_BK, column_of_BS
