"""The model: what it promises in `Outputs`, who may influence whom, and encoders that come from folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from tiny import VOCAB, build_batch, build_tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, DistilBertConfig, DistilBertModel

from place.batch import Batch, Outputs
from place.config import TextConfig, UsageError, VisionConfig, dump_config
from place.data.tokens import ReportTokenizer, train_tokenizer
from place.model.place import PlaceModel, build_model
from place.model.projection import mean_by_sentence
from place.model.text import build_report_encoder
from place.model.vision import build_image_encoder, patchify
from place.training.checkpoint import load_run, write_definition
from place.training.engine import TorchEngine
from place.training.saver import Saver

CPU = torch.device("cpu")
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
FEATURES = ("image_BE", "text_BE", "observations_BKE", "sentences_BSE", "z_BNE", "attention_BKN")


def build(seed: int = 0, **sections: dict) -> PlaceModel:
    """A tiny model in eval mode."""
    torch.manual_seed(seed)
    return build_model(build_tiny_config(**sections), VOCAB, CPU)[0].eval()


def run(model: PlaceModel, batch: Batch) -> Outputs:
    with torch.no_grad():
        return model(batch)


def assert_unit(features: Tensor) -> None:
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey ViT as timm itself saves one, with the arguments that `place export` writes."""
    folder = tmp_path_factory.mktemp("vit") / "encoder"
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, **SHAPE)
    args = {**SHAPE, "in_chans": 1, "dynamic_img_size": True, "global_pool": "token", "fc_norm": False}
    timm.models.save_for_hf(vit, folder, model_args=args, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT and its tokenizer as transformers saves them."""
    folder = tmp_path_factory.mktemp("bert") / "encoder"
    tokenizer = train_tokenizer(["There is a small left effusion.", "No pneumothorax."], 200, 32, 4)
    tokenizer.save(folder)
    torch.manual_seed(1)
    small = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(small).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("token_wise", [False, True])
def test_outputs_have_the_shapes_that_the_contract_names(token_wise: bool) -> None:
    out = run(build(loss={"tokens": {"weight": float(token_wise)}}), build_batch(5))
    shapes = {name: tuple(value.shape) for name, value in out._asdict().items()}
    assert shapes == {
        "image_BE": (5, 24),
        "text_BE": (5, 24),
        "observations_BKE": (5, 6, 24),
        "sentences_BSE": (5, 4, 24),
        "mask_BS": (5, 4),
        "z_BNE": (5, 16, 16),
        "target_BND": (5, 16, 64),
        "focus_BN": (5, 16),
        "attention_BKN": (5, 6, 16),
        "regions_BNE": (5, 16, 24) if token_wise else (5, 0, 32),
        "words_BTE": (5, 14, 24) if token_wise else (5, 0, 32),
        "logit_scales": (2,),
    }
    assert {out.mask_BS.dtype, out.focus_BN.dtype} == {torch.bool}
    assert all(getattr(out, name).dtype == torch.float32 for name in (*FEATURES, "target_BND", "logit_scales"))


def test_under_autocast_z_stays_in_bf16_for_the_tensor_cores_of_the_loss() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(build(), build_batch(5))
    assert out.z_BNE.dtype == torch.bfloat16
    assert out.image_BE.dtype == torch.float32


def test_features_that_are_compared_are_unit_length() -> None:
    out = run(build(), build_batch(5))
    for features in (out.image_BE, out.text_BE, out.observations_BKE, out.sentences_BSE):
        assert_unit(features)


def test_attention_rows_of_the_observations_sum_to_one() -> None:
    attention_BKN = run(build(), build_batch(5)).attention_BKN
    assert (attention_BKN >= 0).all()
    torch.testing.assert_close(attention_BKN.sum(-1), torch.ones(5, 6))


def test_the_mask_marks_the_sentences_that_have_a_token() -> None:
    batch = build_batch(5)
    expected = [[bool((row == s).any()) for s in range(4)] for row in batch.sentence_of_token_BT]
    assert run(build(), batch).mask_BS.tolist() == expected


def test_a_sentence_is_the_mean_of_its_tokens() -> None:
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0], [5.0, 7.0]]])
    mean_BSD, mask_BS = mean_by_sentence(tokens, torch.tensor([[-1, 0, 0, 2]]), 4)
    assert mean_BSD.tolist() == [[[2.0, 4.0], [0.0, 0.0], [5.0, 7.0], [0.0, 0.0]]]
    assert mask_BS.tolist() == [[True, False, True, False]]


def test_observations_see_each_other() -> None:
    """Learned queries attend to one another, so that two need not read the same."""
    model = build()
    patches = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, _ = model.observe(patches)
        model.observe.queries[0] = torch.linspace(-1, 1, 32)
        after, _ = model.observe(patches)
    assert ((after - before).abs().amax(-1) > 1e-6).all()


def test_without_masking_every_patch_counts_and_the_target_is_its_pixels() -> None:
    batch = build_batch(3)
    out = run(build(), batch)
    assert out.focus_BN.all()
    # Patch 6 of a 4 x 4 grid is the third of the second row.
    torch.testing.assert_close(out.target_BND[:, 6], batch.image_BCYX[:, 0, 8:16, 16:24].flatten(1))


def test_encoding_one_side_alone_gives_the_features_of_the_pair() -> None:
    model, batch = build(), build_batch(4)
    out = run(model, batch)
    with torch.no_grad():
        image = model.encode_image(batch.image_BCYX)
        text = model.encode_text(batch.token_ids_BT, batch.attention_BT, batch.sentence_of_token_BT)
    for name, value in {**image._asdict(), **text._asdict()}.items():
        torch.testing.assert_close(value, getattr(out, name))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_tokens_have_no_influence(attention: str, pooling: str) -> None:
    batch = build_batch(4)
    assert not batch.attention_BT.all()
    noisy = torch.where(batch.attention_BT, batch.token_ids_BT, torch.full_like(batch.token_ids_BT, 7))
    model = build(model={"attention": attention, "text": {"pooling": pooling}})
    clean, changed = run(model, batch), run(model, batch._replace(token_ids_BT=noisy))
    for name in FEATURES:
        torch.testing.assert_close(getattr(changed, name), getattr(clean, name), msg=name)


def test_longer_padding_has_no_influence() -> None:
    batch = build_batch(4)
    longer = batch._replace(
        token_ids_BT=torch.nn.functional.pad(batch.token_ids_BT, (0, 9)),
        attention_BT=torch.nn.functional.pad(batch.attention_BT, (0, 9)),
        sentence_of_token_BT=torch.nn.functional.pad(batch.sentence_of_token_BT, (0, 9), value=-1),
    )
    model = build()
    clean, changed = run(model, batch), run(model, longer)
    for name in FEATURES:
        torch.testing.assert_close(getattr(changed, name), getattr(clean, name), msg=name)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_the_company_in_a_batch_has_no_influence(stem: str) -> None:
    model, batch = build(model={"vision": {"stem": stem}}), build_batch(6)
    together = run(model, batch)
    for row in (0, 5):
        alone = run(model, Batch(*(tensor[row : row + 1] for tensor in batch)))
        for name in FEATURES:
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row], msg=name)


def test_masking_hides_its_share_of_each_image_in_training_alone() -> None:
    model, batch = build(model={"correlation": {"mask_ratio": 0.25}}), build_batch(6)
    assert run(model, batch).focus_BN.all()
    focus_BN = run(model.train(), batch).focus_BN
    assert focus_BN.sum(1).tolist() == [4] * 6
    assert len({tuple(row) for row in focus_BN.tolist()}) > 1, "all images hide the same patches"


def test_nothing_is_hidden_where_no_correlation_is_trained() -> None:
    model = build(model={"correlation": {"mask_ratio": 0.25}}, loss={"correlation": {"weight": 0.0}})
    assert run(model.train(), build_batch(6)).focus_BN.all()


def test_hidden_pixels_do_not_reach_the_encoder_but_visible_ones_do() -> None:
    model, batch = build(model={"correlation": {"mask_ratio": 0.5}}).train(), build_batch(3)

    def look(change: str) -> Outputs:
        torch.manual_seed(4)
        hidden_BN = torch.rand(3, 16).argsort(1).argsort(1) < 8
        pixel = hidden_BN.view(3, 1, 4, 4).repeat_interleave(8, -1).repeat_interleave(8, -2)
        chosen = {"hidden": pixel, "visible": ~pixel, "nothing": torch.zeros_like(pixel)}[change]
        torch.manual_seed(4)
        out = run(model, batch._replace(image_BCYX=batch.image_BCYX + 3 * chosen))
        assert torch.equal(out.focus_BN, hidden_BN)
        return out

    clean, hidden, visible = look("nothing"), look("hidden"), look("visible")
    for name in ("image_BE", "observations_BKE", "z_BNE"):
        torch.testing.assert_close(getattr(hidden, name), getattr(clean, name), msg=name)
        assert not torch.allclose(getattr(visible, name), getattr(clean, name)), name
    assert not torch.allclose(hidden.target_BND, clean.target_BND), "the target must show what was hidden"


def test_patches_are_the_image_row_by_row() -> None:
    images = torch.randn(3, 1, 24, 16)
    expected = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
    assert torch.equal(patchify(images, 8), expected)


def test_targets_of_patch_features_carry_no_gradient() -> None:
    out = build(loss={"correlation": {"target": "features"}})(build_batch(2))
    assert out.target_BND.shape == (2, 16, 32)
    assert not out.target_BND.requires_grad
    assert out.z_BNE.requires_grad


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_other_image_sizes_work_by_interpolated_position_embeddings(stem: str) -> None:
    model = build(model={"vision": {"stem": stem}})
    with torch.no_grad():
        seen = model.encode_image(torch.randn(2, 1, 48, 64))
    assert seen.attention_BKN.shape == (2, 6, 48)
    assert_unit(seen.image_BE)


def test_recomputed_activations_give_the_same_gradients() -> None:
    def gradients(recompute: bool) -> dict[str, Tensor]:
        model = build(engine={"activation_checkpointing": recompute}).train()
        out = model(build_batch(4))
        (out.image_BE @ out.text_BE.T).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_a_temperature_at_its_cap_keeps_its_gradient() -> None:
    model = build(loss={"max_logit_scale": 100.0})
    with torch.no_grad():
        model.log_scale_instance.fill_(6.0)
    scales = model(build_batch(2)).logit_scales
    scales.sum().backward()
    assert scales[0].item() == pytest.approx(100.0)
    assert scales[1].item() == pytest.approx(1 / 0.07)
    assert model.log_scale_instance.grad is not None
    assert model.log_scale_instance.grad.item() > 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_images_are_pooled_as_configured(pooling: str) -> None:
    torch.manual_seed(0)
    config = build_tiny_config(model={"vision": {"pooling": pooling}}).model.vision
    encoder = build_image_encoder(config, 32).eval()
    image_BCYX = torch.randn(2, 1, 32, 32)
    tokens = encoder.vit.forward_features(image_BCYX)
    seen = encoder(image_BCYX)
    torch.testing.assert_close(seen.patches_BND, tokens[:, 1:])
    torch.testing.assert_close(seen.image_BD, tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1))


@pytest.mark.parametrize("architecture", ["vit_base_patch16_siglip_224", "vit_medium_patch16_reg4_gap_256"])
def test_an_encoder_without_a_class_token_pools_patches_alone(architecture: str) -> None:
    overrides = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    given = {"source": "scratch", "architecture": architecture, "overrides": overrides}
    with pytest.raises(UsageError, match=rf"{architecture} has no class token; set model\.vision\.pooling=mean"):
        build_image_encoder(VisionConfig(**given), 32)
    encoder = build_image_encoder(VisionConfig(**given, pooling="mean"), 32).eval()
    seen = encoder(torch.randn(2, 1, 32, 32))
    assert seen.patches_BND.shape == (2, 16, 32)
    torch.testing.assert_close(seen.image_BD, seen.patches_BND.mean(1))
    assert not [name for name in encoder.state_dict() if "attn_pool" in name], "nothing would train it"


def test_a_norm_that_timm_has_after_its_pooling_is_for_all_tokens(tmp_path: Path) -> None:
    shape = {**SHAPE, "in_chans": 1}
    vit = timm.create_model("eva02_tiny_patch14_224", num_classes=0, **shape).eval()
    torch.nn.init.normal_(vit.fc_norm.weight)
    timm.models.save_for_hf(vit, tmp_path / "vit", model_args=shape, safe_serialization=True)
    encoder = build_image_encoder(VisionConfig(source=str(tmp_path / "vit")), 32).eval()
    image_BCYX = torch.randn(2, 1, 32, 32)
    expected = vit.fc_norm(vit.forward_features(image_BCYX))
    torch.testing.assert_close(encoder(image_BCYX).patches_BND, expected[:, 1:])
    assert not [name for name in encoder.state_dict() if "fc_norm" in name]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_reports_are_pooled_as_configured(pooling: str) -> None:
    torch.manual_seed(0)
    encoder = build_report_encoder(
        build_tiny_config(model={"text": {"pooling": pooling}}).model.text, VOCAB, 160, "sdpa"
    ).eval()
    batch = build_batch(3)
    seen = encoder(batch.token_ids_BT, batch.attention_BT)
    for row, real in enumerate(batch.attention_BT):
        tokens_TD = seen.tokens_BTD[row, real]
        torch.testing.assert_close(seen.report_BD[row], tokens_TD[0] if pooling == "cls" else tokens_TD.mean(0))


def test_a_timm_folder_gives_its_weights_and_features(vit_folder: Path) -> None:
    encoder = build_image_encoder(VisionConfig(source=str(vit_folder)), 32).eval()
    theirs = timm.create_model(f"local-dir:{vit_folder}", pretrained=True).eval()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(encoder.vit.state_dict()[name], weight, msg=name)
    image_BCYX = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(encoder(image_BCYX).image_BD, theirs.forward_features(image_BCYX)[:, 0])


def test_a_timm_folder_for_colour_is_summed_to_grey(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SHAPE).eval()
    timm.models.save_for_hf(vit, tmp_path / "vit", model_args=SHAPE, safe_serialization=True)
    encoder = build_image_encoder(VisionConfig(source=str(tmp_path / "vit")), 32).eval()
    image_BCYX = torch.randn(2, 1, 32, 32)
    seen = vit.forward_features(image_BCYX.expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder(image_BCYX).image_BD, seen[:, 0], rtol=1e-4, atol=1e-5)


def test_a_timm_folder_is_read_at_another_image_size(vit_folder: Path) -> None:
    encoder = build_image_encoder(VisionConfig(source=str(vit_folder)), 64)
    assert encoder(torch.randn(1, 1, 64, 64)).patches_BND.shape == (1, 64, 32)


def test_a_hugging_face_folder_gives_its_weights_features_and_tokenizer(bert_folder: Path) -> None:
    tokenizer = ReportTokenizer.load(bert_folder)
    report = tokenizer.encode(["There is a small left effusion.", "No pneumothorax."])
    ids_BT, attention_BT, _, _ = tokenizer.collate([report])
    encoder = build_report_encoder(TextConfig(source=str(bert_folder)), tokenizer.vocab_size, 160, "sdpa").eval()
    theirs = BertModel.from_pretrained(bert_folder, add_pooling_layer=False).eval()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(encoder.encoder.state_dict()[name], weight), name
    expected = theirs(input_ids=ids_BT, attention_mask=attention_BT.long()).last_hidden_state
    torch.testing.assert_close(encoder(ids_BT, attention_BT).tokens_BTD, expected)
    assert tokenizer.hf.unk_token_id not in report.token_ids


def test_a_run_from_folders_is_loaded_without_them(vit_folder: Path, bert_folder: Path, tmp_path: Path) -> None:
    sources = {}
    for name, folder in (("vision", vit_folder), ("text", bert_folder)):
        shutil.copytree(folder, tmp_path / name)
        sources[name] = {"source": str(tmp_path / name)}
    vision = {**sources["vision"], "overrides": {}}
    config = build_tiny_config(model={"text": sources["text"]}, run={"dir": str(tmp_path / "run")})
    config = config.model_copy(update={"model": config.model.model_copy(update={"vision": VisionConfig(**vision)})})
    tokenizer = ReportTokenizer.load(tmp_path / "text", config.data.max_tokens, config.data.max_sentences)
    model, _ = build_model(config, tokenizer.vocab_size, CPU)
    run_dir = tmp_path / "run"
    write_definition(run_dir, config, model, tokenizer)
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "run.json").write_text(json.dumps({"mean": 0.5, "std": 0.2, "commit": "abc"}))
    saver = Saver(run_dir, TorchEngine(model, config, CPU), 1, 60)
    saver.save({"step": 1, "best_step": 1})
    saver.wait()
    shutil.rmtree(tmp_path / "vision")
    shutil.rmtree(tmp_path / "text")
    image_BCYX = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        seen = load_run(run_dir).model.encode_image(image_BCYX)
        torch.testing.assert_close(seen, model.eval().encode_image(image_BCYX))


def spoil(folder: Path, to: Path, how: str) -> Path:
    """A copy of an encoder folder with one thing wrong."""
    shutil.copytree(folder, to)
    weights, config = to / "model.safetensors", to / "config.json"
    if how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no config":
        config.unlink()
    elif how == "no folder":
        shutil.rmtree(to)
    return to


SPOILT = ["no weights", "cut weights", "no config", "no folder"]


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_image_encoder_is_wrong_use(how: str, vit_folder: Path, tmp_path: Path) -> None:
    source = str(spoil(vit_folder, tmp_path / "vit", how))
    with pytest.raises(UsageError, match=r"^model\.vision\.source=.*/vit") as caught:
        build_image_encoder(VisionConfig(source=source), 32)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_report_encoder_is_wrong_use(how: str, bert_folder: Path, tmp_path: Path) -> None:
    source = str(spoil(bert_folder, tmp_path / "bert", how))
    with pytest.raises(UsageError, match=r"^model\.text\.source=.*/bert") as caught:
        build_report_encoder(TextConfig(source=source), 10, 160, "sdpa")
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_another_image_architecture_are_wrong_use(vit_folder: Path) -> None:
    config = VisionConfig(source=str(vit_folder), overrides={"depth": 2})
    with pytest.raises(UsageError, match=r"model\.vision\.source=.*blocks\.1"):
        build_image_encoder(config, 32)


def test_weights_of_another_report_architecture_are_wrong_use(bert_folder: Path, tmp_path: Path) -> None:
    source = spoil(bert_folder, tmp_path / "bert", "nothing")
    vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
    other = DistilBertConfig(vocab_size=vocab_size, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    DistilBertModel(other).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", source)
    with pytest.raises(UsageError, match="the weights do not fit config.json"):
        build_report_encoder(TextConfig(source=str(source)), 10, 160, "sdpa")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 64}])
def test_a_config_that_is_larger_than_its_weights_is_wrong_use(change: dict, bert_folder: Path, tmp_path: Path) -> None:
    source = spoil(bert_folder, tmp_path / "bert", "nothing")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=r"^model\.text\.source="):
        build_report_encoder(TextConfig(source=str(source)), 10, 160, "sdpa")


def test_a_tokenizer_larger_than_the_encoder_is_wrong_use(bert_folder: Path) -> None:
    with pytest.raises(UsageError, match="the tokenizer has 5000 entries"):
        build_report_encoder(TextConfig(source=str(bert_folder)), 5000, 160, "sdpa")


@pytest.mark.parametrize(("kind", "positions"), [("bert", 20), ("distilbert", 20), ("roberta", 18)])
def test_reports_longer_than_the_encoder_has_positions_are_wrong_use(kind: str, positions: int, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    small = AutoConfig.for_model(kind, vocab_size=VOCAB, max_position_embeddings=20, **shape)
    AutoModel.from_config(small).save_pretrained(tmp_path)
    config = TextConfig(source=str(tmp_path))
    encoder = build_report_encoder(config, VOCAB, positions, "sdpa")
    longest_BT = torch.full((1, positions), 7)
    assert encoder(longest_BT, longest_BT > 0).tokens_BTD.shape[1] == positions
    with pytest.raises(UsageError, match=f"data.max_tokens={positions + 1}: .* has {positions} positions; lower it"):
        build_report_encoder(config, VOCAB, positions + 1, "sdpa")


def test_an_encoder_from_scratch_has_as_many_positions_as_reports_have_tokens() -> None:
    text = build_tiny_config().model.text
    longest_BT = torch.full((1, 600), 7)
    assert build_report_encoder(text, VOCAB, 600, "sdpa")(longest_BT, longest_BT > 0).tokens_BTD.shape[1] == 600
    assert build_report_encoder(text, VOCAB, 100, "sdpa").encoder.config.max_position_embeddings == 512


def test_a_conv_stem_is_refused_where_it_cannot_be(vit_folder: Path) -> None:
    with pytest.raises(UsageError, match="stem=conv needs"):
        build_image_encoder(VisionConfig(source=str(vit_folder), stem="conv"), 32)
    config = build_tiny_config(model={"vision": {"stem": "conv", "overrides": {"patch_size": 6}}})
    with pytest.raises(UsageError, match="needs a power of two"):
        build_image_encoder(config.model.vision, 36)


def test_without_a_block_the_correlation_head_does_not_see_the_report() -> None:
    batch = build_batch(4)
    other = batch._replace(token_ids_BT=batch.token_ids_BT.flip(0))
    bare, blind = {"correlation": {"depth": 0}}, {"correlation": {"depth": 0}, "vision": {"overrides": {"depth": 0}}}
    for sections, is_equal in ((bare, True), (blind, True), ({}, False)):
        model = build(model=sections)
        assert torch.equal(run(model, batch).z_BNE, run(model, other).z_BNE) == is_equal
