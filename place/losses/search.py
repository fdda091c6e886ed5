"""Sentences searched for in all images: a T-POR shall find its V-POR in its own image more than in any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from place.distributed import average_global, gather, gather_with_grad
from place.kernels import contrast

NEVER = -1e9
"""Logit of what does not count. Finite, so that a sentence without any rival has a gradient, which is 0."""


def search_loss(
    observations_BKE: Tensor, sentences_BSE: Tensor, mask_BS: Tensor, sentence_hash_BS: Tensor, scale: Tensor
) -> Tensor:
    """Symmetric InfoNCE of sentences and images of the global batch, divided by the sentence count of all ranks.

    Every image answers a sentence with the V-POR that is most similar to it. So V-PORs that tell sentences apart but
    not images gain nothing here, as they do in `pathology_loss`, where each sentence chooses in its own image alone.
    Images whose report holds an equal sentence are left out. The mean over ranks is the loss of the global batch. On a
    GPU nothing waits for the device.

    Args:
        observations_BKE, sentences_BSE: unit-length fp32 V-PORs and T-PORs of this rank.
        mask_BS: bool, true on real sentences.
        sentence_hash_BS: int64, equal for equal sentences, 0 where there is none.
        scale: inverse temperature.
    Source: inferred (Yao et al. 2022, FILIP: the most similar token answers); on observations and sentences it is ours.
    """
    own_BS = scale * (sentences_BSE @ observations_BKE.transpose(1, 2)).amax(-1)
    mine_B = observations_BKE, sentence_hash_BS
    mine_P = sentences_BSE.flatten(0, 1), sentence_hash_BS.flatten(), mask_BS.flatten()
    others_G = gather_with_grad(observations_BKE), gather(sentence_hash_BS)
    others_P = gather_with_grad(sentences_BSE).flatten(0, 1), others_G[1].flatten(), gather(mask_BS).flatten()
    of_images_P = _in_tiles(lambda *rows: _score(rows, others_G, scale).logsumexp(1), mine_P, others_G[0])
    of_sentences_B = _in_tiles(lambda *rows: _score(others_P, rows, scale).logsumexp(0), mine_B, others_P[0])
    rivals = of_images_P.view_as(own_BS), of_sentences_B[:, None]
    forth_BS, back_BS = (nn.functional.softplus(rival - own_BS) for rival in rivals)
    total = torch.where(mask_BS, forth_BS + back_BS, 0).sum() / 2
    return average_global(total, mask_BS.sum())


def _score(sentences: Sequence[Tensor], images: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Logit (P,G) of the V-POR of each image that is most similar to each sentence; `NEVER` where the report has it.

    Args:
        sentences: T-PORs (P,E), their hashes (P,) and which are real (P,).
        images: V-PORs (G,K,E), and the hashes (G,S) of their reports' sentences.
    """
    (sentences_PE, hash_P, mask_P), (observations_GKE, hash_GS) = sentences, images
    logits_PGK = (scale * sentences_PE @ observations_GKE.flatten(0, 1).T).unflatten(1, observations_GKE.shape[:2])
    has_PG = (hash_P[:, None, None] == hash_GS).any(-1)
    return logits_PGK.amax(-1).masked_fill(has_PG | ~mask_P[:, None], NEVER)


def _in_tiles(sum_up: Callable[..., Tensor], rows: Sequence[Tensor], columns: Tensor) -> Tensor:
    """`sum_up` of the rows; of many in tiles, which the backward pass computes again."""
    cosines = rows[0].shape[:-1].numel() // len(rows[0]) * columns.shape[:-1].numel()
    size = max(1, contrast.TILED_FROM_PAIRS // cosines)
    if len(rows[0]) <= size:
        return sum_up(*rows)
    tiles = zip(*(part.split(size) for part in rows), strict=True)
    return torch.cat([checkpoint(sum_up, *tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles])
