"""`place evaluate`: the tasks that were asked for, over one encoding of a split, as JSON, picture and tables."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from threadpoolctl import threadpool_limits

from place import __version__
from place.config import DataConfig, EvaluationConfig, RunError, UsageError
from place.data.identity import SPLITS
from place.data.manifest import MANIFEST_FILE, read_manifest
from place.data.masks import list_masked
from place.data.pool import map_in_processes
from place.data.prepared import read_card
from place.distributed import choose_device
from place.evaluation.classification import run_classification
from place.evaluation.detection import run_detection
from place.evaluation.explain import write_explanation
from place.evaluation.finetune import run_finetune
from place.evaluation.finetune_segmentation import run_finetune_segmentation
from place.evaluation.foreign import find_kind, load_foreign
from place.evaluation.frozen import FrozenEncoder, name_run, wrap_run
from place.evaluation.generation import run_generation
from place.evaluation.grounding import run_grounding
from place.evaluation.leaks import Judged, Pretraining, check_leaks, read_pretraining, trace_pretraining
from place.evaluation.metrics import TaskResult, count_resamples, note_resamples
from place.evaluation.pixel_probe import run_pixel_probe
from place.evaluation.report import write_report
from place.evaluation.retrieval import run_retrieval
from place.evaluation.segmentation import run_segmentation
from place.evaluation.table import print_results
from place.evaluation.task import StepProgress, Task, TaskInput
from place.evaluation.zero_shot import run_zero_shot
from place.kept import drafted, write_text
from place.pretrained.load import load_export, read_trained
from place.runlog import read_commit
from place.training.checkpoint import LoadedRun, load_run

TASKS: dict[str, Callable[[Task], TaskResult]] = {
    "zero_shot": run_zero_shot,
    "retrieval": run_retrieval,
    "classification": run_classification,
    "finetune": run_finetune,
    "pixel_probe": run_pixel_probe,
    "grounding": run_grounding,
    "segmentation": run_segmentation,
    "finetune_segmentation": run_finetune_segmentation,
    "detection": run_detection,
    "generation": run_generation,
}
FROZEN = {"finetune": "classification", "finetune_segmentation": "segmentation"}
"""Tasks that train the encoder: by name only, for they train it several times over. Beside it the name of
the same with a frozen encoder, under which protocol files tell the scores of others."""
IN_FOLDS = {"segmentation", "finetune_segmentation", "detection"}
"""Tasks that judge the images of all splits where `evaluation.folds` is set."""
NEEDS = {
    "zero_shot": "labels",
    "retrieval": "reports",
    "classification": "training labels",
    "finetune": "training labels",
    "pixel_probe": "training labels",
    "grounding": "phrases with boxes",
    "segmentation": "training masks",
    "finetune_segmentation": "training masks",
    "detection": "training boxes",
    "generation": "training reports",
}
NEED_REPORTS = ("zero_shot", "retrieval", "grounding")
LONGEST = [*FROZEN, "generation", "segmentation", "detection", "pixel_probe", "classification"]
"""What several processes begin with, so that none is left with a long task at the end."""
IMAGE_TASKS = [name for name in TASKS if name not in NEED_REPORTS]
ADVICE = {
    "labels": "prepare it with label columns or take retrieval",
    "training labels": "prepare it with label columns, train and val patients, and judge another split than train",
    "reports": "it is a set of images alone: take tasks on labels, boxes or masks",
    "phrases with boxes": "take one whose sentences have boxes, such as phantoms",
    "training masks": "take one with masks in its train, val and judged split, or evaluation.folds=5 with masks in any",
    "training boxes": "take one with boxes in its train, val and judged split, or evaluation.folds=5 with boxes in any",
    "training reports": "prepare it with train and val patients, and judge another split than train",
}


def run_evaluation(
    run_dir: Path,
    data_dir: Path,
    tasks: Sequence[str],
    split: str = "test",
    which: str = "best",
    evaluation: EvaluationConfig | None = None,
    output: Path | None = None,
    on_progress: StepProgress | None = None,
) -> dict[str, TaskResult]:
    """Judge a run on a split of a prepared data set; writes TASK.json for each task, explain.png and report.html.

    Args:
        run_dir: run folder.
        data_dir: folder written by `place prepare`; not necessarily the one trained on.
        tasks: names in `TASKS`, or `all` for all that the data set permits, those of `FROZEN` apart.
        which: checkpoint, `best`, `latest` or a folder name such as step_00000100.
        evaluation: how to judge; none takes the run's own section.
        output: folder that is written; none takes RUN/evaluation.
        on_progress: told the step, what is done of it and its total.
    Raises:
        UsageError: an unknown task, or one that needs what the data set does not have.
        RunError: a damaged run or data set, or an overlap with what was trained on (`place.evaluation.leaks`).
    Source: ours.
    """
    folder = output or run_dir / "evaluation"
    reopen = partial(_open_task, partial(_read_run, run_dir, which), data_dir, split, evaluation, folder)
    task = reopen(on_progress)
    names = choose_tasks(tasks, find_offers(data_dir, task.card, split, task.evaluation.folds))
    pretraining = read_pretraining(run_dir, task.run.config, task.evaluation)._replace(chooses=which == "best")
    return judge(task, names, folder, which, pretraining, reopen)


def run_encoder_evaluation(
    source: str,
    data_dir: Path,
    tasks: Sequence[str],
    output: Path,
    split: str = "test",
    evaluation: EvaluationConfig | None = None,
    random_weights: bool = False,
    on_progress: StepProgress | None = None,
) -> dict[str, TaskResult]:
    """Judge any vision encoder as `run_evaluation` judges a run; an export of ours has its report encoder too.

    Args:
        source: `timm:NAME`, `hf:NAME` or a folder.
        output: folder that is written.
        random_weights: a baseline: the architecture with weights drawn with seed 0.
    Returns: results; tasks of `all` that need a report encoder are there without figures, with the reason.
    Raises:
        UsageError: as `run_evaluation`, or a task by name that needs a report encoder.
    Source: ours.
    """
    if find_kind(source)[0] == "place" and random_weights:
        raise UsageError("--random-weights is for timm and Hugging Face; pretrain with train.max_steps=1 instead")
    read = partial(_read_encoder, source, random_weights)
    reopen = partial(_open_task, read, data_dir, split, evaluation, output)
    task = reopen(on_progress)
    names, name = choose_tasks(tasks, find_offers(data_dir, task.card, split, task.evaluation.folds)), task.encoder.name
    if task.has_reports:
        pretraining = trace_pretraining(task.run.config.data, read_trained(source)["data_fingerprint"], task.evaluation)
        return judge(task, names, output, name, pretraining, reopen)
    pretraining = trace_pretraining(DataConfig(), None, task.evaluation)
    apart = [name for name in names if name in NEED_REPORTS]
    if apart and "all" not in tasks:
        raise UsageError(
            f"task '{apart[0]}' needs a report encoder and {source} has none; take {', '.join(IMAGE_TASKS)}"
        )
    results = judge(task, [each for each in names if each not in apart], output, name, pretraining, reopen)
    protocol = {"not_applicable": f"needs a report encoder, which {name} has not"}
    return results | {each: TaskResult(each, {}, protocol, 0) for each in apart}


def _open_task(
    read: Callable[[], tuple[LoadedRun | None, FrozenEncoder]],
    data_dir: Path,
    split: str,
    evaluation: EvaluationConfig | None,
    folder: Path,
    on_progress: StepProgress | None = None,
) -> Task:
    card, (run, encoder) = read_card(data_dir), read()
    evaluation = evaluation or (run.config.evaluation if run else EvaluationConfig())
    return Task(TaskInput(run, data_dir, card, split, evaluation, on_progress, folder, encoder))


def _read_run(run_dir: Path, which: str) -> tuple[LoadedRun, FrozenEncoder]:
    run = load_run(run_dir, which)
    return run, wrap_run(run, name_run(run_dir))


def _read_encoder(source: str, random_weights: bool) -> tuple[LoadedRun | None, FrozenEncoder]:
    if find_kind(source)[0] != "place":
        return None, load_foreign(source, random_weights)
    run = load_export(source)
    return run, wrap_run(run, f"export {Path(source).resolve().name}")


def judge(
    task: Task,
    names: Sequence[str],
    folder: Path,
    which: str,
    pretraining: Pretraining | None = None,
    reopen: Callable[[], Task] | None = None,
) -> dict[str, TaskResult]:
    """Look for leaks, run tasks and write what they found.

    Args:
        reopen: opens the task in another process, importable by name; none judges in this one.
    """
    folded = IN_FOLDS & {*names} if task.evaluation.folds else set()
    splits = SPLITS if folded else (task.split,)
    chooses = any(NEEDS.get(name, "").startswith("training") for name in {*names} - folded)
    choosing = (task.val_split,) if chooses and task.split == task.val_split else ()
    judged = Judged(task.data_dir, task.card, splits, choosing)
    (task.run.model if task.has_reports else task.encoder.vision).to(choose_device())
    leaks = check_leaks(judged, task.evaluation, pretraining, task.report)
    results = {}
    for result in _run_tasks(task, names, reopen):
        protocol = describe_gaps(result, task.card, task.evaluation.bootstrap) | list_peers(task.card, result.task)
        results[result.task] = result._replace(protocol=result.protocol | protocol | {"leaks": leaks})
        write_result(folder, results[result.task], task, which)
    if task.has_reports:
        write_explanation(task, folder / "explain.png")
    title = f"Evaluation of {task.encoder.name} on data set {task.data_dir.resolve().name}"
    write_report(task, folder, title, list(TASKS))
    return {name: results[name] for name in names}


class Job(NamedTuple):
    """Tasks that one process judges, how it opens what they judge, and its threads."""

    reopen: Callable[[], Task]
    names: list[str]
    threads: int


def _run_tasks(task: Task, names: Sequence[str], reopen: Callable[[], Task] | None) -> Iterator[TaskResult]:
    groups = group_tasks(names)
    num_workers = min(task.evaluation.num_workers, len(groups))
    if reopen is None or num_workers == 1 or task.encoder.device.type != "cpu":
        yield from (TASKS[name](task) for name in names)
        return
    jobs = [Job(reopen, group, max(1, torch.get_num_threads() // num_workers)) for group in groups]
    done = 0
    task.report("judge, tasks", done, len(names))
    try:
        for results in map_in_processes(run_job, jobs, num_workers):
            yield from results
            done += len(results)
            task.report("judge, tasks", done, len(names))
    except BrokenProcessPool:
        raise RunError(
            "a process that judged a task died, perhaps for lack of memory; fewer evaluation.num_workers take less"
        ) from None


def group_tasks(names: Sequence[str]) -> list[list[str]]:
    """The jobs of several processes, the longest first; tasks that encode reports share one encoding of the split."""
    apart = [name for name in names if name in NEED_REPORTS]
    rest = [name for name in names if name not in apart]
    ordered = sorted(rest, key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))
    return [[name] for name in ordered] + ([apart] if apart else [])


def run_job(job: Job) -> list[TaskResult]:
    """Judge in this process, with the threads of its share of the cores."""
    torch.set_num_threads(job.threads)
    with threadpool_limits(job.threads):
        task = job.reopen()
        return [TASKS[name](task) for name in job.names]


def describe_gaps(result: TaskResult, card: dict[str, Any], bootstrap: int) -> dict[str, Any]:
    """Figures whose intervals are of fewer resamples than were drawn; notes where these are too few, and on each figure
    that the data set's protocol file names and the task did not give."""
    used = count_resamples(result.metrics, bootstrap)
    named = card.get("protocol", {}).get("tasks", {}).get(result.task, [])
    told = [f"the data set's protocol names {name}, which is not given" for name in named if name not in result.metrics]
    told += note_resamples(used, bootstrap)
    found: dict[str, Any] = {"resamples_used": used} if used else {}
    return found | ({"notes": result.protocol.get("notes", []) + told} if told else {})


