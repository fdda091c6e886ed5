"""Pathological-level cross-modal alignment (PCMA): each T-POR finds its V-POR, then the pairs are contrasted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from place.distributed import average_global, gather, gather_with_grad, read_world
from place.kernels.assignment import assign
from place.kernels.contrast import Pairs, contrast


def pathology_loss(
    observations_BKE: Tensor,
    sentences_BSE: Tensor,
    mask_BS: Tensor,
    sentence_hash_BS: Tensor,
    scale: Tensor,
    pairing: str = "soft",
    negatives: str = "global",
    num_sentences: int | None = None,
    mask_equal: bool = True,
) -> Tensor:
    """Symmetric InfoNCE over T-POR/V-POR pairs, divided by the pair count of all ranks.

    The mean over ranks is the loss of the global batch. On a GPU nothing waits for the device.

    Args:
        observations_BKE, sentences_BSE: unit-length fp32 V-PORs and T-PORs of this rank.
        mask_BS: bool, true on real sentences.
        sentence_hash_BS: int64, equal for equal sentences.
        scale: inverse temperature.
        pairing: a key of `PAIRINGS`.
        negatives: `study`, `rank` or `global`.
        num_sentences: real sentences of this rank, known to the host; none counts them, and waits for the device.
        mask_equal: pairs whose sentences are equal do not count as negatives of each other.
    Source: quoted (PLACE abstract: maximise the consistency of pathology observations from both images and reports);
        soft pairing inferred (Wang et al. 2022, MGCA: a word attends to patches so); contrast and the rest are ours.
    """
    num_sentences = int(mask_BS.sum()) if num_sentences is None else num_sentences
    rows_R = torch.nonzero_static(mask_BS.flatten(), size=num_sentences)[:, 0]
    matched_BSE, mask_BS = PAIRINGS[pairing](observations_BKE, sentences_BSE, mask_BS, scale)
    visual_PE, textual_PE, mask_P = matched_BSE.flatten(0, 1), sentences_BSE.flatten(0, 1), mask_BS.flatten()
    pairs = _build_pairs(rows_R, mask_BS, sentence_hash_BS, negatives)
    pairs = pairs if mask_equal else pairs._replace(row_key_R=None, column_key_G=None)
    exchange = gather_with_grad if negatives == "global" else torch.Tensor.contiguous
    forth_R = contrast(visual_PE[rows_R], exchange(textual_PE), scale, pairs)
    back_R = contrast(textual_PE[rows_R], exchange(visual_PE), scale, pairs)
    total = torch.where(mask_P[rows_R], forth_R + back_R, 0).sum() / 2
    return average_global(total, mask_P.sum())


def _build_pairs(rows_R: Tensor, mask_BS: Tensor, hash_BS: Tensor, negatives: str) -> Pairs:
    """Which T-PORs and V-PORs, as columns, a row is contrasted with."""
    mask_P, hash_P = mask_BS.flatten(), hash_BS.flatten()
    if negatives == "global":
        own_R = rows_R + read_world().rank * len(mask_P)
        return Pairs(own_R, hash_P[rows_R], gather(hash_P), column_mask_G=gather(mask_P))
    pairs = Pairs(rows_R, hash_P[rows_R], hash_P, column_mask_G=mask_P)
    if negatives == "rank":
        return pairs
    study_P = torch.arange(len(mask_P), device=mask_P.device) // mask_BS.shape[1]
    return pairs._replace(row_study_R=study_P[rows_R], column_study_G=study_P)


def _pair_by_assignment(
    observations_BKE: Tensor, sentences_BSE: Tensor, mask_BS: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One-to-one, by least total 1 - cos; the worst sentences of a study with more than K are left out."""
    cosine_BSK = sentences_BSE.detach() @ observations_BKE.detach().transpose(1, 2)
    pairing_BS = assign(1 - cosine_BSK, mask_BS)
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
