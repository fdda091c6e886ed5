"""One-to-one pairing of rows with columns by least total cost, for a batch of small problems at once."""

from __future__ import annotations

import functools
import importlib.util

import torch
from place.kernels.assignment import reference
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(cost_BSK: Tensor, mask_BS: Tensor, method: str = "auto") -> Tensor:
    """Pair each row with a column of its own so that the total cost of each problem is least.

    Nothing waits for the device: on a GPU it is one kernel, and the operations of `torch` depend on the shape alone.

    Args:
        cost_BSK: floating point; NaN counts as 0 and an infinity as the largest number, so that there always is a
            pairing.
        mask_BS: bool, true on rows that are paired.
        method: `auto` or a key of `METHODS`. All reach the least cost, in fp64; of several pairings that reach it each
            takes the same one whenever asked, `torch` and `triton` also the same as each other.
    Returns:
        (B,S) int64, the column of each row; -1 for masked rows, and for the rows left over in a problem that has more
        rows than columns.
    Raises:
        ValueError: unknown method.
    Source: ours; the algorithm is Crouse's (2016), which is scipy's too.
    """
    if method == "auto":
        method = _choose(cost_BSK.device.type)
    if method not in METHODS:
        raise ValueError(f"assign: method '{method}', expected auto or one of {sorted(METHODS)}")
    return METHODS[method](cost_BSK.detach().nan_to_num(), mask_BS)


@functools.cache
def _choose(device_type: str) -> str:
    """On a CPU there is no device to wait for, and scipy is faster than forty small operations a row."""
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "scipy" if device_type == "cpu" else "torch"


def _by_scipy(cost_BSK: Tensor, mask_BS: Tensor) -> Tensor:
    column_BS = torch.full(mask_BS.shape, -1, dtype=torch.long)
    for study, cost_SK in enumerate(cost_BSK.double()):
        real = mask_BS[study].nonzero()[:, 0]
        row, column = linear_sum_assignment(cost_SK[real].numpy())
        column_BS[study, real[row]] = torch.as_tensor(column)
    return column_BS


def _by_torch(cost_BSK: Tensor, mask_BS: Tensor) -> Tensor:
    return _drop_surplus(reference.assign(_widen(cost_BSK), mask_BS), cost_BSK)


def _by_triton(cost_BSK: Tensor, mask_BS: Tensor) -> Tensor:
    from place.kernels.assignment import triton_kernel

    return _drop_surplus(triton_kernel.assign(_widen(cost_BSK), mask_BS), cost_BSK)


def _widen(cost_BSK: Tensor) -> Tensor:
    """At least as many columns as rows, fp64: an added column costs more than any pairing of real ones can save."""
    _, rows, columns = cost_BSK.shape
    if rows <= columns:
        return cost_BSK.double()
    surplus_BS1 = 1 + 2 * rows * cost_BSK.double().abs().amax((1, 2), keepdim=True).expand(-1, rows, 1)
    return torch.cat([cost_BSK.double(), surplus_BS1.expand(-1, -1, rows - columns)], 2)


def _drop_surplus(column_BS: Tensor, cost_BSK: Tensor) -> Tensor:
    return torch.where(column_BS < cost_BSK.shape[2], column_BS, -1)


METHODS = {"scipy": _by_scipy, "torch": _by_torch, "triton": _by_triton}
