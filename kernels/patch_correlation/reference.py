"""The definition of the patch-correlation loss in plain torch; tests, benchmark and CPU use it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def correlate(x_BND: Tensor, rows_BN: Tensor, normalize: bool) -> Tensor:
    """Pearson correlation (or covariance) between patches, (B,N,N); rows that do not count are 0."""
    centred_BND = x_BND - x_BND.mean(-1, keepdim=True)
    if normalize:
        # A patch that does not count gets norm 1 before the division, so that its gradient is 0 and not NaN.
        square_BN1 = centred_BND.square().sum(-1, keepdim=True)
        scale_BN1 = torch.where(rows_BN[..., None], square_BN1, torch.ones_like(square_BN1)).rsqrt()
    else:
        scale_BN1 = x_BND.new_tensor(x_BND.shape[-1] ** -0.5)
    unit_BND = centred_BND * scale_BN1 * rows_BN[..., None]
    return unit_BND @ unit_BND.transpose(-1, -2)


def count_rows(x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, eps_x: float, eps_y: float) -> Tensor:
    """Patches that count, (B,N) bool: valid, and varying by more than eps on both sides."""
    rows_BN = (x_BND.detach().std(-1, correction=0) > eps_x) & (y_BNT.std(-1, correction=0) > eps_y)
    return rows_BN if valid_BN is None else rows_BN & valid_BN


def patch_corr_loss(
    x_BND: Tensor,
    y_BNT: Tensor,
    valid_BN: Tensor | None,
    focus_BN: Tensor | None,
    normalize: bool,
    loss: str,
    beta: float,
    exclude_diag: bool,
    eps_x: float,
    eps_y: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """See `place.kernels.patch_correlation.patch_corr_loss`; computed in fp32, or fp64 where x is fp64."""
    dtype = torch.promote_types(x_BND.dtype, torch.float32)
    x_BND, y_BNT = x_BND.to(dtype), y_BNT.to(dtype)
    rows_BN = count_rows(x_BND, y_BNT, valid_BN, eps_x, eps_y)
    pairs_BNN = rows_BN[:, :, None] & rows_BN[:, None, :]
    if exclude_diag:
        pairs_BNN = pairs_BNN & ~torch.eye(x_BND.shape[1], dtype=torch.bool, device=x_BND.device)
    if focus_BN is not None:
        pairs_BNN = pairs_BNN & (focus_BN[:, :, None] | focus_BN[:, None, :])
    distance_BNN = _distance(correlate(x_BND, rows_BN, normalize), correlate(y_BNT, rows_BN, normalize), loss, beta)
    total_B = (distance_BNN * pairs_BNN).sum((1, 2))
    return _reduce(total_B, pairs_BNN.sum((1, 2)), reduction)


def _distance(a: Tensor, b: Tensor, loss: str, beta: float) -> Tensor:
    if loss == "mse":
        return (a - b).square()
    if loss == "smooth_l1":
        return nn.functional.smooth_l1_loss(a, b, reduction="none", beta=beta)
    raise ValueError(f"patch_corr_loss: loss '{loss}', expected mse or smooth_l1")


def _reduce(total_B: Tensor, pairs_B: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    if reduction == "pairs":
        return total_B.sum() / pairs_B.sum().clamp(min=1), pairs_B.sum()
    mean_B = total_B / pairs_B.clamp(min=1)
    if reduction == "image":
        return mean_B.sum(), (pairs_B > 0).sum()
    if reduction == "none":
        return mean_B, pairs_B
    raise ValueError(f"patch_corr_loss: reduction '{reduction}', expected pairs, image or none")
