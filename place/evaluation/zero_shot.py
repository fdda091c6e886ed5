"""Zero-shot findings: is an image nearer to sentences that state a finding than to sentences that deny it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from place.config import LossConfig
from place.evaluation.encoder import EncodedSplit, encode_reports
from place.evaluation.findings import choose_findings, describe_findings, judge_findings, list_scores
from place.evaluation.metrics import TaskResult
from place.evaluation.prompts import FindingPrompts, build_prompts
from place.evaluation.task import Task
from place.model.place import TextFeatures

SCORES = {
    "instance": "cosine of the image with the prompt",
    "pathology": "largest cosine of an observation (V-POR) with the prompt's sentence (T-POR)",
    "combined": "mean of the instance and the pathology score",
}


def run_zero_shot(task: Task) -> TaskResult:
    """Judge prompted findings: AUROC and average precision, per finding and mean, in three score modes.

    Where each image is positive for exactly one finding (5x200): accuracy of the finding with the highest score too.
    Source: inferred (CheXzero, positive minus negative prompt; no softmax and no statistics over the test set); the
    pathology score is ours.
    """
    split = task.encoded
    findings = choose_findings([study.labels for study in split.studies], task.labels, task.evaluation.findings)
    prompts = build_prompts(findings.names, task.evaluation.prompts)
    scores = score_findings(split, prompts, lambda sentences: encode_reports(task.run, [[item] for item in sentences]))
    headline = choose_headline(task.run.config.loss)
    judged = {
        mode: judge_findings(score_BF.numpy(), findings, split.unit_B, task.evaluation.bootstrap)
        for mode, score_BF in scores.items()
    }
    metrics = judged.pop(headline)
    metrics |= {f"{mode}.{name}": metric for mode, other in judged.items() for name, metric in other.items()}
    rows = list_scores([study.sample_id for study in split.studies], scores[headline].numpy(), findings)
    protocol = _describe(headline, prompts) | describe_findings(findings)
    if "accuracy" in metrics:
        protocol["classes"] = "the finding with the highest score; what the labels do not tell counts as not positive"
        protocol["chance"] = protocol["chance"] | {"accuracy": 1 / len(findings.names)}
    return TaskResult("zero_shot", metrics, protocol, len(split.studies), rows)


def score_findings(
    split: EncodedSplit, prompts: dict[str, FindingPrompts], encode: Callable[[Sequence[str]], TextFeatures]
) -> dict[str, Tensor]:
    """Score every study for every finding.

    Args:
        encode: turns a list of sentences into TextFeatures, each sentence a report of its own.
    Returns: (B, F) for each mode: mean over the positive prompts minus mean over the negative ones.
    """
    columns: dict[str, list[Tensor]] = {mode: [] for mode in SCORES}
    for finding in prompts.values():
        positive, negative = (score_prompts(split, encode(side)) for side in (finding.positive, finding.negative))
        for mode, column in columns.items():
            column.append(positive[mode] - negative[mode])
    return {mode: torch.stack(column, dim=1) for mode, column in columns.items()}


def score_prompts(split: EncodedSplit, prompts: TextFeatures) -> dict[str, Tensor]:
    """Mean score (B,) over prompts in each mode; no study's score depends on another study."""
    instance_B = (split.image_BE @ prompts.text_BE.T).mean(dim=1)
    prompt_PE = prompts.sentences_BSE[:, 0]
    pathology_B = (split.observations_BKE @ prompt_PE.T).amax(dim=1).mean(dim=1)
    return {"instance": instance_B, "pathology": pathology_B, "combined": (instance_B + pathology_B) / 2}


def choose_headline(loss: LossConfig) -> str:
    """The mode that speaks for the model, fixed by what it was trained for and so before any test study is seen."""
    if not loss.pathology.weight:
        return "instance"
    return "combined" if loss.instance.weight else "pathology"


def _describe(headline: str, prompts: dict[str, FindingPrompts]) -> dict[str, Any]:
    others = [mode for mode in SCORES if mode != headline]
    return {
        "score": f"{headline}: {SCORES[headline]}; mean over positive minus mean over negative prompts",
        "headline_rule": "combined where both alignment losses were trained, else the trained one",
        "other_scores": {mode: SCORES[mode] for mode in others},
        "chance": {"mean_auroc": 0.5},
        "interval": "95 % percentile bootstrap over patients",
        "prompts": {name: prompt._asdict() for name, prompt in prompts.items()},
        "prompts_from_template": [name for name, prompt in prompts.items() if prompt.origin == "template"],
    }
