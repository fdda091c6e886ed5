"""Token-wise alignment as of GLoRIA: each word reads the patches, a report is the sum of its words. A baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from place.config import TokenLossConfig
from place.distributed import gather, gather_with_grad, max_over_ranks, read_world


def token_loss(
    regions_BNE: Tensor, words_BTE: Tensor, is_word_BT: Tensor, report_group_B: Tensor, config: TokenLossConfig
) -> Tensor:
    """Symmetric InfoNCE over the global batch of how well a report's words are found in an image.

    The mean over ranks is the loss of the global batch. Identical reports are positives of each other. Ranks may have
    different T, each that of its own longest report.

    Args:
        regions_BNE, words_BTE: unit-length fp32 patches and tokens of this rank.
        is_word_BT: bool, true on tokens of sentences.
        report_group_B: int64, equal for identical reports.
    Source: quoted (Huang et al. 2021, GLoRIA) for the local similarity and its temperatures; the uniform target over
        positives is ours.
    """
    rank, size = read_world().rank, len(words_BTE)
    missing = max_over_ranks(words_BTE.shape[1], words_BTE.device) - words_BTE.shape[1]
    words_BTE = nn.functional.pad(words_BTE, (0, 0, 0, missing))
    is_word_BT = nn.functional.pad(is_word_BT, (0, missing))
    score_BG = score_words(regions_BNE, gather_with_grad(words_BTE), gather(is_word_BT), config)
    score_GG = gather_with_grad(score_BG)
    group_G = gather(report_group_B)
    own = slice(rank * size, (rank + 1) * size)
    forth = _contrast(config.logit_scale * score_BG, report_group_B, group_G)
    back = _contrast(config.logit_scale * score_GG[:, own].T, report_group_B, group_G)
    return (forth + back) / 2


def score_words(regions_BNE: Tensor, words_GTE: Tensor, is_word_GT: Tensor, config: TokenLossConfig) -> Tensor:
    """Similarity (B,G) of images and reports: log sum exp, over words, of the cosine of a word and what it attends to.

    A report without a word scores 0 everywhere.
    """
    words_WE = words_GTE[is_word_GT]
    report_W = torch.arange(len(words_GTE), device=words_GTE.device)[:, None].expand_as(is_word_GT)[is_word_GT]
    share_BWN = (config.attention_scale * words_WE @ regions_BNE.transpose(1, 2)).softmax(-1)
    found_BWE = nn.functional.normalize(share_BWN @ regions_BNE, dim=-1)
    cosine_BW = (found_BWE * words_WE).sum(-1)
    sum_BG = cosine_BW.new_zeros(len(regions_BNE), len(words_GTE))
    sum_BG = sum_BG.index_add(1, report_W, (config.word_scale * cosine_BW).exp())
    return torch.where(sum_BG > 0, sum_BG, 1).log() / config.word_scale


def _contrast(logit_BG: Tensor, group_B: Tensor, group_G: Tensor) -> Tensor:
    """Mean over anchors of -mean over positives of log softmax."""
    positive_BG = group_B[:, None] == group_G[None, :]
    return -(torch.where(positive_BG, logit_BG.log_softmax(-1), 0).sum(-1) / positive_BG.sum(-1)).mean()
