"""PLACE as a transformers model: `AutoModel.from_pretrained(DIR)` after `import place`, without Ray and DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from place.config import RunError
from place.model.place import PlaceModel, TextFeatures, build_model
from place.pretrained.config import PlaceConfig

try:
    from transformers.initialization import no_init_weights  # transformers 5
except ImportError:
    from transformers.modeling_utils import no_init_weights


@dataclass
class PlaceOutput(ModelOutput):
    """Features of images, of reports, or of both; unit length except tokens and their summary.

    `last_hidden_state` patch tokens (B,N,D), `pooler_output` image summary (B,D); `image_embeds` (B,E);
    `observation_embeds` V-PORs (B,K,E) and `observation_attentions` (B,K,N); `text_embeds` (B,E); `sentence_embeds`
    T-PORs (B,S,E) and `sentence_mask` (B,S).
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    image_embeds: Tensor | None = None
    observation_embeds: Tensor | None = None
    observation_attentions: Tensor | None = None
    text_embeds: Tensor | None = None
    sentence_embeds: Tensor | None = None
    sentence_mask: Tensor | None = None


class PlacePretrainedModel(PreTrainedModel):
    """The whole PLACE model behind transformers' interface; `place` is the model as it was trained."""

    config_class = PlaceConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: PlaceConfig):
        super().__init__(config)
        self.place: PlaceModel = build_model(
            config.build_place_config(), config.vocab_size, torch.device("cpu"), build_report_config(config)
        )[0]

    @classmethod
    def get_init_context(cls, *_: Any, **__: Any) -> list[Any]:
        """Build on the CPU, not on the meta device: timm asks a convolutional stem for its shape with a forward."""
        return [no_init_weights()]

    def _init_weights(self, module: nn.Module) -> None:
        """Refuse weights that a file lacks: transformers draws them at random, and only warns."""
        if not all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters(recurse=False)):
            raise RunError("the weights do not fit config.json: some are missing; export the run again")

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (B,1,Y,X), standardised, to the joint space (B,E)."""
        return self.place.encode_image(pixel_values).image_BE

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, sentence_of_token: Tensor | None = None
    ) -> Tensor:
        """Reports to the joint space (B,E); arguments as of `forward`."""
        return self._encode_text(input_ids, attention_mask, sentence_of_token).text_BE

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sentence_of_token: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> PlaceOutput | tuple[Any, ...]:
        """Encode images, reports or both.

        Args:
            pixel_values: (B,1,Y,X) from the image processor.
            input_ids: (B,T) from the tokenizer.
            attention_mask: (B,T), 1 on real tokens; none takes all as real.
            sentence_of_token: (B,T), number of each token's sentence, -1 on special tokens and padding; none takes a
                report as one sentence between its first and its last real token.
        Raises:
            ValueError: neither images nor reports.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("nothing to encode: give pixel_values, input_ids or both")
        output = PlaceOutput()
        if pixel_values is not None:
            tokens = self.place.vision(pixel_values)
            output = PlaceOutput(tokens.patches_BND, tokens.image_BD, *self.place.read_image_tokens(tokens))
        if input_ids is not None:
            text = self._encode_text(input_ids, attention_mask, sentence_of_token)
            output["text_embeds"], output["sentence_embeds"], output["sentence_mask"] = text
        return output if return_dict is not False else output.to_tuple()

    def _encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, sentence_of_token: Tensor | None
    ) -> TextFeatures:
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        owner_BT = number_sentences(mask_BT) if sentence_of_token is None else sentence_of_token
        return self.place.encode_text(input_ids, mask_BT.bool(), owner_BT)


def number_sentences(mask_BT: Tensor) -> Tensor:
    """Sentence of each token (B,T) of reports that are one sentence: 0, but -1 on padding and both ends."""
    place_BT = mask_BT.long().cumsum(1)
    inside_BT = mask_BT.bool() & (place_BT > 1) & (place_BT < mask_BT.sum(1, keepdim=True))
    return torch.where(inside_BT, 0, -1)


def build_report_config(config: PlaceConfig) -> PretrainedConfig:
    """The report encoder's own configuration."""
    return AutoConfig.for_model(**config.report_encoder)
