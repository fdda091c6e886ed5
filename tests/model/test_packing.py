"""Packed reports: the same features and gradients as padded ones, and no work on padding."""

from __future__ import annotations

import pytest
import torch
from place.kernels.attention import build_packing
from tiny import VOCAB, build_batch, build_tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModel, DistilBertConfig, DistilBertModel

from place.batch import Batch, Outputs
from place.losses.objective import compute_losses
from place.model.place import PlaceModel, build_model
from place.model.text import ReportEncoder


def build(**model: object) -> PlaceModel:
    torch.manual_seed(0)
    return build_model(build_tiny_config(model=model), VOCAB, torch.device("cpu"))[0]


def run(model: PlaceModel, batch: Batch) -> tuple[Outputs, dict[str, Tensor]]:
    """Outputs, and the gradients of the whole objective."""
    model.zero_grad()
    outputs = model(batch)
    compute_losses(outputs, batch, build_tiny_config().loss, 1 / 255).total.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_reports_give_the_outputs_and_gradients_of_padded_ones(
    pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(text={"pooling": pooling}), build_batch(6)
    packed, packed_gradients = run(model, batch)
    monkeypatch.setattr(model, "_pack", lambda *_: None)
    padded, padded_gradients = run(model, batch)
    for name, value in padded._asdict().items():
        torch.testing.assert_close(getattr(packed, name), value, rtol=1e-4, atol=1e-5, msg=name)
    assert packed_gradients.keys() == padded_gradients.keys()
    for name, value in padded_gradients.items():
        atol = 1e-5 * float(value.abs().max() + 1e-3)
        torch.testing.assert_close(packed_gradients[name], value, rtol=1e-4, atol=atol, msg=name)


def test_no_layer_that_reads_reports_sees_padding() -> None:
    model, batch = build(), build_batch(6)
    real = int(batch.attention_BT.sum())
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(("text", "correlate.blocks.0.attend_cross.key")):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].shape[:-1]}))
    model(batch)
    assert len(seen) == 7
    assert all(shape.numel() == real for shape in seen.values()), seen
    assert real < batch.attention_BT.numel()


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert"])
def test_each_kind_of_encoder_counts_positions_from_its_own_start(kind: str) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, max_position_embeddings=20, **shape)
    encoder = ReportEncoder(AutoModel.from_config(config, attn_implementation="sdpa"), "mean").eval()
    batch = build_batch(9)  # more real tokens than the encoder has positions
    assert batch.attention_BT.sum() > 20
    ids_BT = batch.token_ids_BT.masked_fill(~batch.attention_BT, config.pad_token_id)
    padded = encoder(ids_BT, batch.attention_BT)
    packed = encoder(ids_BT, batch.attention_BT, build_packing(batch.attention_BT))
    torch.testing.assert_close(packed.report_BD, padded.report_BD, rtol=1e-4, atol=1e-5)
    real = batch.attention_BT
    torch.testing.assert_close(packed.tokens_BTD[real], padded.tokens_BTD[real], rtol=1e-4, atol=1e-5)


def test_encoders_that_are_not_known_to_take_packed_reports_get_padded_ones() -> None:
    small = DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    small._attn_implementation = "sdpa"
    model, batch = build(), build_batch(4)
    model.text = ReportEncoder(DistilBertModel(small), "cls")
    assert model.text.first_position is None
    assert model(batch).text_BE.shape == (4, 24)


def test_the_note_says_what_reports_are() -> None:
    for attention, expected in (("auto", "sdpa, packed reports (xformers has"), ("eager", "eager, padded reports (as")):
        _, note = build_model(build_tiny_config(model={"attention": attention}), VOCAB, torch.device("cpu"))
        assert note.startswith(f"attention: {expected}")
