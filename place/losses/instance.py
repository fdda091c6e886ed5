"""Instance alignment (ITA): symmetric InfoNCE over the global batch, identical reports are positives of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from place.distributed import gather, gather_with_grad, read_world
from place.kernels.contrast import Pairs, contrast


def instance_loss(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, report_group_B: Tensor, multi_positive: bool = True
) -> Tensor:
    """Mean over this rank's anchors of -mean over positives of log softmax, both directions halved.

    The mean over ranks is the loss of the global batch. Ranks exchange features (all-gather), not rows of logits: this
    rank's anchors stand against all columns, and a large matrix of them is taken in tiles (`place.kernels.contrast`).

    Args:
        image_BE, text_BE: unit-length fp32 features of this rank.
        scale: inverse temperature.
        report_group_B: int64, equal for identical reports.
        multi_positive: false makes a pair its own only positive.
    Source: quoted (Radford et al. 2021, CLIP) for the symmetric InfoNCE; the uniform target over positives is ours.
    """
    images_GE, texts_GE = gather_with_grad(image_BE), gather_with_grad(text_BE)
    pairs = _build_pairs(report_group_B, multi_positive)
    forth_B = contrast(image_BE, texts_GE, scale, pairs)
    back_B = contrast(text_BE, images_GE, scale, pairs)
    return (forth_B.mean() + back_B.mean()) / 2


def _build_pairs(report_group_B: Tensor, multi_positive: bool) -> Pairs:
    size = len(report_group_B)
    own_B = torch.arange(size, device=report_group_B.device) + size * read_world().rank
    if not multi_positive:
        return Pairs(own_B)
    return Pairs(own_B, report_group_B, gather(report_group_B), equal_is_positive=True)
