"""Other people's models on our attention: torch's own call inside them is answered by `attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from place.kernels.attention.backends import Blocks
from place.kernels.attention.call import attend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class RoutedAttention(TorchFunctionMode):
    """Within this context every `scaled_dot_product_attention` of the thread runs on a backend of ours.

    Both timm (`fused_attn`) and transformers (`attn_implementation="sdpa"`, old models' classes as well as its
    AttentionInterface) call this one public function of torch, so that none of their code is copied or replaced.

    Args:
        backend: a key of `BACKENDS`.
        blocks: how queries and keys are packed, if the model is given packed sequences; its own mask is then not
            looked at, because it knows nothing of them.
    Source: ours; torch documents function modes under 'Extending PyTorch'.
    """

    def __init__(self, backend: str, blocks: Blocks | None = None):
        super().__init__()
        self.backend, self.blocks = backend, blocks
        self.calls = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            self.calls += 1
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa:
            raise ValueError(
                "the encoder's attention is causal or shares keys among heads, which model.attention does not offer; "
                "choose another architecture"
            )
        where = attn_mask if self.blocks is None else self.blocks
        return attend(query, key, value, where, self.backend, dropout_p, scale)
