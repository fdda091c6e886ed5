"""Encoders of timm and Hugging Face and our export: features as their own library gives them, judged by one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from place.cli import main
from place.compat import patch_torchvision
from place.config import EvaluationConfig, RunError, UsageError
from place.data.prepared import read_samples
from place.evaluation.foreign import find_kind, load_foreign
from place.evaluation.frozen import wrap_run
from place.evaluation.suite import run_encoder_evaluation, run_evaluation
from place.export import run_export
from place.pretrained.load import load_export
from place.training.checkpoint import load_run

SIZE_PX = 64
OPTIONS = EvaluationConfig(bootstrap=10, batch_size=32, label_shares=(0.5, 1.0), label_subsets=1)


def save_timm(folder: Path, name: str, **arguments: object) -> torch.nn.Module:
    """A timm model with weights drawn here, as its hub format."""
    patch_torchvision()
    import timm

    torch.manual_seed(1)
    model = timm.create_model(name, **arguments).eval()
    data = {"input_size": (3, SIZE_PX, SIZE_PX), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True, data_config=data)
    return model


@pytest.fixture(scope="module")
def timm_vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm") / "vit"
    arguments = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 16, "img_size": SIZE_PX, "num_classes": 5}
    return folder, save_timm(folder, "vit_tiny_patch16_224", **arguments)


@pytest.fixture(scope="module")
def timm_resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm") / "resnet"
    return folder, save_timm(folder, "resnet10t", num_classes=0)


def save_hf(folder: Path, with_pooler: bool) -> torch.nn.Module:
    """A Hugging Face ViT with weights drawn here."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(2)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(image_size=SIZE_PX, patch_size=16, **sizes), add_pooling_layer=with_pooler).eval()
    model.save_pretrained(folder, safe_serialization=True)
    about = {"size": {"height": SIZE_PX, "width": SIZE_PX}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return model


@pytest.fixture(scope="module")
def hf_vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "vit"
    return folder, save_hf(folder, with_pooler=True)


@pytest.fixture(scope="module")
def jpegs(data_dir):
    return [sample["image"] for sample in read_samples(data_dir, "test")][:3]


@torch.inference_mode()
def test_a_timm_vit_gives_its_own_features_and_no_prefix_token(timm_vit, jpegs):
    folder, model = timm_vit
    encoder = load_foreign(f"timm:{folder}")
    images = encoder.read_images(jpegs)
    torch.testing.assert_close(encoder.encode_images(jpegs), model.forward_head(model.forward_features(images), True))
    torch.testing.assert_close(encoder.encode_patches(jpegs), model.forward_features(images)[:, 1:])
    assert (encoder.size_px, encoder.channels, encoder.patch_px) == (SIZE_PX, 3, 16)


@torch.inference_mode()
def test_a_timm_resnet_gives_its_last_feature_map_row_by_row(timm_resnet, jpegs):
    folder, model = timm_resnet
    encoder = load_foreign(str(folder))
    images = encoder.read_images(jpegs)
    torch.testing.assert_close(encoder.encode_images(jpegs), model(images))
    map_BDYX = model.forward_features(images)
    patches_BND = encoder.encode_patches(jpegs)
    assert encoder.patch_px == 32
    torch.testing.assert_close(patches_BND[:, 1], map_BDYX[:, :, 0, 1])
    torch.testing.assert_close(patches_BND[:, 2], map_BDYX[:, :, 1, 0])


def test_grey_is_standardised_by_each_channels_own_figures(timm_resnet, jpegs):
    images = load_foreign(f"timm:{timm_resnet[0]}").read_images(jpegs)
    grey = images[:, 0] * 0.2 + 0.4
    torch.testing.assert_close(images[:, 1] * 0.3 + 0.5, grey)
    torch.testing.assert_close(images[:, 2] * 0.4 + 0.6, grey)
    assert 0 <= float(grey.min()) < float(grey.max()) <= 1


@torch.inference_mode()
def test_a_hugging_face_vit_gives_its_own_features(hf_vit, jpegs):
    folder, model = hf_vit
    encoder = load_foreign(f"hf:{folder}")
    output = model(encoder.read_images(jpegs))
    torch.testing.assert_close(encoder.encode_images(jpegs), output.pooler_output)
    torch.testing.assert_close(encoder.encode_patches(jpegs), output.last_hidden_state[:, 1:])
    assert encoder.mean == (0.5, 0.5, 0.5)


@torch.inference_mode()
def test_a_pooler_that_was_never_trained_is_not_used(tmp_path, jpegs):
    model = save_hf(tmp_path / "bare", with_pooler=False)
    encoder = load_foreign(f"hf:{tmp_path / 'bare'}")
    output = model(encoder.read_images(jpegs))
    torch.testing.assert_close(encoder.encode_images(jpegs), output.last_hidden_state[:, 0])


def test_features_of_an_image_do_not_depend_on_its_batch(timm_resnet, jpegs):
    encoder = load_foreign(f"timm:{timm_resnet[0]}")
    torch.testing.assert_close(encoder.encode_images(jpegs)[:1], encoder.encode_images(jpegs[:1]), rtol=1e-5, atol=1e-5)


def test_our_export_is_judged_as_the_run_it_came_from(run_dir, data_dir, tmp_path):
    folder = run_export(run_dir, tmp_path / "export").folder
    names = ["zero_shot", "retrieval", "classification"]
    results = run_encoder_evaluation(str(folder), data_dir, names, tmp_path / "out", "test", OPTIONS)
    direct = run_evaluation(run_dir, data_dir, names, evaluation=OPTIONS, output=tmp_path / "direct")
    assert {name: result.metrics for name, result in results.items()} == {
        name: result.metrics for name, result in direct.items()
    }
    tree = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert tree["encoder"] == {"name": "export export", "weights": wrap_run(load_run(run_dir), "run").weights}
    assert (tree["checkpoint"]["step"], tree["commit"]) == (3, "c0ffee")


def test_a_foreign_encoder_is_judged_on_images_and_says_why_not_on_reports(timm_vit, data_dir, tmp_path, capsys):
    settings = ["evaluation.bootstrap=0", "evaluation.label_shares=[1.0]", "evaluation.batch_size=64"]
    settings += ["evaluation.generation.steps=20", "evaluation.generation.width=32"]
    settings += ["evaluation.segmentation.max_steps=50", "evaluation.detection.max_steps=50"]
    words = ["evaluate", "--encoder", f"timm:{timm_vit[0]}", "--data", str(data_dir), "--output", str(tmp_path)]
    assert main([*words, *settings]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("zero shot", "retrieval", "grounding"):
        assert f"{name}: not applicable, needs a report encoder" in shown
    written = {path.stem for path in tmp_path.glob("*.json")}
    assert written >= {"classification", "pixel_probe", "segmentation", "detection", "generation"}
    assert written.isdisjoint({"zero_shot", "retrieval", "grounding"})
    tree = json.loads((tmp_path / "segmentation.json").read_text())
    assert tree["encoder"] == {"name": "timm:vit", "weights": load_foreign(str(timm_vit[0])).weights}
    assert "timm:vit" in (tmp_path / "report.html").read_text()


def test_the_hash_is_of_the_weights(timm_vit, tmp_path):
    folder = timm_vit[0]
    same = load_foreign(f"timm:{folder}").weights
    weights = load_file(folder / "model.safetensors")
    weights["norm.bias"] = weights["norm.bias"] + 1
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors")
    assert load_foreign(f"timm:{folder}").weights == same
    assert load_foreign(f"timm:{tmp_path}").weights != same


def test_random_weights_are_a_baseline_by_name_and_seed(timm_vit, hf_vit, jpegs):
    for source in (f"timm:{timm_vit[0]}", f"hf:{hf_vit[0]}"):
        drawn, again = (load_foreign(source, random_weights=True) for _ in range(2))
        assert drawn.name.endswith("(random weights)")
        np.testing.assert_array_equal(drawn.encode_images(jpegs), again.encode_images(jpegs))
        assert drawn.weights != load_foreign(source).weights


def test_pickled_weights_are_not_read(timm_vit, tmp_path):
    (tmp_path / "config.json").write_bytes((timm_vit[0] / "config.json").read_bytes())
    torch.save(load_file(timm_vit[0] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no model\.safetensors; other formats are not read"):
        load_foreign(f"timm:{tmp_path}")


def test_weights_that_lack_a_tensor_are_refused(hf_vit, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((hf_vit[0] / name).read_bytes())
    weights = load_file(hf_vit[0] / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 tensors of the model, such as layernorm\.bias"):
        load_foreign(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:no_such_model", "no_such_model.*--random-weights"),
        ("nowhere", "no encoder was found there; give timm:NAME"),
        ("resnet50", "no encoder was found there"),
    ],
)
def test_an_encoder_that_is_not_there_is_one_line(source, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_foreign(source)
    assert "\n" not in str(caught.value)


def test_each_kind_of_folder_is_told_apart(timm_vit, hf_vit):
    assert find_kind(str(timm_vit[0]))[0] == "timm"
    assert find_kind(str(hf_vit[0]))[0] == "hf"
    assert find_kind("timm:resnet50") == ("timm", "resnet50")


def test_a_report_task_by_name_is_wrong_use(timm_vit, data_dir, tmp_path):
    with pytest.raises(UsageError, match="'retrieval' needs a report encoder"):
        run_encoder_evaluation(f"timm:{timm_vit[0]}", data_dir, ["retrieval"], tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "timm:resnet18"], "--output is needed with --encoder"),
        (["--encoder", "timm:resnet18", "--output", "x", "--checkpoint", "latest"], "--checkpoint goes with --run"),
        (["--run", "x", "--random-weights"], "--random-weights goes with --encoder"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(words, message, capsys):
    assert main(["evaluate", *words, "--data", "data"]) == 2
    assert message in capsys.readouterr().err


def test_options_of_an_export_are_laid_over_its_own_way_to_be_judged(run_dir, data_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    own = {"findings": ["edema"], "label_shares": [1.0], "segmentation_head": "upernet", "prompts": "/secret/p.yaml"}
    config["evaluation"] |= own | {"generation": {"width": 64, "decoder": "/secret/gpt"}}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    folder = run_export(copy, tmp_path / "export").folder
    assert "/secret" not in (folder / "config.json").read_text()
    kept = load_export(folder).config.evaluation
    assert (kept.label_shares, kept.segmentation_head, kept.generation.width) == ((1.0,), "upernet", 64)
    words = ["evaluate", "--encoder", str(folder), "--data", str(data_dir), "--output", str(tmp_path / "out")]
    assert main([*words, "--tasks", "zero_shot", "evaluation.batch_size=8"]) == 0
    metrics = json.loads((tmp_path / "out" / "zero_shot.json").read_text())["metrics"]
    assert "auroc.edema" in metrics
    assert "auroc.effusion" not in metrics


def test_the_split_that_an_export_was_trained_on_is_refused(run_dir, data_dir, tmp_path):
    folder = run_export(run_dir, tmp_path / "export").folder
    with pytest.raises(RunError, match=r"allow_leaks=\[pretraining.patient,pretraining.image\]"):
        run_encoder_evaluation(str(folder), data_dir, ["retrieval"], tmp_path / "out", "train", OPTIONS)


def test_a_page_shows_no_attention_of_another_encoder(run_dir, timm_vit, data_dir, tmp_path):
    title, page = "Where the observation (V-POR) that a sentence is paired with looks", tmp_path / "report.html"
    run_evaluation(run_dir, data_dir, ["retrieval"], evaluation=OPTIONS, output=tmp_path)
    assert title in page.read_text()
    run_encoder_evaluation(str(timm_vit[0]), data_dir, ["pixel_probe"], tmp_path, evaluation=OPTIONS)
    assert (tmp_path / "explain.png").is_file()
    assert title not in page.read_text()
