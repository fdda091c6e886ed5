"""The controlled experiment: rows that differ in one thing, trained and judged alike over seeds, as one table.

    python -m place.evaluation.ablation configs/ablation/main.yaml

A stopped experiment goes on with what is missing. A run that failed is named with its reason under the table, beside
the commits that trained the others, which go on.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import Field, field_validator
from scipy.stats import t as student

from place.config import RunError, Section, UsageError, build_config, dump_config, read_section
from place.data.prepared import read_card
from place.kept import read_kept, run_logged, write_kept
from place.runlog import read_jsonl

PAIRED = (
    "Difference from {reference} within a seed, with the 95 % interval of a paired bootstrap over patients "
    "(1,000 resamples); it tells nothing of other seeds."
)


class ColumnConfig(Section):
    title: str
    """Heading of the table."""
    metric: str
    """`TASK:METRIC`, as RUN/evaluation/TASK.json names it, or `pretrain:val_TERM`."""
    scale: float = 1.0
    """What the figure is multiplied with, such as 100 for shares that are shown in per cent."""
    digits: int = Field(3, ge=0, le=6)
    """Decimals that are shown."""

    @field_validator("metric")
    @classmethod
    def _has_a_task(cls, metric: str) -> str:
        if metric.count(":") != 1:
            raise ValueError("expected TASK:METRIC")
        return metric


class RowConfig(Section):
    title: str
    """Name of the row in the table."""
    config: tuple[str, ...] = ()
    """`section.key=value` laid over the base."""
    seeds: int | None = Field(None, ge=1)
    """Seeds of this row; none takes those of the experiment."""
    like: str | None = None
    """Another row whose runs are read, not trained anew; then only `metrics` are shown."""
    tasks: tuple[str, ...] = ()
    """Tasks that the runs of this row, or of the row that it is `like`, are judged by besides the experiment's."""
    metrics: dict[str, str] = {}
    """Column title: `TASK:METRIC` that this row shows there."""


class Experiment(Section):
    """Rows and columns of a controlled experiment."""

    base: str
    """YAML file of a run that every row starts from, relative to this file."""
    folder: str
    """Where runs and the table go."""
    data: str
    """Folder written by `place prepare`."""
    split: str = "test"
    """Split that is judged; choices are made on `val`."""
    tasks: str
    """As `place evaluate --tasks`."""
    seeds: int = Field(3, ge=1)
    """Seeds 0, 1, ... of each row."""
    reference: str
    """Row that the others are compared with, seed by seed."""
    columns: tuple[ColumnConfig, ...] = Field(min_length=1)
    """What is shown."""
    rows: dict[str, RowConfig] = Field(min_length=1)
    """What is trained, by folder name."""

    @field_validator("rows")
    @classmethod
    def _know_each_other(cls, rows: dict[str, RowConfig]) -> dict[str, RowConfig]:
        for name, row in rows.items():
            if row.like is not None and (row.like not in rows or rows[row.like].like):
                raise ValueError(f"{name}: like={row.like!r} is no row that is trained")
        return rows


class Job(NamedTuple):
    """One run of a row: its folder, the configuration that was resolved for it, and what it is judged by."""

    row: str
    seed: int
    folder: Path
    config: str
    tasks: str


