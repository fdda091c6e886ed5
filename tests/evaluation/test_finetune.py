"""Full fine-tune: it learns what a frozen random encoder does not show, on the probe's subsets, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.test_foreign import OPTIONS, save_hf, save_timm
from scipy.special import expit

from place.config import AugmentConfig, EvaluationConfig, FinetuneConfig, UsageError
from place.data.prepared import read_card, read_samples
from place.evaluation.classification import run_classification
from place.evaluation.finetune import Classifier, compute_loss, group_parameters, plan_schedule, run_finetune, score
from place.evaluation.foreign import load_foreign
from place.evaluation.frozen import FrozenEncoder, wrap_run
from place.evaluation.suite import choose_tasks, run_encoder_evaluation
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run

SETTINGS = FinetuneConfig(max_steps=150, lr=3e-3, augment=AugmentConfig(rotation_deg=0))


def build_task(run_dir: Path, data_dir: Path, split: str = "test") -> Task:
    options = EvaluationConfig(bootstrap=20, label_shares=(0.5, 1.0), label_subsets=1, finetune=SETTINGS)
    return Task(TaskInput(load_run(run_dir, "latest"), data_dir, read_card(data_dir), split, options))


@pytest.fixture(scope="module")
def timm_encoder(tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    folder = tmp_path_factory.mktemp("timm") / "vit"
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 64, "num_classes": 0}
    save_timm(folder, "vit_tiny_patch16_224", **arguments)
    return load_foreign(str(folder))


@pytest.fixture(scope="module")
def hf_encoder(tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    folder = tmp_path_factory.mktemp("hf") / "vit"
    save_hf(folder, with_pooler=False)
    return load_foreign(str(folder))


def test_the_whole_encoder_learns_on_the_subsets_of_the_probe_and_leaves_the_run_alone(
    run_dir: Path, data_dir: Path
) -> None:
    task = build_task(run_dir, data_dir)
    before = {name: weight.clone() for name, weight in task.encoder.vision.state_dict().items()}
    tuned, frozen = run_finetune(task), run_classification(task)
    assert all(torch.equal(weight, before[name]) for name, weight in task.encoder.vision.state_dict().items())
    assert list(tuned.metrics) == list(frozen.metrics)
    assert tuned.metrics["auroc.effusion"].value > max(0.9, frozen.metrics["auroc.effusion"].value)
    for share in ("100 %", "50 %"):
        ours, theirs = (result.protocol["shares"][share] for result in (tuned, frozen))
        assert (ours["images"], ours["patients"]) == (theirs["images"], theirs["patients"])
        assert ours["step"][0] > 0
    assert tuned.rows is not None
    assert frozen.rows is not None
    for column in ("sample_id", "finding", "label", "share"):
        assert list(tuned.rows[column]) == list(frozen.rows[column])


def test_the_split_that_is_trained_on_is_refused(run_dir: Path, data_dir: Path) -> None:
    with pytest.raises(UsageError, match="finetune: split 'train' is what the encoder is trained on"):
        run_finetune(build_task(run_dir, data_dir, "train"))


def test_lower_layers_learn_slower_and_norms_biases_and_positions_do_not_decay(timm_encoder: FrozenEncoder) -> None:
    model = Classifier(timm_encoder, 3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in group_parameters(model, FinetuneConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
        for parameter in group["params"]
    }
    assert set(found) == set(names.values())
    assert found["head.weight"] == (1, 0.1)
    assert found["head.bias"] == (1, 0)
    assert found["vision.model.blocks.1.attn.qkv.weight"] == (0.5, 0.1)
    assert found["vision.model.blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert found["vision.model.blocks.0.norm1.weight"] == (0.25, 0)
    assert found["vision.model.patch_embed.proj.weight"] == (0.125, 0.1)
    assert found["vision.model.pos_embed"] == found["vision.model.cls_token"] == (0.125, 0)


def test_layers_that_only_timm_counts_learn_slower_too(hf_encoder: FrozenEncoder, run_dir: Path) -> None:
    for encoder in (hf_encoder, wrap_run(load_run(run_dir, "latest"), "run")):
        model = Classifier(encoder, 3)
        groups = group_parameters(model, FinetuneConfig(lr=1.0, layer_decay=0.5))
        chosen = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(chosen) == sorted(id(parameter) for parameter in model.parameters())
        assert len({group["lr"] for group in groups}) > 1
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert rates[id(model.head.weight)] == 1 == max(rates.values())
        first = next(parameter for parameter in model.parameters() if parameter.ndim > 1)
        assert rates[id(first)] == min(rates.values())


def test_images_without_augmentation_are_those_of_the_evaluation(timm_encoder: FrozenEncoder, data_dir: Path) -> None:
    jpegs = [sample["image"] for sample in read_samples(data_dir, "test")][:3]
    still = AugmentConfig(crop_scale_min=1, rotation_deg=0, intensity=0)
    seen, drawn = timm_encoder.read_images(jpegs), timm_encoder.draw_images(jpegs, still, np.random.default_rng(0))
    assert seen.shape == drawn.shape == (3, 3, 64, 64)
    torch.testing.assert_close(drawn, seen)
    gap = (seen.mean((0, 2, 3)) - drawn.mean((0, 2, 3))).abs()
    assert gap.max() < 0.15
    assert (seen[:, 0].mean() - seen[:, 2].mean()).abs() > 0.3  # channels have means and deviations of their own


def test_unknown_labels_count_nowhere_in_the_loss() -> None:
    logit_BF = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    target_BF = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    parts = torch.nn.functional.softplus(torch.tensor([-2.0, 0.5, -3.0]))
    assert compute_loss(logit_BF, target_BF, False) == pytest.approx(float(parts.mean()))
    assert compute_loss(logit_BF, target_BF.fill_(float("nan")), False) == 0


def test_scores_of_classes_are_log_odds_of_the_softmax() -> None:
    logit_BF = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(expit(score(logit_BF, True)), logit_BF.softmax(1), rtol=1e-5)
    np.testing.assert_allclose(score(logit_BF, False), logit_BF)
    one_hot = torch.eye(4)[:3]
    entropy = -logit_BF[:3].log_softmax(1).diagonal().mean()
    assert compute_loss(logit_BF[:3], one_hot, True) == pytest.approx(float(entropy))


def test_images_with_an_unknown_label_count_nowhere_in_the_loss_of_classes() -> None:
    logit_BF = torch.zeros(3, 3)
    target_BF = torch.tensor([[1.0, 0, 0], [float("nan")] * 3, [0, 1, float("nan")]])
    assert compute_loss(logit_BF, target_BF, True) == pytest.approx(1.0986123)  # the logarithm of three
    assert compute_loss(logit_BF, target_BF.fill_(float("nan")), True) == 0


@pytest.mark.parametrize(("images", "every"), [(10, 25), (3200, 100), (100_000, 250)])
def test_validation_is_looked_at_once_an_epoch_within_bounds(images: int, every: int) -> None:
    assert plan_schedule(FinetuneConfig(batch_size=32), images).every == every
    assert plan_schedule(FinetuneConfig(max_steps=7), images).every == 7


def test_it_runs_by_name_only() -> None:
    offers = {"labels", "training labels"}
    assert "finetune" not in choose_tasks(["all"], offers)
    assert "finetune" in choose_tasks(["all", "finetune"], offers)
    assert choose_tasks(["finetune"], offers) == ["finetune"]


def test_any_encoder_is_fine_tuned_by_the_same_command(data_dir: Path, tmp_path: Path) -> None:
    save_hf(tmp_path / "hf", with_pooler=True)
    settings = {"label_shares": (0.1, 1.0), "label_subsets": 2, "finetune": FinetuneConfig(max_steps=2)}
    run_encoder_evaluation(
        str(tmp_path / "hf"), data_dir, ["finetune"], tmp_path / "out", evaluation=OPTIONS.model_copy(update=settings)
    )
    tree = json.loads((tmp_path / "out/finetune.json").read_text())
    assert 0 <= tree["metrics"]["mean_auroc"]["value"] <= 1
    assert tree["protocol"]["settings"]["layer_decay"] == 0.75
    shares = tree["protocol"]["shares"]
    assert shares["100 %"]["passes"] == [0.8]
    assert shares["10 %"]["passes"] == [2.0, 2.0]  # a batch of all its images
    assert tree["protocol"]["notes"] == [
        "100 % of the labels: trained on 64 draws of 80 images, less than once through them; "
        "raise evaluation.finetune.max_steps"
    ]
