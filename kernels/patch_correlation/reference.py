"""The definition of the patch-correlation loss in plain torch; tests and benchmark measure against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Options(NamedTuple):
    """What is computed, whichever way: see `place.kernels.patch_correlation.patch_corr_loss`."""

    normalize: bool = True
    loss: str = "mse"
    beta: float = 0.1
    exclude_diag: bool = True
    eps_x: float = 1e-6
    eps_y: float = 1e-6


def correlate(x_BND: Tensor, rows_BN: Tensor, normalize: bool) -> Tensor:
    """Pearson correlation (or covariance) between patches, (B,N,N); rows that do not count are 0."""
    # Padding may hold anything, also what a product with 0 does not remove.
    centred_BND = (x_BND - x_BND.mean(-1, keepdim=True)).masked_fill(~rows_BN[..., None], 0)
    if normalize:
        # A patch that does not count gets norm 1 before the division, so that its gradient is 0 and not NaN.
        square_BN1 = centred_BND.square().sum(-1, keepdim=True)
        scale_BN1 = torch.where(rows_BN[..., None], square_BN1, torch.ones_like(square_BN1)).rsqrt()
    else:
        scale_BN1 = x_BND.new_tensor(x_BND.shape[-1] ** -0.5)
    unit_BND = centred_BND * scale_BN1
    return unit_BND @ unit_BND.transpose(-1, -2)


def count_rows(x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, eps_x: float, eps_y: float) -> Tensor:
    """Patches that count, (B,N) bool: valid, and varying by more than eps on both sides.

    A patch that is not finite counts, so that it reaches the loss and is seen.
    """
    flat_BN = (x_BND.detach().std(-1, correction=0) <= eps_x) | (y_BNT.detach().std(-1, correction=0) <= eps_y)
    return ~flat_BN if valid_BN is None else ~flat_BN & valid_BN


def sum_distances(
    x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Sum over the pairs that count, and their number, per image; in fp32, or fp64 where x is fp64."""
    dtype = torch.promote_types(x_BND.dtype, torch.float32)
    x_BND, y_BNT = x_BND.to(dtype), y_BNT.to(dtype)
    rows_BN = count_rows(x_BND, y_BNT, valid_BN, options.eps_x, options.eps_y)
    pairs_BNN = rows_BN[:, :, None] & rows_BN[:, None, :]
    if options.exclude_diag:
        pairs_BNN = pairs_BNN & ~torch.eye(x_BND.shape[1], dtype=torch.bool, device=x_BND.device)
    if focus_BN is not None:
        pairs_BNN = pairs_BNN & (focus_BN[:, :, None] | focus_BN[:, None, :])
    ours_BNN, theirs_BNN = (correlate(side, rows_BN, options.normalize) for side in (x_BND, y_BNT))
    distance_BNN = compute_distance(ours_BNN, theirs_BNN, options.loss, options.beta)
    return (distance_BNN * pairs_BNN).sum((1, 2)), pairs_BNN.sum((1, 2))


def compute_distance(a: Tensor, b: Tensor, loss: str, beta: float) -> Tensor:
    """Elementwise distance by its name."""
    if loss == "mse":
        return (a - b).square()
    return nn.functional.smooth_l1_loss(a, b, reduction="none", beta=beta)


def reduce_images(total_B: Tensor, pairs_B: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss and what to divide by, from sums and pair counts per image."""
    if reduction == "pairs":
        return total_B.sum() / pairs_B.sum().clamp(min=1), pairs_B.sum()
    mean_B = total_B / pairs_B.clamp(min=1)
    if reduction == "image":
        return mean_B.sum(), (pairs_B > 0).sum()
    return mean_B, pairs_B
