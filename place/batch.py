"""What passes between data, model, losses and engine, and the legend of tensor shapes.

B image-report pairs of a batch (a manifest row is an image), G global batch (B times world), C channels, Y X pixels,
N patches, T tokens, S sentences, K observation queries, D width, E joint space, H heads.
NamedTuples, because DeepSpeed's ZeRO-3 hooks walk tuples, lists and dicts, not dataclasses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ON_HOST = ("length_B", "num_sentences_B")


class Batch(NamedTuple):
    """Pairs as the model takes them.

    `image_BCYX` fp32 (B,1,Y,X), standardised grey; `token_ids_BT` int64; `attention_BT` bool, true on real tokens;
    `sentence_of_token_BT` int64, -1 on special and padding tokens; `sentence_hash_BS` int64, 0 where there is no
    sentence; `report_group_B` int64, equal for identical reports; `sample_id_B` int64; `valid_patch_BN` bool, false on
    padding patches; `length_B` and `num_sentences_B` int64, real tokens and sentences of each report, always on the
    host: shapes follow from them.
    """

    image_BCYX: Tensor
    token_ids_BT: Tensor
    attention_BT: Tensor
    sentence_of_token_BT: Tensor
    sentence_hash_BS: Tensor
    report_group_B: Tensor
    sample_id_B: Tensor
    valid_patch_BN: Tensor
    length_B: Tensor
    num_sentences_B: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        fields = self._asdict().items()
        return Batch(*(tensor if name in ON_HOST else tensor.to(device, non_blocking=True) for name, tensor in fields))

    def chunks(self, count: int) -> list[Batch]:
        """Cut into `count` equal batches along B."""
        return [Batch(*parts) for parts in zip(*(tensor.chunk(count) for tensor in self), strict=True)]


class Outputs(NamedTuple):
    """What the model says of a batch; features are unit length where they are compared.

    `image_BE`, `text_BE`: projected, normalised instance features. `observations_BKE`: V-PORs, `sentences_BSE`: T-PORs,
    both normalised; `mask_BS` bool, true on real sentences; `attention_BKN` fp32: share of each patch in each query,
    rows sum to 1. Where the pathology loss has weight 0, K and S are 0. `z_BNE`: report-conditioned patch features
    whose correlation is trained; `target_BND`: patches they are compared with (N is 0 where that loss has weight 0);
    `focus_BN` bool: patches that were hidden (all true without masking): the loss counts pairs that touch one.
    `regions_BNE`, `words_BTE`: patches and tokens in a joint space of their own, unit length, for
    token-wise alignment; without it N and T are 0. `logit_scales` (2,): inverse temperatures of the instance and of the
    pathology loss.
    """

    image_BE: Tensor
    text_BE: Tensor
    observations_BKE: Tensor
    sentences_BSE: Tensor
    mask_BS: Tensor
    attention_BKN: Tensor
    z_BNE: Tensor
    target_BND: Tensor
    focus_BN: Tensor
    regions_BNE: Tensor
    words_BTE: Tensor
    logit_scales: Tensor


class Losses(NamedTuple):
    """Scalars; `total` is the weighted sum that is optimised, the terms are unweighted."""

    total: Tensor
    instance: Tensor
    pathology: Tensor
    correlation: Tensor
    tokens: Tensor
