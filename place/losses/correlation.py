"""Correlation exploration (CCE): how patches vary together, predicted under the report, against how their pixels do."""

from __future__ import annotations

import torch
from torch import Tensor

from place.config import CorrelationLossConfig
from place.distributed import average_global
from place.kernels.patch_correlation import patch_corr_loss


def correlation_loss(
    z_BNE: Tensor,
    target_BND: Tensor,
    valid_BN: Tensor,
    focus_BN: Tensor,
    config: CorrelationLossConfig,
    grey_level: float,
) -> Tensor:
    """Distance of the two patch correlations, mean per image, divided by the count of images with pairs on all ranks.

    The mean over ranks is the loss of the global batch.

    Args:
        z_BNE: report-conditioned patch features; in bf16 they go to the tensor cores as they are.
        target_BND: pixel patches or stop-gradient features.
        valid_BN, focus_BN: bool; pairs count between valid patches, of which at least one is in focus.
        grey_level: one of 255 grey levels in the unit of target pixels; flatter patches do not count.
    Source: quoted (PLACE abstract: identify correlations among image patches); the form is ours.
    """
    if z_BNE.dtype in (torch.bfloat16, torch.float16):
        # An fp32 target is multiplied three times over, in narrow tiles. A correlation does not see a patch's mean,
        # which would cost digits: without it the rounding is less than that of z.
        target_BND = (target_BND - target_BND.mean(-1, keepdim=True)).to(z_BNE.dtype)
    total, count = patch_corr_loss(
        z_BNE,
        target_BND,
        valid_BN=valid_BN,
        focus_BN=focus_BN,
        normalize=config.normalize,
        loss=config.distance,
        beta=config.beta,
        eps_y=grey_level if config.target == "pixels" else 1e-6,
        reduction="image",
        method=config.method,
    )
    return average_global(total, count)
