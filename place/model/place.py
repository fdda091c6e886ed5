"""The PLACE model: from a batch of image-report pairs to everything the three losses compare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from place.batch import Batch, Outputs
from place.config import Config, UsageError
from place.kernels.attention import Packing, build_packing, choose_backend
from place.model.correlation import CorrelationHead
from place.model.observations import ObservationExtractor
from place.model.projection import Projection, mean_by_sentence
from place.model.text import ReportEncoder, build_report_encoder
from place.model.vision import ImageEncoder, VisionTokens, build_image_encoder, patchify

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ImageFeatures(NamedTuple):
    """`image_BE` and V-PORs `observations_BKE`, unit length; `attention_BKN` rows sum to 1."""

    image_BE: Tensor
    observations_BKE: Tensor
    attention_BKN: Tensor


class TextFeatures(NamedTuple):
    """`text_BE` and T-PORs `sentences_BSE`, unit length; `mask_BS` bool, true on real sentences."""

    text_BE: Tensor
    sentences_BSE: Tensor
    mask_BS: Tensor


class PlaceModel(nn.Module):
    """Encoders, observation extractor, correlation head, projections and temperatures."""

    def __init__(self, config: Config, vision: ImageEncoder, text: ReportEncoder, attention: str):
        super().__init__()
        model = config.model
        self.vision, self.text = vision, text
        vision.attention = text.attention = self.attention = attention
        # Only the correlation has anything to predict of hidden patches.
        self.mask_ratio = model.correlation.mask_ratio if config.loss.correlation.weight else 0.0
        self.max_sentences = config.data.max_sentences
        self.max_logit_scale = config.loss.max_logit_scale
        self.target = config.loss.correlation.target
        self.joint_width = model.joint_width
        self.observes, self.correlates = bool(config.loss.pathology.weight), bool(config.loss.correlation.weight)
        self.recompute = config.engine.activation_checkpointing
        self.observe = ObservationExtractor(model.observations, vision.width, attention)
        self.correlate = CorrelationHead(model.correlation, vision.width, text.width, attention)
        self.project_image = Projection(vision.width, model.joint_width)
        self.project_text = Projection(text.width, model.joint_width)
        self.project_observation = Projection(vision.width, model.joint_width)
        self.project_sentence = Projection(text.width, model.joint_width)
        token_wise = bool(config.loss.tokens.weight)
        self.project_region = Projection(vision.width, model.joint_width) if token_wise else None
        self.project_word = Projection(text.width, model.joint_width) if token_wise else None
        # Shape (1,): DeepSpeed 0.19.8 cannot broadcast parameters without a dimension.
        self.log_scale_instance = nn.Parameter(torch.tensor([-math.log(config.loss.instance.temperature)]))
        self.log_scale_pathology = nn.Parameter(torch.tensor([-math.log(config.loss.pathology.temperature)]))

    def forward(self, batch: Batch) -> Outputs:
        """See `place.batch.Outputs`."""
        packing = self._pack(batch.attention_BT, batch.length_B)
        hidden_BN = self._draw_hidden(batch) if self.training and self.mask_ratio else None
        image_BD, patches_BND = self._encode(self.vision, batch.image_BCYX, hidden_BN)
        report_BD, tokens_BTD = self._encode(self.text, batch.token_ids_BT, batch.attention_BT, packing)
        observations_BKE, sentences_BSE, mask_BS, attention_BKN = self._observe_pairs(batch, patches_BND, tokens_BTD)
        z_BNE, target_BND = self._correlate_patches(batch, patches_BND, tokens_BTD, packing)
        return Outputs(
            self.project_image(image_BD),
            self.project_text(report_BD),
            observations_BKE,
            sentences_BSE,
            mask_BS,
            attention_BKN,
            z_BNE,
            target_BND,
            torch.ones_like(batch.valid_patch_BN) if hidden_BN is None else hidden_BN,
            self._project_tokens(self.project_region, patches_BND),
            self._project_tokens(self.project_word, tokens_BTD),
            self._logit_scales(),
        )

    def _observe_pairs(
        self, batch: Batch, patches_BND: Tensor, tokens_BTD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """V-PORs, T-PORs, their mask and attention; no V-POR and no T-POR where no loss looks at them."""
        if not self.observes:
            none_B0E = patches_BND.new_zeros(len(patches_BND), 0, self.joint_width, dtype=torch.float32)
            none_B0N = none_B0E.new_zeros(len(patches_BND), 0, patches_BND.shape[1])
            return none_B0E, none_B0E, batch.valid_patch_BN[:, :0], none_B0N
        observations_BKD, attention_BKN = self.observe(patches_BND)
        means_BSD, mask_BS = mean_by_sentence(tokens_BTD, batch.sentence_of_token_BT, self.max_sentences)
        return self.project_observation(observations_BKD), self.project_sentence(means_BSD), mask_BS, attention_BKN

    def _correlate_patches(
        self, batch: Batch, patches_BND: Tensor, tokens_BTD: Tensor, packing: Packing | None
    ) -> tuple[Tensor, Tensor]:
        """z and its target; no patch where no loss looks at them."""
        if not self.correlates:
            return patches_BND[:, :0], patches_BND[:, :0].detach()
        z_BNE = self.correlate(patches_BND, tokens_BTD, batch.attention_BT, packing)
        if self.target == "pixels":
            return z_BNE, patchify(batch.image_BCYX, self.vision.patch_px)
        return z_BNE, patches_BND.detach().float()

    def compile_encoders(self, mode: str = "default") -> None:
        """Let torch.compile have the encoders, in this mode; packed reports only where their attention is one operator.

        Whole, not block by block: each compiled part costs the host about what it saves, and any other attention of
        packed reports would cut the report encoder into parts.
        """
        self.vision.compile(mode=mode)
        if self.packs:
            self.text.compile_packed(mode)
        else:
            self.text.compile(mode=mode)

    def encode_image(self, image_BCYX: Tensor) -> ImageFeatures:
        """Features of images alone, (B,1,Y,X) standardised."""
        return self.read_image_tokens(self.vision(image_BCYX))

    def read_image_tokens(self, tokens: VisionTokens) -> ImageFeatures:
        """Features of images whose tokens are known."""
        observations_BKD, attention_BKN = self.observe(tokens.patches_BND)
        image_BE, observations_BKE = self.project_image(tokens.image_BD), self.project_observation(observations_BKD)
        return ImageFeatures(image_BE, observations_BKE, attention_BKN)

    def encode_text(self, token_ids_BT: Tensor, attention_BT: Tensor, sentence_of_token_BT: Tensor) -> TextFeatures:
        """Features of reports alone."""
        report_BD, tokens_BTD = self.text(token_ids_BT, attention_BT, self._pack(attention_BT))
        means_BSD, mask_BS = mean_by_sentence(tokens_BTD, sentence_of_token_BT, self.max_sentences)
        return TextFeatures(self.project_text(report_BD), self.project_sentence(means_BSD), mask_BS)

    @property
    def packs(self) -> bool:
        """Whether reports are packed: attention is not to be the definition, and the encoder can be given a packing."""
        return self.attention != "eager" and self.text.first_position is not None

    def _pack(self, attention_BT: Tensor, length_B: Tensor | None = None) -> Packing | None:
        return build_packing(attention_BT, length_B) if self.packs else None

    def _encode(self, encoder: nn.Module, *inputs: Tensor | Packing | None) -> tuple[Tensor, Tensor]:
        if self.recompute and self.training:
            return checkpoint(encoder, *inputs, use_reentrant=False)
        return encoder(*inputs)

    def _draw_hidden(self, batch: Batch) -> Tensor:
        """Hide an equal number of patches of each image, drawn anew at each step."""
        noise_BN = torch.rand(batch.valid_patch_BN.shape, device=batch.image_BCYX.device)
        count = round(self.mask_ratio * noise_BN.shape[1])
        return noise_BN.argsort(1).argsort(1) < count

    @staticmethod
    def _project_tokens(project: Projection | None, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD[:, :0].float() if project is None else project(tokens_BTD)

    def _logit_scales(self) -> Tensor:
        scales = torch.cat([self.log_scale_instance, self.log_scale_pathology]).float().exp()
        # The cap is outside the gradient: a scale that has reached it can still come down.
        return scales - (scales - self.max_logit_scale).clamp(min=0).detach()


def build_model(
    config: Config, vocab_size: int, device: torch.device, definition: PretrainedConfig | None = None
) -> tuple[PlaceModel, str]:
    """Build the model on CPU for use on a device.

    Args:
        vocab_size: of the tokenizer.
        definition: of the report encoder: builds the architecture of the whole model, without weights.
    Returns:
        The model, and a line that says which attention was chosen and why.
    Raises:
        UsageError: parts that cannot be built, or do not fit together.
    Source: ours.
    """
    vision = build_image_encoder(config.model.vision, config.data.image_size_px, with_weights=definition is None)
    text = build_report_encoder(
        config.model.text, vocab_size, config.data.max_tokens, config.model.attention, definition
    )
    heads = config.model.observations.num_heads, config.model.correlation.num_heads
    head_sizes = {*vision.head_sizes, text.head_size, *(vision.width // count for count in heads)}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.precision]
    try:
        attention, reason = choose_backend(config.model.attention, device, dtype, head_sizes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    model = PlaceModel(config, vision, text, attention)
    return model, f"attention: {attention}, {'packed' if model.packs else 'padded'} reports ({reason})"
