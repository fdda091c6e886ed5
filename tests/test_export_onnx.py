"""The ONNX file gives what torch gives, at any batch, and is not kept where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation.conftest import build_config, write_data, write_run
from test_export import change

from place import export_onnx
from place.config import RunError, UsageError
from place.export import ONNX, run_export
from place.training.checkpoint import load_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the demo's stem and pooling."""
    data_dir = write_data(tmp_path_factory.mktemp("data"))
    config = change(build_config(data_dir), stem="conv", pooling="mean")
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", config)


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = run_export(run_dir, tmp_path_factory.mktemp("exports") / "tiny", with_onnx=True)
    assert any(note.startswith("onnx/vision.onnx: opset 18, any batch; at most ") for note in made.notes)
    return made.folder


@torch.inference_mode()
def test_onnxruntime_gives_summary_and_patches_of_the_run_at_any_batch(run_dir: Path, exported: Path) -> None:
    import onnx
    import onnxruntime

    assert onnx.load(exported / ONNX).opset_import[0].version == export_onnx.OPSET
    session = onnxruntime.InferenceSession(str(exported / ONNX), providers=["CPUExecutionProvider"])
    vision = load_run(run_dir).model.vision
    for batch in (1, 2, 5):
        image_BCYX = torch.randn(batch, 1, 32, 32)
        found = session.run(["image", "patches"], {"pixel_values": image_BCYX.numpy()})
        for ours, theirs in zip(found, vision(image_BCYX), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=0)
    assert "onnx/vision.onnx" in (exported / "README.md").read_text()


def test_other_weights_are_seen(run_dir: Path, exported: Path) -> None:
    traced = export_onnx._Traced(load_run(run_dir).model.vision)
    assert export_onnx.compute_error(traced, 32, exported / ONNX) < export_onnx.MAX_ERROR
    with torch.no_grad():
        for weight in traced.parameters():
            weight.mul_(1.1)
    assert export_onnx.compute_error(traced, 32, exported / ONNX) > 1e-3


def test_an_error_of_one_output_alone_is_seen(run_dir: Path, exported: Path) -> None:
    class Shifted(torch.nn.Module):
        def forward(self, image_BCYX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            image_BD, patches_BND = traced(image_BCYX)
            return image_BD, patches_BND + 0.5

    traced = export_onnx._Traced(load_run(run_dir).model.vision).eval()
    assert export_onnx.compute_error(Shifted(), 32, exported / ONNX) == pytest.approx(0.5, abs=1e-3)


def test_a_file_that_differs_from_torch_is_not_kept(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx, "MAX_ERROR", -1.0)
    with pytest.raises(RunError, match="vision.onnx: onnxruntime differs from torch by"):
        run_export(run_dir, tmp_path / "out", with_onnx=True)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_one_line(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(
        UsageError, match=r"--onnx needs onnxruntime; run `pip install -c constraints.txt -e .\[onnx\]`"
    ):
        run_export(run_dir, tmp_path / "out", with_onnx=True)
