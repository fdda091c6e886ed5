"""UperNet: patch tokens to masks by pooling at four scales and a top-down pyramid, as transformers has it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from place.evaluation.detector import SimplePyramid, choose_width


class UperNet(nn.Module):
    """ViTDet's simple pyramid of the tokens under UperNet's head; as wide as the detector's.

    Source: quoted (Xiao et al. 2018, UperNet, as transformers has it; pyramid as of the detector); BenchX segments so.
    """

    def __init__(self, width: int, num_patches: int, num_findings: int):
        super().__init__()
        channels = choose_width(width)
        self.pyramid = SimplePyramid(width, round(num_patches**0.5), channels)
        config = UperNetConfig(hidden_size=channels, num_labels=num_findings, use_auxiliary_head=False)
        self.head = UperNetHead(config, [channels] * len(self.pyramid.levels))

    def forward(self, tokens_BND: Tensor, size_px: int) -> Tensor:
        """Logits (B,F,size_px,size_px)."""
        logits = self.head(self.pyramid(tokens_BND))
        return nn.functional.interpolate(logits, size=size_px, mode="bilinear", align_corners=False)
