"""Head of the correlation exploration (CCE): patches read the report, then show how they vary together."""

from __future__ import annotations

from torch import Tensor, nn

from place.config import CorrelationConfig
from place.model.projection import CrossBlock, init_weights


class CorrelationHead(nn.Module):
    """Cross-attention from patch tokens to report tokens, then a projection to z.

    Source: quoted (a summary of PLACE: predicting patch-level covariance conditioned on reports); the form is ours.
    """

    def __init__(self, config: CorrelationConfig, width: int, text_width: int, attention: str):
        super().__init__()
        self.blocks = nn.ModuleList(
            CrossBlock(width, text_width, config.num_heads, attention, with_self=False) for _ in range(config.depth)
        )
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.width))
        self.apply(init_weights)

    def forward(self, patches_BND: Tensor, tokens_BTD: Tensor, attention_BT: Tensor) -> Tensor:
        """z (B,N,E) in fp32, conditioned on the report."""
        for block in self.blocks:
            patches_BND, _ = block(patches_BND, tokens_BTD, attention_BT)
        return self.project(patches_BND).float()