def list_peers(card: dict[str, Any], task: str) -> dict[str, list[dict[str, Any]]]:
    """Scores of others at a task, as the protocol file of the data set tells them; nothing where it tells none."""
    names = (task, FROZEN.get(task))
    peers = [peer for peer in card.get("protocol", {}).get("peers", []) if peer["task"] in names]
    return {"peers": peers} if peers else {}


def find_offers(data_dir: Path, card: dict[str, Any], split: str, folds: int = 0) -> set[str]:
    """What a data set has of that which some tasks need: labels, reports, phrases, and such to train on.

    Args:
        folds: of `evaluation.folds`, which take masks and boxes of any split.
    """
    looked, masked = list_masked(data_dir)
    can_train, needed = split != "train", {"train", "val", split}
    offers = {
        "labels": bool(card["labels"]),
        "training masks": bool(folds and masked) or (can_train and "val" in looked and {"train", split} <= masked),
    }
    if (data_dir / MANIFEST_FILE).is_file():
        columns = ["split", "boxes", "num_words"]
        table = read_manifest(data_dir, columns)
        rows = list(zip(*(table[key].to_pylist() for key in columns)))
        boxed = {name for name, boxes, _ in rows if boxes != "[]"}
        worded = {name for name, _, words in rows if words}
        phrased = (box.get("phrase") or box.get("sentence") is not None for box in _list_boxes(rows, split))
        offers |= {
            "training labels": offers["labels"] and can_train and needed <= {name for name, *_ in rows},
            "reports": split in worded,
            "training reports": can_train and needed <= worded,
            "phrases with boxes": any(phrased),
            "training boxes": bool(folds and boxed) or (can_train and needed <= boxed),
        }
    return {name for name, is_there in offers.items() if is_there}


