"""Head of the correlation exploration (CCE): patches read the report, then show how they vary together."""

from __future__ import annotations

from torch import Tensor, nn

from place.config import CorrelationConfig
from place.kernels.attention import Blocks, Packing, build_full_packing, pack
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

    def forward(
        self, patches_BND: Tensor, tokens_BTD: Tensor, attention_BT: Tensor, packing: Packing | None = None
    ) -> Tensor:
        """z (B,N,E), conditioned on the report, in the precision of autocast; the loss computes in fp32 from it.

        With a packing of `attention_BT` padding costs nothing.
        """
        x, keys = patches_BND, tokens_BTD
        where: Tensor | Blocks = attention_BT
        if packing is not None:
            queries = build_full_packing(patches_BND.shape[0], patches_BND.shape[1], patches_BND.device)
            x, keys, where = pack(x, queries)[None], pack(keys, packing)[None], Blocks(queries, packing)
        for block in self.blocks:
            x, _ = block(x, keys, where)
        return self.project(x.view_as(patches_BND))
