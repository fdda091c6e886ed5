"""An exported folder gives what the run gives, through transformers and timm, without what only clusters have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.conftest import build_config, write_data, write_run
from safetensors.torch import load_file, save_file
from test_package import BLOCKED, run_code

from place.cli import main
from place.config import Config, DetectionConfig, EvaluationConfig, RunError, UsageError, check_config
from place.data.images import scale_to_uint8
from place.data.transforms import eval_transform
from place.evaluation.suite import run_evaluation
from place.export import name_source, run_export
from place.pretrained.load import load_export
from place.training.checkpoint import LoadedRun, load_run

SENTENCES = [["There is no pleural effusion.", "Edema is seen."], ["Case same."]]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny", build_config(data_dir))
    run_evaluation(folder, data_dir, ["retrieval"])
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> Path:
    return run_export(run_dir, tmp_path_factory.mktemp("exports") / "tiny").folder


@pytest.fixture(scope="module")
def run(run_dir: Path) -> LoadedRun:
    return load_run(run_dir)


def change(config: Config, **vision: object) -> Config:
    """The configuration with other options of the image encoder."""
    tree = config.model_dump()
    tree["model"]["vision"].update(vision)
    return check_config(tree)


@torch.inference_mode()
def test_images_and_reports_have_the_features_of_the_run(run: LoadedRun, exported: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(exported)
    image_BCYX = torch.randn(3, 1, 32, 32)
    ids_BT, mask_BT, owner_BT, _ = run.tokenizer.collate([run.tokenizer.encode(report) for report in SENTENCES])
    output = model(image_BCYX, ids_BT, mask_BT, owner_BT)
    images, texts = run.model.encode_image(image_BCYX), run.model.encode_text(ids_BT, mask_BT, owner_BT)
    tokens = run.model.vision(image_BCYX)
    pairs = zip(output.to_tuple(), (tokens.patches_BND, tokens.image_BD, *images, *texts), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.get_image_features(image_BCYX), images.image_BE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.get_text_features(ids_BT, mask_BT, owner_BT), texts.text_BE, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_processor_and_tokenizer_prepare_what_the_run_reads(run: LoadedRun, exported: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    grey = np.random.default_rng(0).integers(0, 256, (70, 51), np.uint8)
    processor = AutoImageProcessor.from_pretrained(exported)
    expected = eval_transform(grey, 32, run.mean, run.std)
    for image in (grey, Image.fromarray(grey)):
        torch.testing.assert_close(processor(image, return_tensors="pt").pixel_values[0], expected, atol=0, rtol=0)
    deep = 16 * grey.astype(np.uint16) + 100
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32)), Image.fromarray(grey / np.float32(9))):
        assert image.mode in ("I;16", "I", "F")
        ranged = eval_transform(scale_to_uint8(grey, grey.min(), grey.max()), 32, run.mean, run.std)
        torch.testing.assert_close(processor(image, return_tensors="pt").pixel_values[0], ranged, atol=0, rtol=0)
    with pytest.raises(ValueError, match="expected a PIL image or a uint8 array"):
        processor(grey / 255)
    with pytest.raises(ValueError, match="pixels are not finite"):
        processor(Image.fromarray(np.full((40, 40), np.nan, np.float32)))
    given = AutoTokenizer.from_pretrained(exported)(["Edema is seen.", "Case same."], padding=True, return_tensors="pt")
    ids_BT, mask_BT, owner_BT, _ = run.tokenizer.collate(
        [run.tokenizer.encode([t]) for t in ("Edema is seen.", "Case same.")]
    )
    assert given.input_ids.equal(ids_BT)
    output = AutoModel.from_pretrained(exported)(input_ids=given.input_ids, attention_mask=given.attention_mask)
    expected_BSE = run.model.encode_text(ids_BT, mask_BT, owner_BT).sentences_BSE
    torch.testing.assert_close(output.sentence_embeds[:, 0], expected_BSE[:, 0], atol=1e-5, rtol=1e-5)


def test_the_model_refuses_to_encode_nothing(exported: Path) -> None:
    with pytest.raises(ValueError, match="nothing to encode"):
        load_export_model(exported)()


def load_export_model(folder: Path) -> torch.nn.Module:
    """The model as transformers gives it."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [
        ("vit_tiny_patch16_224", "cls"),
        ("vit_tiny_patch16_224", "mean"),
        ("vit_small_patch14_reg4_dinov2", "cls"),
        ("vit_medium_patch16_gap_256", "mean"),
        ("vit_base_patch16_siglip_224", "mean"),
        ("eva02_tiny_patch14_224", "cls"),
        ("eva02_tiny_patch14_224", "mean"),
    ],
)
@torch.inference_mode()
def test_timm_gives_the_summary_and_the_tokens_of_the_run(
    architecture: str, pooling: str, data_dir: Path, tmp_path: Path
) -> None:
    import timm

    config = change(build_config(data_dir), architecture=architecture, pooling=pooling)
    folder = write_run(tmp_path / "run", config)
    exported = run_export(folder, tmp_path / "export").folder / "timm"
    image_BCYX = torch.randn(2, 1, 32, 32)
    expected = load_run(folder).model.vision(image_BCYX)
    local = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert local.pretrained_cfg["mean"] == [0.4]
    arguments = json.loads((exported / "config.json").read_text())["model_args"]
    named = timm.create_model(architecture, checkpoint_path=str(exported / "model.safetensors"), **arguments).eval()
    for vit in (local, named):
        torch.testing.assert_close(vit(image_BCYX), expected.image_BD, atol=1e-5, rtol=1e-5)
        patches_BND = vit.forward_features(image_BCYX)[:, vit.num_prefix_tokens :]
        torch.testing.assert_close(patches_BND, expected.patches_BND, atol=1e-5, rtol=1e-5)


