"""One attention call with three backends, chosen by what the device can run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from timm.layers.attention import Attention


def attend(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_BK: Tensor | None = None, backend: str = "sdpa"
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q_BHQD, k_BHKD, v_BHKD: queries, keys and values, floating point.
        mask_BK: bool, true where a key may be attended to; None attends to all. A row without a key gives zeros
            with `eager`, so callers keep at least one.
        backend: `eager` (the definition), `sdpa` or `xformers`.
    Returns:
        (B,H,Q,D) in q's dtype.
    Source: quoted (Vaswani et al. 2017, equation 1).
    """
    return BACKENDS[backend](q_BHQD, k_BHKD, v_BHKD, mask_BK)


def attention_weights(q_BHQD: Tensor, k_BHKD: Tensor) -> Tensor:
    """Softmax of the scaled scores, (B,H,Q,K) in fp32. Source: quoted (Vaswani et al. 2017, equation 1)."""
    scores_BHQK = q_BHQD.float() @ k_BHKD.float().transpose(-1, -2) * q_BHQD.shape[-1] ** -0.5
    return scores_BHQK.softmax(-1)


def _eager(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_BK: Tensor | None) -> Tensor:
    scores_BHQK = q_BHQD @ k_BHKD.transpose(-1, -2) * q_BHQD.shape[-1] ** -0.5
    if mask_BK is not None:
        scores_BHQK = scores_BHQK.masked_fill(~mask_BK[:, None, None, :], torch.finfo(scores_BHQK.dtype).min)
    return scores_BHQK.softmax(-1, dtype=torch.float32).to(v_BHKD.dtype) @ v_BHKD


def _sdpa(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_BK: Tensor | None) -> Tensor:
    mask = None if mask_BK is None else mask_BK[:, None, None, :]
    return nn.functional.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask)


def _xformers(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_BK: Tensor | None) -> Tensor:
    import xformers.ops

    q, k, v = (x.transpose(1, 2) for x in (q_BHQD, k_BHKD, v_BHKD))
    bias = None if mask_BK is None else _dense_bias(mask_BK, q_BHQD)
    return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


def _dense_bias(mask_BK: Tensor, q_BHQD: Tensor) -> Tensor:
    """Additive bias whose storage is padded to a multiple of 8 keys, as xformers' cutlass kernel asks."""
    batch, keys = mask_BK.shape
    heads, queries = q_BHQD.shape[1:3]
    row_BK = q_BHQD.new_zeros(batch, -(-keys // 8) * 8)
    row_BK[:, :keys].masked_fill_(~mask_BK, float("-inf"))
    return row_BK[:, None, None, :].expand(batch, heads, queries, -1).contiguous()[..., :keys]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "xformers": _xformers,
}


def choose_backend(asked: str, device: torch.device) -> tuple[str, str]:
    """The backend to use on a device and the reason, for the log.

    Args:
        asked: `auto`, `xformers`, `sdpa` or `eager`.
    Raises:
        ValueError: xformers was asked for by name where it has no operator for this device.
    Source: ours; xformers has no attention operator for CPU.
    """
    if asked not in ("auto", "xformers"):
        return asked, "as configured"
    missing = _missing_xformers(device.type)
    if not missing:
        return "xformers", "memory_efficient_attention runs on this device"
    if asked == "xformers":
        raise ValueError(f"model.attention=xformers: {missing}; use auto or sdpa")
    return "sdpa", missing


@functools.cache
def _missing_xformers(device_type: str) -> str:
    """Why xformers cannot be used on a device type; empty when it can."""
    if device_type != "cuda":
        return f"xformers has no attention operator for {device_type}"
    try:
        import xformers.ops

        q = torch.zeros(1, 8, 1, 64, device=device_type, dtype=torch.bfloat16)
        xformers.ops.memory_efficient_attention(q, q, q)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return f"xformers is not usable ({str(error).splitlines()[0]})"
    return ""


def patch_timm_attention(encoder: nn.Module, backend: str) -> int:
    """Route every attention of a timm ViT through `attend`. Returns how many were routed.

    Raises:
        ValueError: an attention with a gate or with dropout of its weights, which `attend` does not have.
    Source: ours.
    """
    from timm.layers.attention import Attention

    modules = [module for module in encoder.modules() if isinstance(module, Attention)]
    for module in modules:
        if module.gate is not None or module.attn_drop.p:
            raise ValueError(
                "the image encoder's attention has a gate or dropout of weights; choose another architecture"
            )
        module.forward = functools.partial(_timm_forward, module, backend)
    return len(modules)


def _timm_forward(
    module: Attention, backend: str, x_BND: Tensor, attn_mask: Tensor | None = None, **_: object
) -> Tensor:
    if attn_mask is not None:
        raise ValueError("timm passed an attention mask, which the image encoder does not use")
    batch, tokens, _width = x_BND.shape
    qkv = module.qkv(x_BND).reshape(batch, tokens, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = module.q_norm(q), module.k_norm(k)
    out = attend(q, k, v, None, backend).transpose(1, 2).reshape(batch, tokens, -1)
    return module.proj_drop(module.proj(module.norm(out)))