Figures = dict[str, dict[int, dict[str, float]]]
"""For each row and seed, figure by `TASK:METRIC`."""
Gaps = dict[str, dict[int, dict[str, list[float]]]]
"""For each row and seed, what `pair_job` found."""


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment, the configuration of each row included. Raises UsageError, in one line."""
    experiment = read_section(path, Experiment)
    if experiment.reference not in experiment.rows:
        raise UsageError(f"{path}: reference={experiment.reference!r} is no row; take {', '.join(experiment.rows)}")
    return experiment


def plan_jobs(experiment: Experiment, base: Path) -> list[Job]:
    """All runs, seed by seed, so that an experiment that is stopped has whole rows of the first seeds."""
    trained = {name: row for name, row in experiment.rows.items() if row.like is None}
    tasks = dict.fromkeys(trained, experiment.tasks)
    for name, row in experiment.rows.items():
        tasks[row.like or name] += "".join(f",{task}" for task in row.tasks)
    jobs = []
    for seed in range(max(row.seeds or experiment.seeds for row in trained.values())):
        for name, row in trained.items():
            if seed >= (row.seeds or experiment.seeds):
                continue
            folder = Path(experiment.folder) / name / f"seed{seed}"
            data = (f"data.path={experiment.data}", "data.streams=[]")
            own = (*data, f"run.dir={folder / 'run'}", f"run.seed={seed}")
            config = dump_config(build_config(base, [*row.config, *own]))
            jobs.append(Job(name, seed, folder, config, tasks[name]))
    return jobs


def run_job(job: Job, experiment: Experiment) -> dict[str, float]:
    """Train and judge one run in processes of their own, or read what an earlier call found.

    A run that was stopped goes on; one of another configuration or of other data is removed. What `evaluation` says
    is asked of a run when it is judged: a change there trains nothing anew.

    Returns: figure by `TASK:METRIC`.
    Raises:
        RunError: a process failed, with its last line and where the log is; or a column's figure was not found.
    """
    found, key = job.folder / "figures.json", build_key(experiment, job)
    if (known := read_kept(found, key)) is not None:
        return known
    job.folder.mkdir(parents=True, exist_ok=True)
    config = job.folder / "config.yaml"
    config.write_text(job.config)
    run = job.folder / "run"
    trained = yaml.safe_load(job.config)
    evaluation = trained.pop("evaluation")
    _clear(run, job.folder / "trained.json", _hash(read_card(experiment.data)["fingerprint"], json.dumps(trained)))
    _call(job, "pretrain", "--config", str(config))
    judged = ("--data", experiment.data, "--tasks", job.tasks, "--split", experiment.split)
    _call(job, "evaluate", "--run", str(run), *judged, f"evaluation={json.dumps(evaluation)}")
    figures = read_figures(run)
    for column in experiment.columns:
        if column.metric not in figures:
            near = difflib.get_close_matches(column.metric, figures, n=3, cutoff=0)
            raise RunError(f"{column.title}: no figure {column.metric}; there are {', '.join(near)}")
    write_kept(found, key, figures)
    return figures


def pair_job(job: Job, reference: Job, experiment: Experiment, say: Callable[[str], None]) -> dict[str, list[float]]:
    """A run less the reference's of the same seed, by a paired bootstrap over patients; what was found is kept.

    A task that cannot be paired, as the reports of a row that reads other sections, is told and left out.

    Returns: by `TASK:METRIC` the difference and the ends of its 95 % interval.
    Raises:
        RunError: a result is damaged. UsageError: all were removed.
    """
    # Here, because it brings torch, which those who only plan do without.
    from place.evaluation.compare import find_results, run_compare

    found, key = job.folder / "paired.json", build_key(experiment, reference, job)
    if (known := read_kept(found, key)) is not None:
        return known
    runs = reference.folder / "run", job.folder / "run"
    gaps: dict[str, list[float]] = {}
    for task in sorted(path.stem for path in find_results(runs[1]).glob("*.json")):
        try:
            differences = run_compare(*runs, Path(experiment.data), tasks=[task]).tasks.get(task, {})
        except UsageError as error:
            say(f"{job.row}, seed {job.seed}: not paired with {reference.row}: {error}")
            continue
        gaps |= {
            f"{task}:{name}": [gap for gap in item.difference if gap is not None] for name, item in differences.items()
        }
    write_kept(found, key, gaps)
    return gaps


def build_key(experiment: Experiment, *jobs: Job) -> str:
    """What a result that is kept depends on, hashed."""
    fingerprint = read_card(experiment.data)["fingerprint"]
    return _hash(fingerprint, experiment.split, *(part for job in jobs for part in (job.tasks, job.config)))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _clear(run: Path, noted: Path, key: str) -> None:
    """Remove figures that were judged before, and the whole run where it was trained under another key."""
    if read_kept(noted, key) is None:
        shutil.rmtree(run, ignore_errors=True)
        write_kept(noted, key, True)
    shutil.rmtree(run / "evaluation", ignore_errors=True)


def read_figures(run: Path) -> dict[str, float]:
    """Every figure of an evaluation by `TASK:METRIC`, and those of the last look at the validation split."""
    looks = [record for record in read_jsonl(run / "metrics.jsonl") if "val_total" in record]
    last = looks[-1] if looks else {}
    figures = {f"pretrain:{name}": value for name, value in last.items() if name.startswith("val_")}
    for path in sorted((run / "evaluation").glob("*.json")):
        tree = json.loads(path.read_text())
        figures |= {f"{tree['task']}:{name}": metric["value"] for name, metric in tree["metrics"].items()}
    return figures


def build_table(experiment: Experiment, figures: Figures) -> str:
    """The table in Markdown: mean over seeds, 95 % interval of it, and the difference from the reference.

    Intervals are Student's over seeds: of the mean, and of the difference between runs of one seed. A difference whose
    interval leaves out 0 is set in bold. One seed has no interval.
    Source: ours.
    """
    heads = ["row", "seeds", *(column.title for column in experiment.columns)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for name, row in experiment.rows.items():
        runs = figures.get(row.like or name, {})
        cells = [row.title, str(len(runs))]
        for column in experiment.columns:
            metric = row.metrics.get(column.title, "" if row.like else column.metric)
            values = [run[metric] * column.scale for run in runs.values() if metric in run]
            cells.append(_show(values, column.digits) if values else "-")
            if values and name != experiment.reference:
                base = figures.get(experiment.reference, {})
                both = [seed for seed, run in runs.items() if metric in run and column.metric in base.get(seed, {})]
                gaps = [(runs[seed][metric] - base[seed][column.metric]) * column.scale for seed in both]
                cells[-1] += _show_gap(gaps, column.digits)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def build_paired_table(experiment: Experiment, gaps: Gaps) -> str:
    """The differences from the reference within each seed, with their intervals over patients, in Markdown.

    A difference whose interval leaves out 0 is set in bold; `-` stands where the evaluation kept no single images.
    Source: ours.
    """
    heads = ["row", "seed", *(column.title for column in experiment.columns)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for name, row in experiment.rows.items():
        for seed, found in sorted(gaps.get(name, {}).items()):
            cells = [_show_paired(found.get(column.metric, []), column) for column in experiment.columns]
            lines.append("| " + " | ".join([row.title, str(seed), *cells]) + " |")
    return "\n".join(lines) + "\n"


def compute_half_width(values: list[float]) -> float | None:
    """Half of Student's 95 % interval of the mean of independent values; none for a single one."""
    if len(values) < 2:
        return None
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def run_experiment(experiment: Experiment, base: Path, parallel: int, say: Callable[[str], None]) -> list[str]:
    """Run what is missing, `parallel` at a time, and write table.md, figures.json and paired.json into FOLDER.

    Returns: a line for each run that failed.
    """
    jobs, failed = plan_jobs(experiment, base), []
    figures: Figures = {}
    gaps: Gaps = {}
    pool = ThreadPoolExecutor(parallel)
    try:
        futures = [pool.submit(run_job, job, experiment) for job in jobs]
        for number, (job, future) in enumerate(zip(jobs, futures, strict=True), start=1):
            try:
                figures.setdefault(job.row, {})[job.seed] = future.result()
                say(f"{number}/{len(jobs)}  {job.row}, seed {job.seed}: done")
            except (RunError, UsageError) as error:
                failed.append(f"{job.row}, seed {job.seed}: {error}")
                say(f"{number}/{len(jobs)}  {failed[-1]}")
            _write(experiment, figures, gaps, [describe_origin(jobs), *failed])
    finally:
        # Whoever stops the experiment does not wait for runs that have not begun.
        pool.shutdown(cancel_futures=True)
    for job, reference in list_pairs(experiment, jobs, figures):
        try:
            gaps.setdefault(job.row, {})[job.seed] = pair_job(job, reference, experiment, say)
        except (RunError, UsageError) as error:
            say(f"{job.row}, seed {job.seed}: not paired with {reference.row}: {error}")
    _write(experiment, figures, gaps, [describe_origin(jobs), *failed])
    return failed


