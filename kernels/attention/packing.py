"""Sequences of different lengths laid end to end, so that nothing is spent on padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where each real position of a padded (B,T) batch stands among the P real ones.

    `lengths` and `longest` on the host, `starts_B1` int32 (first position of each sequence, and P at the end),
    `index_P` int64 (place in the flattened padded batch, None where there is no padding), `padded` the T.
    """

    lengths: tuple[int, ...]
    longest: int
    starts_B1: Tensor
    index_P: Tensor | None
    padded: int


def build_packing(mask_BT: Tensor, length_B: Tensor | None = None) -> Packing:
    """The packing of the true positions of a mask, which may lie anywhere in a row.

    Args:
        length_B: how many are true, on the host, because shapes follow from them; without it the device is waited for.
    Source: ours.
    """
    lengths_B = mask_BT.sum(1)
    lengths = tuple((lengths_B if length_B is None else length_B).tolist())
    index_P = torch.nonzero_static(mask_BT.flatten(), size=sum(lengths))[:, 0]
    return Packing(lengths, max(lengths), _accumulate(lengths_B), index_P, mask_BT.shape[1])


def build_full_packing(batch: int, length: int, device: torch.device) -> Packing:
    """The packing of sequences of one length, without padding."""
    lengths_B = torch.full((batch,), length, device=device)
    return Packing((length,) * batch, length, _accumulate(lengths_B), None, length)


def _accumulate(lengths_B: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)


def pack(x_BT: Tensor, packing: Packing) -> Tensor:
    """The real positions of (B,T,...) as (P,...)."""
    flat = x_BT.flatten(0, 1)
    return flat if packing.index_P is None else flat.index_select(0, packing.index_P)


def unpack(x_P: Tensor, packing: Packing) -> Tensor:
    """(P,...) as (B,T,...), zero at padding."""
    shape = len(packing.lengths), packing.padded, *x_P.shape[1:]
    if packing.index_P is None:
        return x_P.reshape(shape)
    return x_P.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy_(0, packing.index_P, x_P).view(shape)


def mark_real(packing: Packing) -> Tensor:
    """The mask (B,T) that the packing was built from."""
    device = packing.starts_B1.device
    return unpack(torch.ones(sum(packing.lengths), dtype=torch.bool, device=device), packing)


def number_positions(packing: Packing) -> Tensor:
    """The place of each packed position in its own sequence, (P,) from 0."""
    count_P = torch.arange(sum(packing.lengths), device=packing.starts_B1.device)
    return count_P - packing.starts_B1[:-1].long()[number_sequences(packing)]


def number_sequences(packing: Packing) -> Tensor:
    """The sequence that each packed position belongs to, (P,)."""
    starts_B1 = packing.starts_B1
    lengths_B = (starts_B1[1:] - starts_B1[:-1]).long()
    sequences_B = torch.arange(len(packing.lengths), device=starts_B1.device)
    return sequences_B.repeat_interleave(lengths_B, output_size=sum(packing.lengths))
