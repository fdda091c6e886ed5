"""Segmentation with the encoder trained: masks move with their image, all of it learns, the run stays as it is."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from evaluation.test_foreign import save_timm

from place.config import AugmentConfig, EvaluationConfig, FinetuneConfig, UsageError
from place.data.prepared import read_card
from place.evaluation.finetune import group_parameters
from place.evaluation.finetune_segmentation import Segmenter, run_finetune_segmentation
from place.evaluation.foreign import load_foreign
from place.evaluation.frozen import FrozenEncoder, wrap_run
from place.evaluation.segmentation import run_segmentation
from place.evaluation.suite import choose_tasks, run_evaluation
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run

SETTINGS = FinetuneConfig(max_steps=150, lr=3e-3, augment=AugmentConfig(rotation_deg=5))


def build_task(run_dir: Path, data_dir: Path, split: str = "test", **options: object) -> Task:
    evaluation = EvaluationConfig(bootstrap=20, batch_size=16, finetune=SETTINGS, **options)
    return Task(TaskInput(load_run(run_dir), data_dir, read_card(data_dir), split, evaluation))


def test_a_mask_is_cropped_and_turned_with_its_image(run_dir: Path) -> None:
    encoder = wrap_run(load_run(run_dir), "run")
    mask_YX = np.zeros((72, 64), bool)
    mask_YX[30:50, 14:40] = True
    jpeg = cv2.imencode(".png", np.where(mask_YX, 250, 5).astype(np.uint8))[1].tobytes()
    augment = AugmentConfig(crop_scale_min=0.5, rotation_deg=30, intensity=0)
    rng, seen = np.random.default_rng(0), []
    for _ in range(20):
        images, masks_BFYX = encoder.draw_masked([jpeg], [[mask_YX, None]], augment, rng)
        assert masks_BFYX.shape == (1, 2, 32, 32)
        assert not masks_BFYX[0, 1].any()
        grey = images[0, 0] * encoder.std[0] + encoder.mean[0]
        assert ((grey > 0.5) == masks_BFYX[0, 0]).float().mean() > 0.98
        seen.append(int(masks_BFYX.sum()))
    assert len(set(seen)) > 10, "nothing was drawn"
    drawn, masked = (np.random.default_rng(1) for _ in range(2))
    torch.testing.assert_close(
        encoder.draw_images([jpeg], augment, drawn), encoder.draw_masked([jpeg], [[mask_YX]], augment, masked)[0]
    )


def test_what_lies_beyond_the_border_is_no_mask(run_dir: Path) -> None:
    encoder = wrap_run(load_run(run_dir), "run")
    full_YX = np.ones((64, 64), bool)
    jpeg = cv2.imencode(".png", np.full((64, 64), 200, np.uint8))[1].tobytes()
    turned = AugmentConfig(crop_scale_min=1, rotation_deg=45, intensity=0)
    rng = np.random.default_rng(0)
    shares = [float(encoder.draw_masked([jpeg], [[full_YX]], turned, rng)[1].float().mean()) for _ in range(8)]
    assert min(shares) < 0.9


def test_the_whole_encoder_learns_masks_and_leaves_the_run_alone(run_dir: Path, data_dir: Path) -> None:
    task = build_task(run_dir, data_dir)
    before = {name: weight.clone() for name, weight in task.encoder.vision.state_dict().items()}
    tuned, frozen = run_finetune_segmentation(task), run_segmentation(task)
    assert all(torch.equal(weight, before[name]) for name, weight in task.encoder.vision.state_dict().items())
    assert list(tuned.metrics) == list(frozen.metrics)
    assert tuned.metrics["dice.effusion"].value > 0.7
    assert "all of it trained" in tuned.protocol["score"]
    assert tuned.protocol["settings"]["layer_decay"] == 0.75
    assert tuned.protocol["findings"] == frozen.protocol["findings"]
    assert tuned.rows is not None
    assert frozen.rows is not None
    for column in ("sample_id", "finding"):
        assert list(tuned.rows[column]) == list(frozen.rows[column])


def test_folds_and_upernet_work_too(run_dir: Path, data_dir: Path) -> None:
    found = run_finetune_segmentation(build_task(run_dir, data_dir, folds=3, segmentation_head="upernet"))
    assert found.num_samples == 80 + 40 + 41
    assert found.metrics["dice.effusion"].value > 0.5
    assert found.protocol["score"].startswith("UperNet head")


@pytest.mark.parametrize("kind", ["setr", "upernet"])
def test_the_head_learns_fastest_and_every_weight_once(kind: str, run_dir: Path, tmp_path: Path) -> None:
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 64, "num_classes": 0}
    save_timm(tmp_path / "vit", "vit_tiny_patch16_224", **arguments)
    encoders: list[FrozenEncoder] = [load_foreign(str(tmp_path / "vit")), wrap_run(load_run(run_dir), "run")]
    for encoder in encoders:
        model = Segmenter(encoder, 2, kind)
        assert all(weight.requires_grad for weight in model.parameters())
        groups = group_parameters(model, FinetuneConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
        rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
        assert sorted(rates) == sorted(id(weight) for weight in model.parameters())
        assert sum(len(group["params"]) for group in groups) == len(rates)
        assert {rates[id(weight)] for weight in model.head.parameters()} == {1.0}
        assert max(rates[id(weight)] for weight in model.vision.parameters()) < 1
        decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
        assert all(decays[id(weight)] == 0 for weight in model.head.parameters() if weight.ndim == 1)


def test_it_runs_by_name_only_and_has_a_table_and_a_picture(run_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    assert "finetune_segmentation" not in choose_tasks(["all"], {"training masks"})
    few = EvaluationConfig(bootstrap=20, finetune=FinetuneConfig(max_steps=4))
    run_evaluation(run_dir, data_dir, ["finetune_segmentation"], evaluation=few, output=tmp_path)
    assert {"finetune_segmentation.json", "finetune_segmentation.parquet", "finetune_segmentation.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    page = (tmp_path / "report.html").read_text()
    assert "Masks, encoder fine-tuned" in page


def test_the_split_that_is_trained_on_is_refused(run_dir: Path, data_dir: Path) -> None:
    with pytest.raises(UsageError, match="finetune_segmentation: split 'train' is trained on"):
        run_finetune_segmentation(build_task(run_dir, data_dir, "train"))
