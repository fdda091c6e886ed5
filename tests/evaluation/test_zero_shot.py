"""Zero-shot: features that mean what the prompt says are found, whatever else is in the split."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import normalize

from place.config import EvaluationConfig, check_config
from place.evaluation.encoder import EncodedSplit
from place.evaluation.prompts import FindingPrompts
from place.evaluation.table import print_results
from place.evaluation.task import Task, TaskInput
from place.evaluation.zero_shot import choose_headline, run_zero_shot, score_findings
from place.model.place import TextFeatures
from place.training.checkpoint import load_run

PROMPTS = {"edema": FindingPrompts(["wet", "soaked"], ["dry"], "file")}
MEANING = {"wet": [1.0, 0, 0], "soaked": [0.9, 0.1, 0], "dry": [0, 1.0, 0]}


def encode(sentences) -> TextFeatures:
    text_PE = normalize(torch.tensor([MEANING[item] for item in sentences]), dim=-1)
    return TextFeatures(text_PE, text_PE[:, None], torch.ones(len(text_PE), 1, dtype=torch.bool))


def build_split(target) -> EncodedSplit:
    image_BE = torch.tensor([MEANING["wet"] if wet else MEANING["dry"] for wet in target])
    observations_BKE = torch.stack([torch.tensor([[0, 0, 1.0]]).expand(len(target), -1), image_BE], dim=1)
    return EncodedSplit(
        [], np.arange(len(target)), image_BE, observations_BKE, image_BE, image_BE[:, None], torch.ones(1, 1)
    )


@pytest.mark.parametrize("mode", ["instance", "pathology", "combined"])
def test_images_that_say_the_finding_score_above_those_that_deny_it(mode):
    score = score_findings(build_split([1, 0, 1]), PROMPTS, encode)[mode][:, 0]
    assert score[0] == score[2] > 0.5
    assert score[1] < -0.5


def test_a_score_does_not_depend_on_the_other_studies():
    alone, together = (score_findings(build_split(target), PROMPTS, encode) for target in ([1], [1, 0, 0, 0]))
    for mode, score in alone.items():
        torch.testing.assert_close(score[0], together[mode][0])


def test_the_pathology_score_needs_one_observation_only():
    split = build_split([1])._replace(image_BE=torch.tensor([[0, 0, 1.0]]))
    scores = score_findings(split, PROMPTS, encode)
    assert scores["instance"].item() == 0
    assert scores["pathology"].item() > 0.9
    assert scores["combined"].item() == pytest.approx(scores["pathology"].item() / 2)


@pytest.mark.parametrize(
    ("instance", "pathology", "mode"), [(1, 1, "combined"), (1, 0, "instance"), (0, 1, "pathology"), (0, 0, "instance")]
)
def test_the_headline_is_fixed_by_what_was_trained(instance, pathology, mode):
    loss = check_config({"loss": {"instance": {"weight": instance}, "pathology": {"weight": pathology}}}).loss
    assert choose_headline(loss) == mode


def test_images_of_one_finding_each_have_an_accuracy_beside_that_of_chance(run_dir, data_dir):
    names = ["edema", "effusion", "nodule"]
    task = Task(TaskInput(load_run(run_dir), data_dir, {"labels": names}, "test", EvaluationConfig(bootstrap=40)))
    split = task.encoded
    truth = np.arange(len(split.studies)) % 3
    labels = [{name: int(name == names[t]) for name in names} for t in truth]
    studies = [study._replace(labels=row) for study, row in zip(split.studies, labels, strict=True)]
    task.encoded = split._replace(studies=studies)
    result = run_zero_shot(task)
    score_BF = np.array(result.rows["score"]).reshape(3, -1).T
    accuracy = result.metrics["accuracy"]
    assert accuracy.value == np.mean(score_BF.argmax(axis=1) == truth)
    assert accuracy.low < accuracy.high
    assert "pathology.accuracy" in result.metrics
    assert result.protocol["chance"] == {"mean_auroc": 0.5, "accuracy": pytest.approx(1 / 3)}
    stream = io.StringIO()
    print_results({"zero_shot": result}, Console(file=stream, width=100))
    assert f"accuracy over 3 classes {accuracy.value:.3f}" in stream.getvalue()
