"""Projection into the joint space, and the transformer blocks that our own heads are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from place.config import UsageError
from place.kernels.attention import Blocks, attend, attention_weights


class Projection(nn.Sequential):
    """Two-layer projection into the joint space, unit length in fp32. Source: inferred (MGCA, projection heads)."""

    def __init__(self, width: int, joint_width: int):
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.Linear(width, joint_width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x).float(), dim=-1)


class Attention(nn.Module):
    """Multi-head attention of queries on keys of another width, with the chosen backend."""

    def __init__(self, width: int, key_width: int, num_heads: int, backend: str):
        super().__init__()
        if width % num_heads:
            raise UsageError(f"attention: width {width} is not divisible by {num_heads} heads; change num_heads")
        self.num_heads, self.backend = num_heads, backend
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(key_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BQD: Tensor, keys_BKD: Tensor, where: Tensor | Blocks | None = None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The attended states (B,Q,D) and, if wanted, the weights averaged over heads (B,Q,K) in fp32.

        `where` is as `attend` takes it; the wanted weights are those over all keys.
        """
        q = self._heads(self.query(x_BQD))
        k, v = (self._heads(part) for part in self.key_value(keys_BKD).chunk(2, -1))
        weights_BQK = None
        if want_weights:
            weights_BHQK = attention_weights(q, k)
            attended = weights_BHQK.to(v.dtype) @ v
            weights_BQK = weights_BHQK.mean(1)
        else:
            attended = attend(q, k, v, where, self.backend)
        return self.out(attended.transpose(1, 2).flatten(2)), weights_BQK

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CrossBlock(nn.Module):
    """Pre-norm block: self-attention if asked for, cross-attention, feed-forward."""

    def __init__(self, width: int, key_width: int, num_heads: int, backend: str, with_self: bool):
        super().__init__()
        self.norm_self = nn.LayerNorm(width) if with_self else None
        self.attend_self = Attention(width, width, num_heads, backend) if with_self else None
        self.norm_cross, self.norm_keys = nn.LayerNorm(width), nn.LayerNorm(key_width)
        self.attend_cross = Attention(width, key_width, num_heads, backend)
        self.norm_out = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x_BQD: Tensor, keys_BKD: Tensor, where: Tensor | Blocks | None = None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.attend_self is not None and self.norm_self is not None:
            normed = self.norm_self(x_BQD)
            x_BQD = x_BQD + self.attend_self(normed, normed)[0]
        crossed, weights_BQK = self.attend_cross(self.norm_cross(x_BQD), self.norm_keys(keys_BKD), where, want_weights)
        x_BQD = x_BQD + crossed
        return x_BQD + self.feed_forward(self.norm_out(x_BQD)), weights_BQK


def init_weights(module: nn.Module) -> None:
    """Truncated-normal weights of .02 and zero biases, for the parts that are ours."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mean_by_sentence(tokens_BTD: Tensor, sentence_of_token_BT: Tensor, num_sentences: int) -> tuple[Tensor, Tensor]:
    """Mean token state of each sentence (B,S,D), and which sentences have a token (B,S bool). Source: ours."""
    index_S = torch.arange(num_sentences, device=tokens_BTD.device)
    member_BST = sentence_of_token_BT[:, None, :] == index_S[None, :, None]
    count_BS1 = member_BST.sum(-1, keepdim=True)
    mean_BSD = member_BST.to(tokens_BTD.dtype) @ tokens_BTD / count_BS1.clamp(min=1).to(tokens_BTD.dtype)
    return mean_BSD, count_BS1[..., 0] > 0
