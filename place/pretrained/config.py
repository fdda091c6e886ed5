"""The configuration of an exported model: everything that rebuilds it, nothing of the place it was trained at."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from place.config import Config, EvaluationConfig, GenerationConfig, check_config

_OF_A_MACHINE = {"prompts", "allow_leaks", "pretraining", "other_tests", "id_map", "salt_file", "generation"}
KEPT: dict[str, Any] = {
    "data": {"image_size_px", "max_tokens", "max_sentences", "sections", "train_split", "val_split", "views_per_study"},
    "model": True,
    "loss": True,
    "evaluation": {
        **{name: True for name in EvaluationConfig.model_fields if name not in _OF_A_MACHINE},
        "generation": GenerationConfig.model_fields.keys() - {"decoder", "chexbert", "radgraph"},
    },
}
"""What of a run's configuration goes into the export: no path of the machine that trained it."""


class PlaceConfig(PretrainedConfig):
    """Configuration of `PlacePretrainedModel`.

    Args:
        place: sections of `place.config.Config` (see `KEPT`).
        report_encoder: the report encoder's own transformers configuration.
        vocab_size: entries of the tokenizer.
        image_mean, image_std: of grey levels from 0 to 1; images are standardised with them.
        trained: step, commit, data fingerprint and encoders the training started from.
    Source: ours.
    """

    model_type = "place"

    def __init__(
        self,
        place: dict[str, Any] | None = None,
        report_encoder: dict[str, Any] | None = None,
        vocab_size: int = 0,
        image_mean: float = 0.5,
        image_std: float = 0.25,
        trained: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.place, self.report_encoder, self.vocab_size = place or {}, report_encoder or {}, vocab_size
        self.image_mean, self.image_std, self.trained = image_mean, image_std, trained or {}
        super().__init__(**kwargs)

    def build_place_config(self) -> Config:
        """The sections as a `Config`; what was not kept is at its default."""
        return check_config({**self.place, "engine": {"kind": "torch", "precision": "fp32"}})
