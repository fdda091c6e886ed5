"""Report generation: what a decoder on the frozen encoder's visual tokens writes, beside three that cost nothing.

A generator is worth its name only if it beats the most frequent training report, the report of the nearest training
image, and its own reports dealt out to other images: all three stand in the same table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from place.config import UsageError
from place.data.manifest import read_manifest
from place.data.prepared import read_samples
from place.evaluation.encoder import VisualFeatures, build_study, encode_visual, get_units, read_units, take
from place.evaluation.generation_metrics import TOKENS, label_reports, load_judges, pack_findings, score_reports
from place.evaluation.heads import note_short_training
from place.evaluation.labeler import hash_rules
from place.evaluation.metrics import Metric, TaskResult
from place.evaluation.report_decoder import Pairs, ReportDecoder, Visual, train_decoder
from place.evaluation.task import Task

MAX_VAL = 128
HEADLINE = "f1_macro_14"
BASELINES = {
    "nearest": "the report of the training image with the nearest pooled feature (cosine): retrieval",
    "most_frequent": "the most frequent training report for every image: never sees the image",
    "shuffled": "the generator's own reports, each judged by the next image's reference: as good if it looks at none",
}

JUDGED_BY = {
    "chexbert": "F1 of the findings that CheXbert reads in both texts; uncertain counts as there, as in f1chexbert",
    "radgraph": "F1 of RadGraph's entities (simple), of entities and whether they have a relation (partial, which most "
    "papers call RadGraph F1) and of entities with their relations (complete), mean over reports",
}


class Read(NamedTuple):
    """Images of a split with their reports and pooled features (B,E)."""

    pairs: Pairs
    image_BE: Tensor
    sample_ids: list[int]


def run_generation(task: Task) -> TaskResult:
    """Train a decoder on the training split, write a report for each image of the judged split, judge them.

    Raises:
        UsageError: the judged split is the one trained on, a split is missing, or a decoder that cannot be used.
    Source: inferred (R2Gen: visual tokens, beam search, word scores); V-PORs, the baselines and intervals are ours.
    """
    config = task.evaluation.generation
    if task.split == task.train_split:
        raise UsageError(f"generation: split '{task.split}' is what the decoder is trained on; judge another one")
    judges = load_judges(config)
    train, val, test = (
        _read_split(task, split, limit)
        for split, limit in ((task.train_split, config.max_train), (task.val_split, MAX_VAL), (task.split, None))
    )
    decoder, origin, step = train_decoder(
        config,
        train.pairs,
        val.pairs,
        lambda at: task.report("report decoder", at, config.steps),
        task.encoder.device,
    )
    reference = test.pairs.reports
    written = {"generated": _write_all(task, decoder, test.pairs.visual)} | write_baselines(train, test)
    judged = {"shuffled": np.roll(written["generated"], 1).tolist(), **written}
    patients = read_units(task.data_dir, task.split)
    units = get_units(patients, test.sample_ids)
    scores = {
        name: score_reports(texts, reference, units, task.evaluation.bootstrap, judges=judges)
        for name, texts in judged.items()
    }
    count = len(train.sample_ids)
    trained_on = (
        f"{count} images of '{task.train_split}', at most {config.max_train}, first by hash; "
        f"stopped on '{task.val_split}' at step {step} of {config.steps}"
    )
    draws = config.steps * min(config.batch_size, count)
    protocol = {"decoder": origin, "trained_on": trained_on, "settings": config.model_dump()} | _describe(task, scores)
    protocol |= {"passes": [round(draws / count, 2)]}
    protocol["notes"] += note_short_training(draws, count, "evaluation.generation.steps")
    protocol |= {"sections": task.reported_sections, "without_report": len(patients) - len(test.sample_ids)}
    protocol |= {name: text for name, text in JUDGED_BY.items() if getattr(judges, name) is not None}
    rows: dict[str, Any] = {"sample_id": test.sample_ids, "reference": reference, **written}
    for name, texts in (("generated", written["generated"]), ("reference", reference)):
        rows[f"{name}_findings"] = pack_findings(label_reports(texts))
    return TaskResult("generation", merge_scores(scores), protocol, len(reference), rows)


def write_baselines(train: Read, test: Read) -> dict[str, list[str]]:
    """The reports of the two baselines that come from the training reports; ties go to the first in the alphabet."""
    reports = train.pairs.reports
    counts = Counter(reports)
    frequent = min(counts, key=lambda report: (-counts[report], report))
    train_BE, test_BE = (torch.nn.functional.normalize(read.image_BE, dim=1) for read in (train, test))
    nearest_B = torch.cat([(part_BE @ train_BE.T).argmax(dim=1) for part_BE in test_BE.split(256)])
    return {
        "nearest": [reports[row] for row in nearest_B.tolist()],
        "most_frequent": [frequent] * len(test.sample_ids),
    }


def merge_scores(scores: dict[str, dict[str, Metric]]) -> dict[str, Metric]:
    """Scores of the generator, the headline first, then those of each baseline under its name."""
    own = scores["generated"]
    metrics = {HEADLINE: own[HEADLINE]} | own
    for name in BASELINES:
        metrics |= {f"{name}.{kind}": metric for kind, metric in scores[name].items()}
    return metrics


def _write_all(task: Task, decoder: ReportDecoder, visual: Visual) -> list[str]:
    count, written = len(visual.patches_BND), []
    for rows in torch.arange(count).split(task.evaluation.batch_size):
        written += decoder.write(visual.take(rows), task.evaluation.generation.beams)
        task.report("write reports", len(written), count)
    return written


def _read_split(task: Task, split: str, limit: int | None) -> Read:
    """The first `limit` images that have a report by sample_id, which is a hash, in that order."""
    worded = read_ids(task.data_dir, split)
    if not worded:
        raise UsageError(f"generation: split '{split}' has no reports; it takes train, val and test patients with some")
    wanted, parts, studies = set(sorted(worded)[:limit]), [], []
    chosen = (sample for sample in read_samples(task.data_dir, split) if sample["sample_id"] in wanted)
    for samples in take(chosen, task.evaluation.batch_size):
        parts.append(_encode(task, [sample["image"] for sample in samples]))
        studies += [build_study(sample, task.reported_sections) for sample in samples]
        task.report(f"read {split} images and reports", len(studies), len(wanted))
    order = sorted(range(len(studies)), key=lambda row: studies[row].sample_id)
    patches, observations, image = (torch.cat(part)[order] for part in zip(*parts, strict=True))
    reports = [" ".join(studies[row].sentences) for row in order]
    return Read(Pairs(Visual(patches, observations), reports), image, [studies[row].sample_id for row in order])


def read_ids(data_dir: Path, split: str) -> list[int]:
    """sample_id of the images of a split that have a report."""
    rows = read_manifest(data_dir, ["sample_id", "num_words"], split)
    return [key for key, words in zip(rows["sample_id"].to_pylist(), rows["num_words"].to_pylist()) if words]


def _encode(task: Task, jpegs: Sequence[bytes]) -> VisualFeatures:
    """What reports are written from; an image encoder alone has no V-PORs."""
    if task.has_reports:
        return encode_visual(task.run, jpegs)
    image_BD, patches_BND = task.encoder.encode_both(jpegs)
    return VisualFeatures(patches_BND, patches_BND.new_zeros(len(jpegs), 0, 1), image_BD)


def _describe(task: Task, scores: dict[str, dict[str, Metric]]) -> dict[str, Any]:
    own, tokens = scores["generated"], "patch tokens and V-PORs" if task.has_reports else "patch tokens"
    better = [
        kind for kind, metric in own.items() if all(metric.value > scores[name][kind].value for name in BASELINES)
    ]
    worse = [kind for kind in own if kind not in better]
    return {
        "score": f"reports by beam search of a decoder over the frozen encoder's {tokens}",
        "other_scores": BASELINES,
        "headline_rule": "macro F1 over the 14 findings: word scores reward a report that is merely usual",
        "findings_by": f"the rule-based labeler (rules {hash_rules()}) on both texts; uncertain does not count",
        "tokens": TOKENS,
        "interval": "95 % percentile bootstrap over patients",
        "notes": [
            f"above all baselines in: {', '.join(better) or 'nothing'}",
            *([f"not above all baselines in: {', '.join(worse)}"] if worse else []),
        ],
    }