def _list_boxes(rows: Sequence[tuple[str, str, int]], split: str) -> Iterator[dict[str, Any]]:
    for name, boxes, _ in rows:
        if name == split and boxes != "[]":
            yield from json.loads(boxes)


def choose_tasks(tasks: Sequence[str], offers: Collection[str]) -> list[str]:
    """Resolve `all` and check every name; `offers` is what the data set has."""
    if not tasks:
        raise UsageError(f"no task was named; take some of {', '.join(TASKS)}, or all")
    for name in tasks:
        if name not in (*TASKS, "all"):
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            raise UsageError(
                f"unknown task '{name}'; "
                + (f"did you mean '{near[0]}'?" if near else f"take {', '.join(TASKS)} or all")
            )
        need = NEEDS.get(name)
        if need and need not in offers:
            raise UsageError(f"task '{name}' needs {need} and the data set has none; {ADVICE[need]}")
    permitted = [name for name in TASKS if NEEDS.get(name) in (None, *offers) and name not in FROZEN]
    return [name for name in TASKS if name in (*permitted, *tasks)] if "all" in tasks else list(dict.fromkeys(tasks))


def write_result(folder: Path, result: TaskResult, task: Task, which: str) -> None:
    """Write a result as `folder/TASK.json`, and what it was computed from as TASK.parquet, each whole or not at all."""
    folds = task.evaluation.folds if result.task in IN_FOLDS else 0
    folded = {"judged": f"images of all splits, in {folds} folds of patients"} if folds else {}
    tree = {
        "task": result.task,
        "metrics": {name: metric._asdict() for name, metric in result.metrics.items()},
        "protocol": {"split": task.split, "bootstrap": task.evaluation.bootstrap} | folded | result.protocol,
        "data_fingerprint": task.card["fingerprint"],
        "commit": task.encoder.commit,
        "judged_by": {"commit": read_commit(), "version": __version__},
        "num_samples": result.num_samples,
        "checkpoint": {"which": which, "step": task.encoder.step},
        "encoder": {"name": task.encoder.name, "weights": task.encoder.weights},
    }
    path = folder / f"{result.task}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".parquet").unlink(missing_ok=True)
        if result.rows is not None:
            with drafted(path.with_suffix(".parquet")) as draft:
                pq.write_table(pa.table(result.rows), draft)
        write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; give a folder that can be written") from None


__all__ = ["TASKS", "print_results", "run_encoder_evaluation", "run_evaluation"]