def describe_origin(jobs: Iterable[Job]) -> str:
    """The commits that trained the runs that are there, in words; a run that is kept is not trained anew by another."""
    there = [job.folder / "run/run.json" for job in jobs]
    commits = dict.fromkeys(json.loads(path.read_text())["commit"] for path in there if path.is_file())
    advice = "; remove the runs of the older ones to compare like with like" if len(commits) > 1 else ""
    return f"Trained on {os.cpu_count()} CPU cores by commit {' and '.join(commits) or '-'}{advice}"


def list_pairs(experiment: Experiment, jobs: list[Job], figures: Figures) -> list[tuple[Job, Job]]:
    """Each run that has figures with the reference's of the same seed, if that has some too."""
    done = {(job.row, job.seed): job for job in jobs if job.seed in figures.get(job.row, {})}
    others = [job for job in done.values() if job.row != experiment.reference]
    return [(job, done[experiment.reference, job.seed]) for job in others if (experiment.reference, job.seed) in done]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _write(experiment: Experiment, figures: Figures, gaps: Gaps, notes: list[str]) -> None:
    folder = Path(experiment.folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = build_table(experiment, figures) + "".join(f"\n{note}.\n" for note in notes)
    if gaps:
        reference = experiment.rows[experiment.reference].title
        table += f"\n{PAIRED.format(reference=reference)}\n\n{build_paired_table(experiment, gaps)}"
    (folder / "table.md").write_text(table)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    (folder / "paired.json").write_text(json.dumps(gaps, indent=1))


def _call(job: Job, *arguments: str) -> None:
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    try:
        run_logged(
            [sys.executable, "-m", "place", *arguments], job.folder / f"{arguments[0]}.log", OMP_NUM_THREADS=threads
        )
    except RunError as error:
        raise RunError(f"place {arguments[0]} {error}") from None


def _show(values: list[float], digits: int) -> str:
    half = compute_half_width(values)
    return f"{statistics.fmean(values):.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _show_paired(gap: list[float], column: ColumnConfig) -> str:
    if not gap:
        return "-"
    value, *ends = (part * column.scale for part in gap)
    if not ends:
        return f"{value:+.{column.digits}f}"
    shown = f"{value:+.{column.digits}f} ({ends[0]:+.{column.digits}f} to {ends[1]:+.{column.digits}f})"
    return f"**{shown}**" if ends[0] > 0 or ends[1] < 0 else shown


def _show_gap(gaps: list[float], digits: int) -> str:
    if not gaps:
        return ""
    mean, half = statistics.fmean(gaps), compute_half_width(gaps)
    if half is None:
        return f" ({mean:+.{digits}f})"
    shown = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f" (**{shown}**)" if abs(mean) > half else f" ({shown})"


def main(arguments: Iterable[str] | None = None) -> int:
    """Run an experiment and print its table. Exit code 1 if a run failed or it was interrupted, 2 on wrong use."""
    parser = argparse.ArgumentParser(prog="python -m place.evaluation.ablation", description=__doc__)
    parser.add_argument("experiment", type=Path, help="YAML file; see configs/ablation/")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs at a time; default one a core")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    try:
        experiment = load_experiment(asked.experiment)
        base = asked.experiment.parent / experiment.base
        failed = run_experiment(experiment, base, asked.parallel, _say)
    except UsageError as error:
        sys.stderr.write(f"ablation: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("ablation: interrupted; the same command goes on with the runs that are missing\n")
        return 1
    _say((Path(experiment.folder) / "table.md").read_text())
    for line in failed:
        sys.stderr.write(f"failed: {line}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
