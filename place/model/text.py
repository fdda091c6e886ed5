"""Report encoder: any Hugging Face encoder, or a small BERT from scratch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from place.compat import patch_torchvision
from place.config import TextConfig, UsageError
from place.kernels.attention import Blocks, Packing, Routed, has_flash_varlen, pack, unpack
from place.kernels.attention.packing import number_positions

if TYPE_CHECKING:
    from transformers import BertConfig, PretrainedConfig, PreTrainedModel


class ReportTokens(NamedTuple):
    """`report_BD` report summary and `tokens_BTD` token states."""

    report_BD: Tensor
    tokens_BTD: Tensor


class ReportEncoder(nn.Module):
    """A Hugging Face encoder that gives a summary of the report and a state for each token."""

    attention = "sdpa"
    """Backend of its attention, a key of `place.kernels.attention`'s."""
    _read_compiled: Callable[[Tensor, Tensor, Packing], Tensor] | None = None

    def __init__(self, encoder: PreTrainedModel, pooling: str):
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.width: int = encoder.config.hidden_size
        self.head_size = self.width // encoder.config.num_attention_heads
        self.first_position = _read_first_position(encoder.config)

    def forward(self, token_ids_BT: Tensor, attention_BT: Tensor, packing: Packing | None = None) -> ReportTokens:
        """Encode token ids (B,T), of which `attention_BT` (bool) marks the real ones.

        Args:
            packing: of `attention_BT`: the encoder then sees the real tokens end to end and works on no other; states
                of padding are 0. Only where `first_position` is known.
        """
        if packing is None:
            with Routed(self.attention):
                tokens_BTD = self.encoder(input_ids=token_ids_BT, attention_mask=attention_BT.long()).last_hidden_state
        else:
            tokens_BTD = unpack(self._encode_packed(pack(token_ids_BT, packing), packing), packing)
        if self.pooling == "cls":
            return ReportTokens(tokens_BTD[:, 0], tokens_BTD)
        weights_BT1 = attention_BT[..., None].to(tokens_BTD.dtype)
        return ReportTokens((tokens_BTD * weights_BT1).sum(1) / weights_BT1.sum(1), tokens_BTD)

    def compile_packed(self, mode: str = "default") -> None:
        """Let torch.compile have packed reports, for any number of tokens, where their attention is one operator."""
        self._read_compiled = torch.compile(self._read_packed, dynamic=True, mode=mode)

    def _encode_packed(self, token_ids_P: Tensor, packing: Packing) -> Tensor:
        """States (P,D) of packed tokens, each at its position in its own report."""
        assert self.first_position is not None
        position_P = number_positions(packing) + self.first_position
        if self._read_compiled is None or not self._attends_in_one_operator(token_ids_P.device.type):
            return self._read_packed(token_ids_P, position_P, packing)
        # Without the lengths on the host, for each of which there would be another graph.
        return self._read_compiled(token_ids_P, position_P, packing._replace(lengths=(), index_P=None, padded=0))

    def _attends_in_one_operator(self, device_type: str) -> bool:
        is_mixed = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_mixed else self.encoder.dtype
        dropout = getattr(self.encoder.config, "attention_probs_dropout_prob", 0.0) if self.training else 0.0
        return self.attention == "sdpa" and has_flash_varlen(device_type, dtype, self.head_size, dropout)

    def _read_packed(self, token_ids_P: Tensor, position_P: Tensor, packing: Packing) -> Tensor:
        with Routed(self.attention, Blocks(packing, packing)) as route:
            # Not by the encoder's own forward: it looks whether a mask is all true, and waits for the device.
            kinds_1P = torch.zeros_like(token_ids_P)[None]
            hidden_1PD = self.encoder.embeddings(token_ids_P[None], kinds_1P, position_P[None])
            states_1PD = self.encoder.encoder(hidden_1PD).last_hidden_state
        # torch.compile does not let what a mode remembers out of its graph.
        is_routed = torch.compiler.is_compiling() or route.has_attended
        assert is_routed, "the report encoder's attention was not routed: its reports would see each other"
        return states_1PD[0]


def _read_first_position(config: PretrainedConfig) -> int | None:
    """Number of a report's first position, for encoders known to take packed reports with their positions; else None.

    Source: inferred (transformers, the embeddings of each architecture).
    """
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    if not absolute or config._attn_implementation != "sdpa":
        return None
    if config.model_type == "bert":
        return 0
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return config.pad_token_id + 1
    return None


def build_report_encoder(
    config: TextConfig, vocab_size: int, max_tokens: int, attention: str, definition: PretrainedConfig | None = None
) -> ReportEncoder:
    """Build the report encoder.

    Args:
        vocab_size: of the tokenizer; must fit the encoder.
        max_tokens: of a report; the encoder must have as many positions.
        attention: as asked for; `eager` takes transformers' own, all others the `sdpa` that is routed to ours.
        definition: builds this architecture alone: a checkpoint is loaded next.
    Raises:
        UsageError: the source holds no encoder or not all of its weights, or tokenizer or reports do not fit it.
    Source: ours.
    """
    patch_torchvision()
    attention = "eager" if attention == "eager" else "sdpa"
    encoder = _build_encoder(config, vocab_size, max_tokens, attention, definition)
    if vocab_size > encoder.config.vocab_size:
        raise UsageError(
            f"model.text.source={config.source}: the tokenizer has {vocab_size} entries, the encoder "
            f"{encoder.config.vocab_size}; take both from one folder"
        )
    positions = _count_positions(encoder)
    if definition is None and positions is not None and max_tokens > positions:
        raise UsageError(
            f"data.max_tokens={max_tokens}: the report encoder {config.source} has {positions} positions; "
            f"lower it to {positions} or less"
        )
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # its weights would never get a gradient
    return ReportEncoder(encoder, config.pooling)


def _count_positions(encoder: PreTrainedModel) -> int | None:
    """Longest report, in tokens, that the encoder has positions for; None where it learned none.

    Source: inferred (transformers: RoBERTa and its kin count from after the padding's index).
    """
    for name, part in encoder.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(part, nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return None


def _build_encoder(
    config: TextConfig, vocab_size: int, max_tokens: int, attention: str, definition: PretrainedConfig | None
) -> PreTrainedModel:
    from transformers import AutoModel, BertConfig

    if definition is not None:
        return AutoModel.from_config(definition, attn_implementation=attention)
    if config.source == "scratch":
        small = BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.width,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=max(512, max_tokens),
        )
        return _build_from_scratch(small, attention)
    return _read_encoder(config.source, attention)


def _read_encoder(source: str, attention: str) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        encoder, found = AutoModel.from_pretrained(source, attn_implementation=attention, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "" if Path(source).is_dir() else "no such folder, and the hub: "
        raise UsageError(
            f"model.text.source={source}: {where}{' '.join(str(error).split())[:200]}; "
            "give a local folder with config.json, model.safetensors and a tokenizer, or scratch"
        ) from None
    # transformers draws what is missing at random and only warns.
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UsageError(
            f"model.text.source={source}: the weights do not fit config.json, {len(missing)} are missing "
            f"(such as {missing[0]}); give the weights of this architecture"
        )
    return encoder


def _build_from_scratch(small: BertConfig, attention: str) -> PreTrainedModel:
    from transformers import AutoModel

    try:
        return AutoModel.from_config(small, attn_implementation=attention)
    except ValueError as error:
        raise UsageError(f"model.text: {str(error).strip().splitlines()[0]}") from None
