"""SETR-PUP: patch tokens to masks by convolutions that double the side step by step; how it or UperNet is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from place.config import SegmentationConfig
from place.evaluation.heads import CPU, build_schedule, build_seeded, train_on_tokens
from place.evaluation.upernet import UperNet

WIDTH, NARROWEST = 512, 16


class MaskedSplit(NamedTuple):
    """Tokens `tokens_BND` fp32, masks `mask_BFYX` bool, and `known_BF` bool: whether an image was looked at for one."""

    tokens_BND: Tensor
    mask_BFYX: Tensor
    known_BF: Tensor


class SetrPup(nn.Module):
    """Convolution, norm, ReLU and doubling of the side, as often as a patch has halvings, then a logit a finding.

    Source: quoted (Zheng et al. 2021, SETR, progressive upsampling); widths inferred (MGCA: 512, 256, 128, 64).
    """

    def __init__(self, width: int, num_findings: int, patch_px: int):
        super().__init__()
        layers: list[nn.Module] = []
        for step in range(max(1, round(math.log2(patch_px)))):
            out = max(NARROWEST, min(WIDTH, width) >> step)
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
            width = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, num_findings, 1))

    def forward(self, tokens_BND: Tensor, size_px: int) -> Tensor:
        """Logits (B,F,size_px,size_px)."""
        side = round(tokens_BND.shape[1] ** 0.5)
        logits = self.layers(tokens_BND.transpose(1, 2).unflatten(2, (side, side)))
        if logits.shape[-1] != size_px:
            logits = nn.functional.interpolate(logits, size=size_px, mode="bilinear", align_corners=False)
        return logits


HEADS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "setr": lambda width, num_patches, num_findings, patch_px: SetrPup(width, num_findings, patch_px),
    "upernet": lambda width, num_patches, num_findings, patch_px: UperNet(width, num_patches, num_findings),
}
"""Heads by the names of `evaluation.segmentation_head`: width and number of the tokens, findings, pixels of a patch."""
HEAD_NAMES = {"setr": "SETR-PUP head", "upernet": "UperNet head over a simple feature pyramid"}


def compute_loss(logit_BFYX: Tensor, mask_BFYX: Tensor, known_BF: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice of each finding over the batch; unknown masks count nowhere.

    Source: inferred (MGCA, a pixel-wise loss and Dice); cross-entropy instead of focal loss is ours.
    """
    known_BF11 = known_BF[:, :, None, None].float()
    target = mask_BFYX.float()
    pixels = nn.functional.binary_cross_entropy_with_logits(logit_BFYX, target, reduction="none") * known_BF11
    entropy = pixels.mean((2, 3)).sum() / known_BF.sum().clamp(min=1)
    share = logit_BFYX.sigmoid() * known_BF11
    overlap_F = (share * target).sum((0, 2, 3))
    total_F = share.sum((0, 2, 3)) + (target * known_BF11).sum((0, 2, 3))
    return entropy + (1 - (2 * overlap_F + 1) / (total_F + 1)).mean()


def train_head(
    train: MaskedSplit,
    val: MaskedSplit,
    patch_px: int,
    config: SegmentationConfig,
    on_progress: Callable[[int], None] | None = None,
    kind: str = "setr",
    device: torch.device = CPU,
) -> tuple[nn.Module, int]:
    """Train a head as `evaluation.segmentation` says; the weights with the least validation loss are kept.

    Args:
        kind: a key of `HEADS`.
        device: of the head; the splits stay where they are.
    Returns:
        The head in eval mode, and the step that its weights are of.
    """
    size_px = train.mask_BFYX.shape[-1]
    _, num_patches, width = train.tokens_BND.shape
    num_findings = train.mask_BFYX.shape[1]
    head = build_seeded(lambda: HEADS[kind](width, num_patches, num_findings, patch_px), config.seed).to(device)

    def compute_train_loss(rows: Tensor) -> Tensor:
        tokens_BND, mask_BFYX, known_BF = (part[rows].to(device) for part in train)
        return compute_loss(head(tokens_BND, size_px), mask_BFYX, known_BF)

    def compute_val_loss() -> float:
        return float(compute_loss(predict(head, val.tokens_BND, size_px), val.mask_BFYX, val.known_BF))

    num_images, schedule = len(train.tokens_BND), build_schedule(config)
    return train_on_tokens(head, compute_train_loss, compute_val_loss, num_images, schedule, config.seed, on_progress)


@torch.no_grad()
def predict(head: nn.Module, tokens_BND: Tensor, size_px: int) -> Tensor:
    """Logits (B,F,size_px,size_px) on the CPU; no image's prediction depends on another's."""
    device = next(head.eval().parameters()).device
    return torch.cat([head(part.to(device), size_px).cpu() for part in tokens_BND.split(64)])
