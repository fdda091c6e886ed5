"""The objective: weighted sum of its terms, computed in fp32 outside autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from place.batch import Batch, Losses, Outputs
from place.config import LossConfig
from place.losses.correlation import correlation_loss
from place.losses.instance import instance_loss
from place.losses.pathology import pathology_loss
from place.losses.search import search_loss
from place.losses.tokens import token_loss


def compute_losses(outputs: Outputs, batch: Batch, config: LossConfig, grey_level: float) -> Losses:
    """The objective of the global batch, as this rank's share: its mean over ranks is what is optimised and logged.

    Args:
        outputs: of the model for `batch`.
        grey_level: one grey level of 255 in standardised units.
    Returns:
        `Losses`; a term of weight 0 is not computed and reads 0.
    Source: ours.
    """
    with torch.autocast(outputs.image_BE.device.type, enabled=False):
        zero = outputs.image_BE.new_zeros(())
        instance = _instance(outputs, batch, config) if config.instance.weight else zero
        pathology = _pathology(outputs, batch, config) if config.pathology.weight else zero
        correlation = _correlation(outputs, batch, config, grey_level) if config.correlation.weight else zero
        tokens = _tokens(outputs, batch, config) if config.tokens.weight else zero
        total = (
            config.instance.weight * instance
            + config.pathology.weight * pathology
            + config.correlation.weight * correlation
            + config.tokens.weight * tokens
        )
    return Losses(total, instance, pathology, correlation, tokens)


def _instance(outputs: Outputs, batch: Batch, config: LossConfig) -> Tensor:
    scale, multi_positive = outputs.logit_scales[0], config.instance.multi_positive
    return instance_loss(outputs.image_BE, outputs.text_BE, scale, batch.report_group_B, multi_positive)


def _pathology(outputs: Outputs, batch: Batch, config: LossConfig) -> Tensor:
    term, scale = config.pathology, outputs.logit_scales[1]
    given = outputs.observations_BKE, outputs.sentences_BSE, outputs.mask_BS, batch.sentence_hash_BS, scale
    num_sentences = int(batch.num_sentences_B.sum())
    loss = (1 - term.search) * pathology_loss(*given, term.pairing, term.negatives, num_sentences, term.mask_equal)
    return loss + term.search * search_loss(*given) if term.search else loss


def _correlation(outputs: Outputs, batch: Batch, config: LossConfig, grey_level: float) -> Tensor:
    return correlation_loss(
        outputs.z_BNE, outputs.target_BND, batch.valid_patch_BN, outputs.focus_BN, config.correlation, grey_level
    )


def _tokens(outputs: Outputs, batch: Batch, config: LossConfig) -> Tensor:
    is_word_BT = batch.sentence_of_token_BT >= 0
    return token_loss(outputs.regions_BNE, outputs.words_BTE, is_word_BT, batch.report_group_B, config.tokens)
