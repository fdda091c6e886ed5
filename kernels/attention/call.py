"""The one attention call, and the choice of what runs it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from place.kernels.attention.backends import BACKENDS, PACKED_BACKENDS, Blocks, build_block_diagonal
from place.kernels.precision import leave_autocast
from torch import Tensor


def attend(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    where: Tensor | Blocks | None = None,
    backend: str = "sdpa",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, of a padded batch or of packed sequences.

    Args:
        q_BHQD, k_BHKD, v_BHKD: queries, keys and values, floating point; B is 1 for packed sequences.
        where: which keys a query attends to. None: all. A bool (B,K), true on keys that count, or a bias or bool that
            fits (B,H,Q,K); a row without a key gives zeros or NaN by backend, so callers keep at least one. `Blocks`:
            the sequences lie end to end and each sees its own keys, so that nothing is spent on padding.
        backend: `eager` (the definition), `sdpa` or `xformers`.
        dropout: share of the weights set to zero.
        scale: of the scores; None takes 1 / sqrt(D).
    Returns:
        (B,H,Q,D) in q's dtype.
    Source: quoted (Vaswani et al. 2017, equation 1); packing inferred (xformers, BlockDiagonalMask).
    """
    scale = q_BHQD.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(where, Blocks):
        return PACKED_BACKENDS[backend](q_BHQD, k_BHKD, v_BHKD, where, dropout, scale)
    mask = where[:, None, None, :] if where is not None and where.ndim == 2 else where
    return BACKENDS[backend](q_BHQD, k_BHKD, v_BHKD, mask, dropout, scale)


def attention_weights(q_BHQD: Tensor, k_BHKD: Tensor) -> Tensor:
    """Softmax of the scaled scores, (B,H,Q,K) in fp32, also under autocast.

    Source: quoted (Vaswani et al. 2017, equation 1).
    """
    with leave_autocast(q_BHQD.device.type):
        scores_BHQK = q_BHQD.float() @ k_BHKD.float().transpose(-1, -2) * q_BHQD.shape[-1] ** -0.5
    return scores_BHQK.softmax(-1)


def choose_backend(
    asked: str, device: torch.device, dtype: torch.dtype = torch.float32, head_sizes: Iterable[int] = (64,)
) -> tuple[str, str]:
    """The backend to use and the reason, for the log.

    Args:
        asked: `auto`, `xformers`, `sdpa` or `eager`.
        dtype, head_sizes: that attention is computed in.
    Raises:
        ValueError: xformers was asked for by name where it has no operator for this.
    Source: ours; xformers has no attention operator for CPU.
    """
    if asked not in ("auto", "xformers"):
        return asked, "as configured"
    missing = next(filter(None, (_missing_xformers(device.type, dtype, size) for size in sorted(head_sizes))), "")
    if not missing:
        return "xformers", f"memory_efficient_attention runs on this device in {str(dtype).removeprefix('torch.')}"
    if asked == "xformers":
        raise ValueError(f"model.attention=xformers: {missing}; use auto or sdpa")
    return "sdpa", missing


@functools.cache
def _missing_xformers(device_type: str, dtype: torch.dtype, head_size: int) -> str:
    """Why xformers cannot be used, after a trial with packed sequences, forward and backward; empty when it can."""
    if device_type != "cuda":
        return f"xformers has no attention operator for {device_type}"
    try:
        import xformers.ops

        q = torch.zeros(1, 8, 1, head_size, device=device_type, dtype=dtype, requires_grad=True)
        bias = build_block_diagonal((3, 5), (3, 5), device_type)
        xformers.ops.memory_efficient_attention(q, q, q, bias).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"xformers is not usable for heads of {head_size} ({str(error).splitlines()[0]})"
    return ""
