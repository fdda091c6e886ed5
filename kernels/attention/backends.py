"""The attention backends: each knows a padded batch with a mask, and packed sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from place.kernels.attention.packing import Packing, mark_real, number_sequences, pack, unpack
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from xformers.ops.fmha import BlockDiagonalMask

PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Blocks(NamedTuple):
    """Packed queries and keys: those of equal sequence belong together."""

    queries: Packing
    keys: Packing


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """The definition: softmax in fp32 over the masked scores."""
    scores_BHQK = q @ k.transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores_BHQK = scores_BHQK.masked_fill(~mask, torch.finfo(scores_BHQK.dtype).min)
    elif mask is not None:
        scores_BHQK = scores_BHQK + mask
    weights_BHQK = scores_BHQK.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return nn.functional.dropout(weights_BHQK, dropout) @ v


def eager_packed(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, dropout: float, scale: float) -> Tensor:
    """The definition: all packed positions against all, those of other sequences masked."""
    together_QK = number_sequences(blocks.queries)[:, None] == number_sequences(blocks.keys)
    return eager(q, k, v, together_QK, dropout, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """torch's own; on CUDA cuDNN is asked first, then flash attention."""
    with sdpa_kernel(PRIORITY, set_priority=True) if q.is_cuda else nullcontext():
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)


def sdpa_packed(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, dropout: float, scale: float) -> Tensor:
    """Flash attention over the packed sequences where it exists; elsewhere padded for the attention alone."""
    q, k, v = _cast_alike(q, k, v)
    if has_flash_varlen(q.device.type, q.dtype, q.shape[-1], dropout):
        return _to_heads(_attend_flash(_to_rows(q), _to_rows(k), _to_rows(v), blocks, scale))
    return _attend_padded(q, k, v, blocks, dropout, scale)


@torch.compiler.disable
def _attend_padded(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, dropout: float, scale: float) -> Tensor:
    """Left alone by torch.compile, which would compile anew for the lengths of every batch."""
    parts = zip((q, k, v), (blocks.queries, blocks.keys, blocks.keys), strict=True)
    padded = [unpack(_to_rows(x), packing).transpose(1, 2) for x, packing in parts]
    mask = None if blocks.keys.index_P is None else mark_real(blocks.keys)[:, None, None, :]
    attended_BHQD = sdpa(padded[0], padded[1], padded[2], mask, dropout, scale)
    return _to_heads(pack(attended_BHQD.transpose(1, 2), blocks.queries))


def _attend_flash(q_PHD: Tensor, k_PHD: Tensor, v_PHD: Tensor, blocks: Blocks, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = blocks
    starts = queries.starts_B1, keys.starts_B1
    attended = varlen_attn(q_PHD, k_PHD, v_PHD, *starts, queries.longest, keys.longest, scale=scale)
    assert isinstance(attended, Tensor)
    return attended


def has_flash_varlen(device_type: str, dtype: torch.dtype, head_size: int, dropout: float) -> bool:
    """What torch's varlen_attn can do: half precision on CUDA, without dropout of weights."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device_type == "cuda" and half and head_size % 8 == 0 and head_size <= 256 and not dropout


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """memory_efficient_attention; a mask becomes a dense bias."""
    q, k, v = _cast_alike(q, k, v)
    bias = None if mask is None else _build_dense_bias(mask, q, k.shape[2])
    return _call_xformers(q, k, v, bias, dropout, scale)


@torch.compiler.disable
def xformers_packed(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, dropout: float, scale: float) -> Tensor:
    """memory_efficient_attention with a block-diagonal bias, so that there is no padding at all."""
    q, k, v = _cast_alike(q, k, v)
    bias = build_block_diagonal(blocks.queries.lengths, blocks.keys.lengths, str(q.device))
    return _call_xformers(q, k, v, bias, dropout, scale)


def _call_xformers(q: Tensor, k: Tensor, v: Tensor, bias: Any, dropout: float, scale: float) -> Tensor:
    import xformers.ops

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return xformers.ops.memory_efficient_attention(q, k, v, bias, dropout, scale).transpose(1, 2)


@functools.lru_cache(maxsize=8)
def build_block_diagonal(queries: tuple[int, ...], keys: tuple[int, ...], device: str) -> BlockDiagonalMask:
    """xformers' bias for packed sequences; kept, since all layers of an encoder ask for the same one."""
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(queries, keys, device=torch.device(device))


def _build_dense_bias(mask: Tensor, q_BHQD: Tensor, keys: int) -> Tensor:
    """Additive bias whose storage is padded to a multiple of 8 keys, as xformers' cutlass kernel asks."""
    if mask.dtype == torch.bool:
        mask = q_BHQD.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    mask = nn.functional.pad(mask.to(q_BHQD.dtype), (0, -keys % 8))
    return mask.expand(*q_BHQD.shape[:3], -1).contiguous()[..., :keys]


def _cast_alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does for torch's own attention: a norm of queries and keys gives fp32 beside bf16 values."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _to_rows(x_1HPD: Tensor) -> Tensor:
    return x_1HPD[0].transpose(0, 1)


def _to_heads(x_PHD: Tensor) -> Tensor:
    return x_PHD.transpose(0, 1)[None]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float], Tensor]] = {
    "eager": eager,
    "sdpa": sdpa,
    "xformers": xformers,
}
PACKED_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Blocks, float, float], Tensor]] = {
    "eager": eager_packed,
    "sdpa": sdpa_packed,
    "xformers": xformers_packed,
}
