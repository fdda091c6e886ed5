"""Visual Pathology Observation Extractor (VPOE): learned queries read the patches and become V-PORs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from place.config import ObservationsConfig
from place.model.projection import CrossBlock, init_weights


class ObservationExtractor(nn.Module):
    """K pathology queries through M pre-norm blocks of self-attention, cross-attention to patches and feed-forward.

    Source: quoted (PLACE, abstract: a VPOE extracts observation representations from localised tokens); form ours.
    """

    def __init__(self, config: ObservationsConfig, width: int, attention: str):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_queries, width))
        self.blocks = nn.ModuleList(
            CrossBlock(width, width, config.num_heads, attention, with_self=True) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.queries, std=1.0)

    def forward(self, patches_BND: Tensor) -> tuple[Tensor, Tensor]:
        """V-POR states (B,K,D), and the last block's attention over the patches (B,K,N), whose rows sum to 1."""
        x_BKD = self.queries.expand(len(patches_BND), -1, -1).to(patches_BND.dtype)
        attention_BKN: Tensor | None = None
        for number, block in enumerate(self.blocks, start=1):
            x_BKD, attention_BKN = block(x_BKD, patches_BND, want_weights=number == len(self.blocks))
        assert attention_BKN is not None
        return self.norm(x_BKD), attention_BKN