def test_a_stem_that_timm_does_not_have_is_told(data_dir: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", change(build_config(data_dir), stem="conv"))
    exported = run_export(folder, tmp_path / "export")
    assert exported.notes == [
        "timm: left out, as timm has no such stem (model.vision.stem=conv)",
        "no ONNX of the vision encoder: --onnx writes it",
    ]
    assert not (exported.folder / "timm").exists()
    image_BCYX = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        seen, expected = (load(path).model.vision(image_BCYX) for load, path in
                          ((load_export, exported.folder), (load_run, folder)))  # fmt: skip
    torch.testing.assert_close(seen.image_BD, expected.image_BD, atol=1e-5, rtol=1e-5)


LOAD = """
import sys
{first}
import place
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
folder = {folder!r}
kinds = [auto.from_pretrained(folder) for auto in (AutoConfig, AutoModel, AutoImageProcessor, AutoTokenizer)]
print(*(type(kind).__name__ for kind in kinds))
"""


@pytest.mark.parametrize("first", ["", "from transformers import AutoModel"])
def test_transformers_loads_it_after_import_place_without_ray_and_deepspeed(
    first: str, exported: Path, tmp_path: Path
) -> None:
    code = BLOCKED.format(blocked=("ray", "deepspeed", "streaming")) + LOAD.format(first=first, folder=str(exported))
    kinds = run_code(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n" + code, tmp_path)
    assert kinds == "PlaceConfig PlacePretrainedModel PlaceImageProcessor BertTokenizerFast"


def test_importing_place_imports_no_transformers(tmp_path: Path) -> None:
    code = "import sys, place; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def find_words(folder: Path, words: str) -> list[str]:
    """Files of a folder that hold some words, weights included."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [str(path.relative_to(folder)) for path in files if words.encode() in path.read_bytes()]


def test_the_card_has_origin_and_results_and_no_path(exported: Path, run_dir: Path, data_dir: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "f" * 64 in card
    assert "| optimiser step | 3 |" in card
    result = json.loads((run_dir / "evaluation" / "retrieval.json").read_text())
    assert json.loads((exported / "evaluation" / "retrieval.json").read_text()) == result
    metric = result["metrics"]["image_to_text.r_at_5"]
    assert f"| image_to_text.r_at_5 | {metric['value']:.3f} | {metric['low']:.3f} to {metric['high']:.3f} |" in card
    for path in (data_dir, run_dir.parent):
        assert find_words(exported, str(path)) == []


def test_results_of_another_checkpoint_are_not_in_the_card(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    path = copy / "evaluation" / "retrieval.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 2'))
    exported = run_export(copy, tmp_path / "export").folder
    assert not (exported / "evaluation").exists()
    assert "had not been evaluated" in (exported / "README.md").read_text()


def test_a_result_with_a_leak_says_so_in_the_card(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    path = copy / "evaluation" / "retrieval.json"
    tree = json.loads(path.read_text())
    tree["protocol"]["leaks"] |= {
        "found": {"pretraining.image": 7},
        "allowed": ["pretraining.image"],
        "not_checked": {"pretraining": f"{tmp_path}/my data/nih is not there; give the folder"},
    }
    tree["protocol"] |= {
        "decoder": f"weights of {tmp_path}/gpt2",
        "settings": {"chexbert": f"{tmp_path}/bert", "radgraph": None, "steps": 3},
        "peers": [{"source": "https://example.org/a/b, table 2"}],
    }
    path.write_text(json.dumps(tree))
    exported = run_export(copy, tmp_path / "export").folder
    card = (exported / "README.md").read_text()
    told = card.split("### retrieval")[1].split("| measure")[0].splitlines()
    assert told[-4:] == [
        "",
        "- leak allowed: pretraining.image, 7 of them",
        "- no check against pretraining",
        "",
    ]
    assert find_words(exported, str(tmp_path)) == []
    protocol = json.loads((exported / "evaluation" / "retrieval.json").read_text())["protocol"]
    assert protocol["leaks"]["not_checked"] == {"pretraining": "nih is not there; give the folder"}
    assert protocol["decoder"] == "weights of gpt2"
    assert protocol["settings"] == {"chexbert": "bert", "radgraph": None, "steps": 3}
    assert protocol["peers"] == tree["protocol"]["peers"]


def test_a_result_of_folds_is_not_called_one_of_the_test_split(run_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    leaks = ("pretraining.patient", "pretraining.image", "selection.image")
    folded = EvaluationConfig(
        bootstrap=0, folds=3, allow_leaks=leaks, detection=DetectionConfig(max_steps=2, look_every_steps=2)
    )
    run_evaluation(copy, data_dir, ["detection"], evaluation=folded)
    card = (run_export(copy, tmp_path / "export").folder / "README.md").read_text()
    assert re.search(r"### detection: \d+ images, images of all splits, in 3 folds of patients", card)
    assert "### retrieval: " in card
    assert "split 'test'" in card.split("### retrieval: ")[1].split("\n")[0]


def test_sources_are_named_without_the_machine_s_folders(tmp_path: Path) -> None:
    assert name_source(str(tmp_path / "bert")) == "folder bert"
    assert name_source("timm:vit_base_patch16_224") == "timm:vit_base_patch16_224"


def test_the_verb_exports_and_refuses_a_folder_that_is_taken(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--run", str(run_dir), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "transformers.AutoModel loads it" in said
    assert "no ONNX of the vision encoder: --onnx writes it" in said
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_folder_that_it_runs_in_is_no_output(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--run", str(run_dir), "--output", "."]) == 2
    said = capsys.readouterr().err
    assert said == "place export: --output . is the folder that this runs in; give a new one\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="give a folder that can be written"):
        run_export(run_dir, tmp_path / "file" / "out")


def test_an_export_that_fails_leaves_nothing_behind(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("place.export.write_timm", fail)
    with pytest.raises(RunError, match="No space left"):
        run_export(run_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_weights_are_refused(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights.pop("place.observe.queries")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="some are missing"):
        load_export(copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="export the run again"):
        load_export(copy)
    with pytest.raises(UsageError, match="is no exported model"):
        load_export(tmp_path)
