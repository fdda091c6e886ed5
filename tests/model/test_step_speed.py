"""What makes a step fast and changes nothing: no wait for the device, bf16 between products, nothing in vain."""

from __future__ import annotations

import pytest
import torch
from place.kernels.attention import Blocks, backends, routing
from tiny import VOCAB, build_batch, build_tiny_config
from torch import Tensor

from place.batch import Batch, Outputs
from place.losses.correlation import correlation_loss
from place.losses.instance import instance_loss
from place.losses.objective import compute_losses
from place.losses.pathology import pathology_loss
from place.model import text, vision
from place.model.place import PlaceModel, build_model

CPU = torch.device("cpu")


def build(**sections: dict) -> PlaceModel:
    torch.manual_seed(0)
    return build_model(build_tiny_config(**sections), VOCAB, CPU)[0]


def backward(model: PlaceModel, batch: Batch) -> tuple[Outputs, list[Tensor]]:
    model.zero_grad()
    outputs = model(batch)
    compute_losses(outputs, batch, build_tiny_config().loss, 1 / 255).total.backward()
    return outputs, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_model_and_losses_never_wait_for_a_value_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values: whatever asks for one fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it has no autocast either
    config, batch = build_tiny_config(), build_batch(6)
    model = build().to("meta")
    assert model.packs
    given = batch.to("meta")
    out = model(given)
    scales = out.logit_scales
    loss = instance_loss(out.image_BE, out.text_BE, scales[0], given.report_group_B)
    num_sentences = int(given.num_sentences_B.sum())
    loss = loss + pathology_loss(*out[2:5], given.sentence_hash_BS, scales[1], num_sentences=num_sentences)
    loss = loss + correlation_loss(*out[6:8], given.valid_patch_BN, out.focus_BN, config.loss.correlation, 1 / 255)
    assert loss.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        model.encode_text(*batch.to("meta")[1:4])  # whose lengths are not on the host


def test_between_products_everything_is_bf16_under_bf16_autocast_and_nothing_else_changes() -> None:
    model, seen = build(model={"vision": {"overrides": {"depth": 2}}}), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and name.startswith(("vision", "text")):
            module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    with torch.autocast("cpu", torch.bfloat16):
        model(build_batch(4))
    assert {out.dtype for _, out in seen.values()} == {torch.bfloat16}
    assert {given.dtype for name, (given, _) in seen.items() if name.startswith("vision")} == {torch.bfloat16}
    model(build_batch(4))
    assert {tensor.dtype for pair in seen.values() for tensor in pair} == {torch.float32}


def test_bf16_norms_err_little_more_than_those_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(model={"vision": {"overrides": {"depth": 4}}}).eval(), build_batch(8)
    with torch.no_grad():
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(batch)
            for module in (routing, vision):
                monkeypatch.setattr(module, "is_bf16", lambda _: False)
            theirs = model(batch)
    for name in ("image_BE", "text_BE", "observations_BKE"):
        errors = [(getattr(out, name) - getattr(exact, name)).norm().item() for out in (ours, theirs)]
        assert errors[0] <= 2 * errors[1], (name, errors)
        assert errors[0] != errors[1], "the rule of autocast was not replaced"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_encoders_are_compiled_in_the_mode_that_is_asked_for(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, mode, **_: modes.append(mode) or function)
    build(model={"attention": attention}).compile_encoders("reduce-overhead")
    assert modes == ["reduce-overhead"] * 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_compiled_encoders_give_the_same_outputs_and_gradients(attention: str) -> None:
    plain, batch = build(model={"attention": attention}), build_batch(4)
    compiled = build(model={"attention": attention})
    compiled.compile_encoders()
    assert (compiled.text._compiled_call_impl is None) == compiled.packs
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    expected, gradients = backward(plain, batch)
    outputs, compiled_gradients = backward(compiled, batch)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(outputs, name), value, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_compiled_packed_reports_of_any_lengths_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one operator that attends to packed reports needs a GPU; here its definition stands in for it."""
    plain, compiled = build(model={"attention": "sdpa"}), build(model={"attention": "sdpa"})
    compiled.compile_encoders()
    monkeypatch.setattr(text, "has_flash_varlen", lambda *_: True)
    monkeypatch.setattr(backends, "has_flash_varlen", lambda *_: True)
    monkeypatch.setattr(backends, "_attend_flash", attend_by_definition)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(4):
        batch = build_batch(5 + seed % 3, seed=seed)
        kept = plain.text(batch.token_ids_BT, batch.attention_BT, plain._pack(batch.attention_BT))
        found = compiled.text(batch.token_ids_BT, batch.attention_BT, compiled._pack(batch.attention_BT))
        torch.testing.assert_close(found.tokens_BTD, kept.tokens_BTD, rtol=1e-4, atol=1e-5)
        gradients = []
        for model, tokens in ((plain, kept), (compiled, found)):
            model.zero_grad()
            tokens.tokens_BTD.square().sum().backward()
            gradients.append([p.grad for p in model.text.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def attend_by_definition(q_PHD: Tensor, k_PHD: Tensor, v_PHD: Tensor, blocks: Blocks, scale: float) -> Tensor:
    place_P = torch.arange(len(q_PHD))
    owner_P = torch.bucketize(place_P, blocks.queries.starts_B1[1:].long(), right=True)
    scores_HPP = torch.einsum("phd,qhd->hpq", q_PHD, k_PHD) * scale
    weights_HPP = scores_HPP.masked_fill(owner_P[:, None] != owner_P, -1e9).softmax(-1)
    return torch.einsum("hpq,qhd->phd", weights_HPP, v_PHD)


@pytest.mark.parametrize("term", ["pathology", "correlation"])
def test_what_no_loss_looks_at_is_not_computed(term: str) -> None:
    config, batch = build_tiny_config(loss={term: {"weight": 0.0}}), build_batch(4)
    model = build(loss={term: {"weight": 0.0}})
    head = {"pathology": model.observe, "correlation": model.correlate}[term]
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(batch)
    assert not calls
    empty = {"pathology": outputs.observations_BKE, "correlation": outputs.z_BNE}[term]
    assert empty.shape[1] == 0
    losses = compute_losses(outputs, batch, config.loss, 1 / 255)
    whole = compute_losses(build()(batch), batch, build_tiny_config().loss, 1 / 255)
    assert getattr(losses, term) == 0
    torch.testing.assert_close(losses.instance, whole.instance)
    if term == "pathology":
        model.encode_image(batch.image_BCYX)
        assert calls, "V-PORs can still be asked for"
