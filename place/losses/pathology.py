"""Pathological-level cross-modal alignment (PCMA): each T-POR finds its V-POR, then the pairs are contrasted."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from place.distributed import gather, gather_with_grad, read_world, sum_over_ranks

TILE_COLUMNS = 16384
TILE_ROWS = 1024


def pathology_loss(
    observations_BKE: Tensor,
    sentences_BSE: Tensor,
    mask_BS: Tensor,
    sentence_hash_BS: Tensor,
    scale: Tensor,
    pairing: str = "assignment",
    negatives: str = "global",
) -> Tensor:
    """Symmetric InfoNCE over T-POR/V-POR pairs, divided by the pair count of all ranks.

    The mean over ranks is the loss of the global batch. Pairs whose sentences are equal never count as negatives.

    Args:
        observations_BKE, sentences_BSE: unit-length fp32 V-PORs and T-PORs of this rank.
        mask_BS: bool, true on real sentences.
        sentence_hash_BS: int64, equal for equal sentences.
        scale: inverse temperature.
        pairing: a key of `PAIRINGS`.
        negatives: `study`, `rank` or `global`.
    Source: quoted (PLACE abstract: maximise the consistency of pathology observations from both images and reports);
        pairing and contrast are ours.
    """
    matched_BSE, mask_BS = PAIRINGS[pairing](observations_BKE, sentences_BSE, mask_BS, scale)
    visual_PE, textual_PE = matched_BSE.flatten(0, 1), sentences_BSE.flatten(0, 1)
    columns = _build_columns(visual_PE, textual_PE, mask_BS, sentence_hash_BS, negatives)
    rows = torch.arange(len(visual_PE), device=mask_BS.device)[mask_BS.flatten()]
    # Also a rank without a pair takes part in the gathers' backward pass.
    total = 0 * (columns[0].sum() + columns[1].sum() + scale)
    # Row tiles are recomputed in the backward pass once the matrix is wide, so that no more than a tile is held.
    tiled = len(columns[0]) > TILE_COLUMNS
    for part in rows.split(TILE_ROWS if tiled else max(1, len(rows))):
        if tiled:
            total = total + checkpoint(_contrast, part, visual_PE, textual_PE, scale, *columns, use_reentrant=False)
        else:
            total = total + _contrast(part, visual_PE, textual_PE, scale, *columns)
    pairs = sum_over_ranks(mask_BS.sum()).clamp(min=1)
    return total * read_world().world / pairs


def _build_columns(
    visual_PE: Tensor, textual_PE: Tensor, mask_BS: Tensor, hash_BS: Tensor, negatives: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a row is contrasted with: V-PORs, T-PORs, mask, hash and study of each column, study of each row, offset."""
    batch, num_sentences = mask_BS.shape
    mask_P, hash_P = mask_BS.flatten(), hash_BS.flatten()
    study_P = torch.arange(batch, device=mask_BS.device).repeat_interleave(num_sentences)
    offset = torch.zeros((), dtype=torch.long, device=mask_BS.device)
    if negatives == "global":
        offset = offset + read_world().rank * len(mask_P)
        visual_PE, textual_PE = gather_with_grad(visual_PE), gather_with_grad(textual_PE)
        mask_Q, hash_Q = gather(mask_P), gather(hash_P)
        return visual_PE, textual_PE, mask_Q, hash_Q, hash_P, torch.zeros_like(hash_Q), offset
    if negatives == "rank":
        return visual_PE, textual_PE, mask_P, hash_P, hash_P, torch.zeros_like(hash_P), offset
    return visual_PE, textual_PE, mask_P, hash_P, hash_P, study_P + 1, offset


def _contrast(
    rows_R: Tensor,
    visual_PE: Tensor,
    textual_PE: Tensor,
    scale: Tensor,
    visual_QE: Tensor,
    textual_QE: Tensor,
    mask_Q: Tensor,
    hash_Q: Tensor,
    hash_P: Tensor,
    study_Q: Tensor,
    offset: Tensor,
) -> Tensor:
    """Sum over rows of the symmetric cross-entropy; study_Q is 0 where every study is contrasted."""
    own_R = rows_R + offset
    allowed_RQ = mask_Q & (hash_P[rows_R][:, None] != hash_Q[None, :]) & (study_Q[own_R][:, None] == study_Q[None, :])
    allowed_RQ[torch.arange(len(rows_R), device=rows_R.device), own_R] = True
    forth_RQ = scale * visual_PE[rows_R] @ textual_QE.T
    back_RQ = scale * textual_PE[rows_R] @ visual_QE.T
    losses = [
        nn.functional.cross_entropy(logits_RQ.masked_fill(~allowed_RQ, -torch.inf), own_R, reduction="sum")
        for logits_RQ in (forth_RQ, back_RQ)
    ]
    return (losses[0] + losses[1]) / 2


def assign(cosine_BSK: Tensor, mask_BS: Tensor) -> Tensor:
    """One-to-one pairing of sentences with observations by least total 1 - cos.

    Returns:
        (B,S) int64 on the CPU, the observation of each sentence; -1 for padding, and for the worst sentences of a study
        that has more sentences than observations.
    Source: ours (scipy's linear_sum_assignment).
    """
    # scipy refuses NaN; the loss of such features is NaN whatever the pairing, and the loop stops at that.
    cost_BSK, mask_BS = (1 - cosine_BSK).detach().float().nan_to_num().cpu(), mask_BS.cpu()
    pairing_BS = torch.full(mask_BS.shape, -1, dtype=torch.long)
    for study, cost_SK in enumerate(cost_BSK):
        real = mask_BS[study].nonzero()[:, 0]
        sentence, observation = linear_sum_assignment(cost_SK[real].numpy())
        pairing_BS[study, real[sentence]] = torch.as_tensor(observation)
    return pairing_BS


def _pair_by_assignment(
    observations_BKE: Tensor, sentences_BSE: Tensor, mask_BS: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    pairing_BS = assign(sentences_BSE.detach() @ observations_BKE.detach().transpose(1, 2), mask_BS).to(mask_BS.device)
    return _take(observations_BKE, pairing_BS.clamp(min=0)), mask_BS & (pairing_BS >= 0)


def _pair_by_max(
    observations_BKE: Tensor, sentences_BSE: Tensor, mask_BS: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    best_BS = (sentences_BSE.detach() @ observations_BKE.detach().transpose(1, 2)).argmax(-1)
    return _take(observations_BKE, best_BS), mask_BS


def _pair_softly(
    observations_BKE: Tensor, sentences_BSE: Tensor, mask_BS: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    share_BSK = (scale.detach() * sentences_BSE @ observations_BKE.transpose(1, 2)).softmax(-1)
    return nn.functional.normalize(share_BSK @ observations_BKE, dim=-1), mask_BS


def _take(observations_BKE: Tensor, index_BS: Tensor) -> Tensor:
    return observations_BKE.gather(1, index_BS[..., None].expand(-1, -1, observations_BKE.shape[-1]))


PAIRINGS = {"assignment": _pair_by_assignment, "soft": _pair_softly, "max": _pair_by_max}
