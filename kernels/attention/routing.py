"""Other people's models on our attention and our precision: torch's own calls inside them are answered by ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from place.kernels.attention.backends import Blocks
from place.kernels.attention.call import attend
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Routed(TorchFunctionMode):
    """Within this context every `scaled_dot_product_attention` of the thread runs on a backend of ours, a convolution
    of patches is a product, and under bf16 autocast every `layer_norm` reads and writes bf16; it still computes in
    fp32 inside.

    Both timm (`fused_attn`) and transformers (`attn_implementation="sdpa"`, old models' classes as well as its
    AttentionInterface) call these public functions of torch, so that none of their code is copied or replaced.
    Autocast's own rule takes norms in fp32, and with them all that lies between matrix products: twice the bytes.
    cuDNN's convolution of one grey channel pads it to eight and reorders images, weights and results.

    Args:
        backend: a key of `BACKENDS`.
        blocks: how queries and keys are packed, if the model is given packed sequences; its own mask is then not
            looked at, because it knows nothing of them.
    Source: ours; torch documents function modes under 'Extending PyTorch'.
    """

    def __init__(self, backend: str, blocks: Blocks | None = None):
        super().__init__()
        self.backend, self.blocks, self.has_attended = backend, blocks, False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            self.has_attended = True
            return self._attend(*args, **(kwargs or {}))
        if func is conv2d:
            return _convolve(*args, **(kwargs or {}))
        if func is layer_norm and is_bf16(args[0].device.type):
            return _normalise(*args, **(kwargs or {}))
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


def _convolve(
    x_BCYX: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution; as one product where it reads each pixel once, in patches that lie side by side."""
    height, width = weight.shape[2:]
    plain = padding in (0, (0, 0)) and dilation in (1, (1, 1)) and groups == 1 and x_BCYX.ndim == 4
    if not plain or stride != (height, width) or x_BCYX.shape[2] % height or x_BCYX.shape[3] % width:
        return conv2d(x_BCYX, weight, bias, stride, padding, dilation, groups)
    batch, channels, y, x = x_BCYX.shape
    grid = x_BCYX.view(batch, channels, y // height, height, x // width, width).permute(0, 2, 4, 1, 3, 5)
    return linear(grid.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def is_bf16(device_type: str) -> bool:
    """Whether bf16 autocast is on."""
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.bfloat16


def _normalise(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    weight, bias = (None if tensor is None else tensor.bfloat16() for tensor in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        return layer_norm(x.bfloat16(), normalized_shape, weight, bias, eps)
