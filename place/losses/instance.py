"""Instance alignment (ITA): symmetric InfoNCE over the global batch, identical reports are positives of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from place.distributed import gather, gather_with_grad, read_world


def instance_loss(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, report_group_B: Tensor, multi_positive: bool = True
) -> Tensor:
    """Mean over this rank's anchors of -mean over positives of log softmax, both directions halved.

    The mean over ranks is the loss of the global batch.

    Args:
        image_BE, text_BE: unit-length fp32 features of this rank.
        scale: inverse temperature.
        report_group_B: int64, equal for identical reports.
        multi_positive: false makes a pair its own only positive.
    Source: quoted (Radford et al. 2021, CLIP) for the symmetric InfoNCE; the uniform target over positives is ours.
    """
    images_GE, texts_GE = gather_with_grad(image_BE), gather_with_grad(text_BE)
    positive_BG = _positives(report_group_B, multi_positive)
    forth = _cross_entropy(scale * image_BE @ texts_GE.T, positive_BG)
    back = _cross_entropy(scale * text_BE @ images_GE.T, positive_BG)
    return (forth + back) / 2


def _positives(report_group_B: Tensor, multi_positive: bool) -> Tensor:
    if multi_positive:
        return report_group_B[:, None] == gather(report_group_B)[None, :]
    size, world = len(report_group_B), read_world()
    positive_BG = torch.zeros(size, size * world.world, dtype=torch.bool, device=report_group_B.device)
    return positive_BG.diagonal_scatter(positive_BG.new_ones(size), offset=size * world.rank)


def _cross_entropy(logits_BG: Tensor, positive_BG: Tensor) -> Tensor:
    target_BG = positive_BG / positive_BG.sum(1, keepdim=True)
    return -(target_BG * logits_BG.log_softmax(1)).sum(1).mean()
