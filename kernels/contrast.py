"""Contrastive cross-entropy of rows against many columns: in one piece, or in tiles without the matrix of all pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# From here on `auto` takes tiles: on a CPU they are then the faster way too, and `plain` would hold half a GiB
# (place.kernels.contrast_benchmark measures both).
TILED_FROM_PAIRS = 1 << 24
TILE_ROWS, TILE_COLUMNS = 1024, 4096


class Pairs(NamedTuple):
    """What the pairs of R rows and G columns mean to each other, without a matrix.

    `own_R` int64: the column of each row's partner, always a positive. `row_key_R`, `column_key_G` int64: pairs of
    equal keys are positives too (`equal_is_positive`) or are left out. None of them: every row has one positive and
    all columns count. `column_mask_G` bool: false on columns that no row is contrasted with, but for its own.
    `row_study_R`, `column_study_G` int64: only pairs of equal study count.
    """

    own_R: Tensor
    row_key_R: Tensor | None = None
    column_key_G: Tensor | None = None
    equal_is_positive: bool = False
    column_mask_G: Tensor | None = None
    row_study_R: Tensor | None = None
    column_study_G: Tensor | None = None

    def select(self, rows: slice, columns: slice) -> Pairs:
        """The pairs of some rows with some columns; `own_R` counts from the first of the columns."""
        return Pairs(
            self.own_R[rows] - (columns.start or 0),
            None if self.row_key_R is None else self.row_key_R[rows],
            None if self.column_key_G is None else self.column_key_G[columns],
            self.equal_is_positive,
            None if self.column_mask_G is None else self.column_mask_G[columns],
            None if self.row_study_R is None else self.row_study_R[rows],
            None if self.column_study_G is None else self.column_study_G[columns],
        )


def contrast(rows_RE: Tensor, columns_GE: Tensor, scale: Tensor, pairs: Pairs, method: str = "auto") -> Tensor:
    """-mean over a row's positives of log softmax over the columns that count, (R,).

    Args:
        rows_RE, columns_GE: features in fp32 or fp64.
        scale: inverse temperature, one number.
        pairs: which columns are positives of a row, and which count.
        method: `plain` holds several (R,G) matrices for the backward pass; `tiled` holds a log-sum-exp for each row and
            one tile after the other, which the backward pass computes again; `auto` takes `tiled` from
            `TILED_FROM_PAIRS` pairs on.
    Source: quoted (van den Oord et al. 2018, InfoNCE); tiles inferred (Dao et al. 2022, FlashAttention: online
        log-sum-exp, recomputation); several positives and pairs left out are ours.
    """
    if method == "auto":
        method = "tiled" if len(rows_RE) * len(columns_GE) >= TILED_FROM_PAIRS else "plain"
    return METHODS[method](rows_RE, columns_GE, scale, pairs)


def _contrast_plain(rows_RE: Tensor, columns_GE: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
    logits_RG = scale * rows_RE @ columns_GE.T
    positive_RG, allowed_RG = _compare(pairs, len(columns_GE))
    if allowed_RG is not None:
        logits_RG = logits_RG.masked_fill(~allowed_RG, -torch.inf)
    log_p_RG = logits_RG.log_softmax(1)
    if positive_RG is None:
        return -log_p_RG.gather(1, pairs.own_R[:, None])[:, 0]
    target_RG = positive_RG.to(log_p_RG.dtype) / positive_RG.sum(1, keepdim=True)
    return -(target_RG * log_p_RG.masked_fill(~positive_RG, 0)).sum(1)


def _contrast_tiled(rows_RE: Tensor, columns_GE: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
    return _TiledContrast.apply(rows_RE, columns_GE, scale, pairs)


METHODS = {"plain": _contrast_plain, "tiled": _contrast_tiled}


def _compare(pairs: Pairs, num_columns: int) -> tuple[Tensor | None, Tensor | None]:
    """Positives beside the own column, and pairs that count (bool, (R,G)); None for no other, and for all."""
    own_RG = torch.arange(num_columns, device=pairs.own_R.device) == pairs.own_R[:, None]
    positive_RG: Tensor | None = None
    allowed_RG: Tensor | None = None
    if pairs.row_key_R is not None and pairs.column_key_G is not None:
        equal_RG = pairs.row_key_R[:, None] == pairs.column_key_G
        if pairs.equal_is_positive:
            positive_RG = equal_RG | own_RG
        else:
            allowed_RG = ~equal_RG
    if pairs.column_mask_G is not None:
        allowed_RG = pairs.column_mask_G if allowed_RG is None else allowed_RG & pairs.column_mask_G
    if pairs.row_study_R is not None and pairs.column_study_G is not None:
        same_RG = pairs.row_study_R[:, None] == pairs.column_study_G
        allowed_RG = same_RG if allowed_RG is None else allowed_RG & same_RG
    return positive_RG, None if allowed_RG is None else allowed_RG | own_RG


class _TiledContrast(torch.autograd.Function):
    """Online log-sum-exp forward, kept as largest logit and rest; backward tile by tile, in a fixed order of sums."""

    @staticmethod
    def forward(ctx: Any, rows_RE: Tensor, columns_GE: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
        largest_R = rows_RE.new_full((len(rows_RE),), -torch.inf)
        rest_R, positive_R, count_R = (torch.zeros_like(largest_R) for _ in range(3))
        for rows, columns in _cut(len(rows_RE), len(columns_GE)):
            logits_RG, target_RG = _build_tile(rows_RE, columns_GE, scale, pairs, rows, columns)
            positive_R[rows] += torch.where(target_RG, logits_RG, 0).sum(1)
            count_R[rows] += target_RG.sum(1)
            before_R, now_R = largest_R[rows], torch.maximum(largest_R[rows], logits_RG.amax(1))
            # A row that has met no column that counts yet: -inf less -inf is to be 0 here.
            anchor_R = now_R.masked_fill(now_R == -torch.inf, 0)
            rest_R[rows] = rest_R[rows] * (before_R - anchor_R).exp() + (logits_RG - anchor_R[:, None]).exp().sum(1)
            largest_R[rows] = now_R
        ctx.save_for_backward(rows_RE, columns_GE, scale, largest_R, rest_R, count_R)
        ctx.pairs = pairs
        return largest_R - positive_R / count_R + rest_R.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows_RE, columns_GE, scale, largest_R, rest_R, count_R = ctx.saved_tensors
        grad_rows_RE, grad_columns_GE = torch.zeros_like(rows_RE), torch.zeros_like(columns_GE)
        for rows, columns in _cut(len(rows_RE), len(columns_GE)):
            logits_RG, target_RG = _build_tile(rows_RE, columns_GE, scale, ctx.pairs, rows, columns)
            # Not less the log-sum-exp: near a scale of 100 its rounding alone would be the largest error.
            slope_RG = logits_RG.sub_(largest_R[rows, None]).exp_().div_(rest_R[rows, None])
            slope_RG -= target_RG / count_R[rows, None]
            slope_RG *= grad_R[rows, None]
            grad_rows_RE[rows] += slope_RG @ columns_GE[columns]
            grad_columns_GE[columns] += slope_RG.T @ rows_RE[rows]
        # The scale multiplies every cosine, as it does the rows: its gradient is theirs along the rows themselves.
        grad_scale = (grad_rows_RE * rows_RE).sum().reshape(scale.shape)
        return grad_rows_RE.mul_(scale), grad_columns_GE.mul_(scale), grad_scale, None


def _cut(num_rows: int, num_columns: int) -> list[tuple[slice, slice]]:
    return [
        (slice(row, min(row + TILE_ROWS, num_rows)), slice(column, min(column + TILE_COLUMNS, num_columns)))
        for row in range(0, num_rows, TILE_ROWS)
        for column in range(0, num_columns, TILE_COLUMNS)
    ]


def _build_tile(
    rows_RE: Tensor, columns_GE: Tensor, scale: Tensor, pairs: Pairs, rows: slice, columns: slice
) -> tuple[Tensor, Tensor]:
    """Logits of a tile, -inf where a pair does not count, and its positives (bool)."""
    logits_RG = (scale * rows_RE[rows]) @ columns_GE[columns].T
    part = pairs.select(rows, columns)
    positive_RG, allowed_RG = _compare(part, logits_RG.shape[1])
    if allowed_RG is not None:
        logits_RG.masked_fill_(~allowed_RG, -torch.inf)
    if positive_RG is None:
        positive_RG = torch.arange(logits_RG.shape[1], device=logits_RG.device) == part.own_R[:, None]
    return logits_RG, positive_RG
