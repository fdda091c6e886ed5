"""`place scale`: one run at several sizes, what its limits are, and what that says of larger ones.

Every rung is a `place pretrain` of its own, on the Ray cluster at RAY_ADDRESS or as a Slurm job. A rung that fails is a
row with its reason; a ladder that was stopped goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from place.cluster.budget import compute_flops, compute_traffic
from place.cluster.scaling_model import (
    Model,
    Network,
    are_alike,
    build_point,
    compute_rounds,
    compute_typical,
    describe_network,
    fit_resampled,
    predict_interval,
)
from place.cluster.slurm_job import end_left_job, run_slurm_job
from pydantic import Field

from place.config import Config, RunError, Section, UsageError, build_config, dump_config, read_section
from place.data.mixture import read_fingerprint
from place.kept import read_kept, run_logged, write_kept
from place.runlog import read_commit, read_jsonl, read_newest_step
from place.training.footprint import Footprint, measure_footprint
from place.training.plan import build_plan, compute_accumulation

PROBES = {
    "synthetic": "one batch again and again: the ceiling of compute and network",
    "loader": "reading only: the ceiling of the input",
    "alone": "one worker with its share of the batch: no communication",
    "restart": "the whole run started once more, from its last checkpoint",
}
RESTART_STEPS = 2
"""Optimiser steps that a run goes on for where it is started once more."""
HIDDEN = (
    "the phases hold their communication, as they do on GPUs: exposed is what a step takes beyond the compute of one "
    "worker with its share, in proportion to FLOPs, waits for slower workers included"
)
SAME_WORK = (
    "a worker has nearly the same FLOPs in all rungs fitted, so how its compute grows with them is not known: "
    "intervals reach from not at all to in proportion; a ladder with scaling=strong would tell"
)
ORIGIN = ("commit", "versions", "device")
"""What measurements of one ladder share, where only their size differs."""
REPEATED = ("full", "alone")
"""What the model is fitted to, whose runs differ by noise."""
SLURM_SCRIPT = Path(__file__).parent.parent / "slurm" / "pretrain.sh"


class RungConfig(Section):
    workers: int = Field(ge=1)
    """Training workers, one a GPU where there are any."""
    nodes: int | None = Field(None, ge=1)
    """Nodes that the workers lie on; none takes one a worker by Slurm, and by Ray what `cluster.num_nodes` says."""
    name: str | None = None
    """Name of the row; none takes the workers and what differs."""
    config: tuple[str, ...] = ()
    """`section.key=value` laid over the base, such as engine.zero_stage=3."""
    network: Network | None = None
    """Network of this rung where it is not that of the ladder."""
    hold_out: bool = False
    """Measured, and predicted from the other rungs without being fitted."""


class ScaleConfig(Section):
    """A ladder."""

    base: str
    """YAML file of the run that every rung starts from, relative to this file."""
    folder: str
    """Where runs, rows, plots and the page go."""
    scaling: Literal["strong", "weak"] = "strong"
    """`strong`: every rung has the base's global batch; `weak`: the base's batch is that of one worker."""
    steps: int = Field(40, ge=4)
    """Optimiser steps of a rung; a checkpoint is written in the last one, which is counted for itself."""
    warmup_steps: int = Field(10, ge=1)
    """Steps at its start that are not counted."""
    repeats: int = Field(1, ge=1)
    """Runs of each rung, its `alone` too; rates are of the steps of all, intervals of resampled runs and, within them,
    steps."""
    probes: tuple[Literal["synthetic", "loader", "alone", "restart"], ...] = (
        "synthetic",
        "loader",
        "alone",
        "restart",
    )
    """What is measured beside the full runs of each rung: rows, and the `restart_s` of the full row."""
    launcher: Literal["ray", "slurm"] = "ray"
    """`slurm` submits slurm/pretrain.sh for each run and waits for it; PLACE_SBATCH holds more words for sbatch."""
    timeout_s: float = Field(3600, gt=0)
    """Longest run of a rung, in seconds; by Slurm its time limit, in whole minutes."""
    peak_tflops: float | None = Field(None, gt=0)
    """Dense peak of one worker's device in the precision of the run; none leaves out MFU."""
    network: Network | None = None
    """Network between the nodes, for the model of scaling."""
    rungs: tuple[RungConfig, ...] = Field(min_length=1)
    """What is measured, in this order."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` laid over the base of every rung; those of the command line come behind."""
    predict: tuple[Network, ...] = ()
    """Networks that larger sizes are predicted on."""
    predict_workers: tuple[int, ...] = (8, 64, 256, 1024)
    """Sizes that are predicted."""


Steps = dict[tuple[str, str], list[list[dict[str, float]]]]
"""For each rung and probe, and each run of it, the phases of its steps, in seconds."""


class Job(NamedTuple):
    """One run: its rung, what is left out in it, which repeat it is, its folder and its resolved configuration."""

    rung: RungConfig
    name: str
    probe: str
    repeat: int
    folder: Path
    config: Config

    @property
    def is_full(self) -> bool:
        """Whether nothing is left out."""
        return self.probe == "full"


def load_scale(path: Path, overrides: Sequence[str] = ()) -> ScaleConfig:
    """Read and check a ladder; `section.key=value` is laid over every rung. Raises UsageError, in one line."""
    scale = read_section(path, ScaleConfig)
    scale = scale.model_copy(update={"overrides": (*scale.overrides, *overrides)})
    if scale.warmup_steps >= scale.steps - 2:
        raise UsageError(f"{path}: steps={scale.steps} leaves too little after warmup_steps={scale.warmup_steps}")
    if scale.launcher == "slurm" and not SLURM_SCRIPT.is_file():
        raise UsageError(
            f"{path}: launcher=slurm submits slurm/pretrain.sh, which this installation lacks; start from a checkout"
        )
    names = [name_rung(rung) for rung in scale.rungs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"{path}: two rungs are called '{twice}'; give them a name")
    uneven = next((rung for rung in scale.rungs if rung.workers % (rung.nodes or 1)), None)
    if uneven:
        raise UsageError(f"{path}: '{name_rung(uneven)}' does not lie equally on nodes={uneven.nodes}; give a divisor")
    return scale


def name_rung(rung: RungConfig) -> str:
    """What a rung is called."""
    return rung.name or " ".join([f"{rung.workers} workers" if rung.workers > 1 else "1 worker", *rung.config])


def plan_jobs(scale: ScaleConfig, base: Path) -> list[Job]:
    """All runs in their order. Raises UsageError where a rung's configuration is not possible."""
    return [
        _plan_job(scale, base, rung, probe, repeat)
        for rung in scale.rungs
        for probe in ("full", *scale.probes)
        for repeat in range(scale.repeats if probe in REPEATED else 1)
    ]


def _plan_job(scale: ScaleConfig, base: Path, rung: RungConfig, probe: str, repeat: int) -> Job:
    name, is_restart = name_rung(rung), probe == "restart"
    slug = "".join(char if char.isalnum() else "_" for char in name)
    folder = Path(scale.folder) / slug / (f"{probe}{repeat}" if repeat or probe == "full" else probe)
    # The first full run is the one that is started again, in its own folder.
    run = folder.with_name("full0") / "run" if is_restart else folder / "run"
    ladder = build_config(base, [*scale.overrides, *rung.config])
    pairs = ladder.train.global_batch * (rung.workers if scale.scaling == "weak" else 1)
    workers = rung.workers
    if probe == "alone":
        if pairs % workers:
            raise UsageError(f"{name}: a global batch of {pairs} does not divide over {workers} workers")
        pairs, workers = pairs // workers, 1
    nodes = 1 if probe == "alone" else rung.nodes or (workers if scale.launcher == "slurm" else None)
    own = [
        f"run.dir={run}",
        f"cluster.num_workers={workers}",
        f"train.global_batch={pairs}",
        f"train.max_steps={scale.steps + RESTART_STEPS * is_restart}",
        # One is written behind the last step but one, and so is part of the last line.
        f"train.checkpoint_every_steps={scale.steps - 1}",
        "run.log_every_steps=1",
        "run.time_phases=true",
        "run.tensorboard=false",
        "data.val_split=none",
        # A rung that lost a worker measured something else.
        "cluster.max_failures=0",
        "cluster.rejoin_timeout_s=0",
    ]
    own += [f"cluster.num_nodes={nodes}"] if nodes else []
    own += [f"run.probe={probe}"] if probe in ("synthetic", "loader") else []
    own += ["run.resume=auto"] if is_restart else []
    return Job(rung, name, probe, repeat, folder, build_config(base, [*scale.overrides, *rung.config, *own]))


def run_ladder(
    scale: ScaleConfig,
    base: Path,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Run what is missing, one run at a time.

    Args:
        keep: gets what is known so far after each rung but the last one, without a model of scaling.
    Returns: `rows`, as `build_rows`; `model`, as `build_predictions`; and what was asked.
    """
    jobs, footprints = plan_jobs(scale, base), dict[str, Footprint]()
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def tell(done: list[Job]) -> dict[str, Any]:
        rows = build_rows(scale, done, found, footprints)
        good = {key: [record for record in records if not record["reason"]] for key, records in found.items()}
        steps = {key: [r["phase_s"] for r in records] for key, records in good.items() if key[1] != "restart"}
        why_not = f"the ladder has not ended, {len(done)} of its {len(jobs)} runs are done; start it again to go on"
        return {
            "scaling": scale.scaling,
            "flop_rule": "model FLOPs of a step: 3 x forward (torch.utils.flop_counter), losses with it, "
            "recomputation not",
            "commit": read_commit(),
            "network": scale.network and scale.network.model_dump(),
            "rows": rows,
            "model": build_predictions(scale, base, rows, steps) if done == jobs else {"why_not": why_not},
        }

    for number, job in enumerate(jobs, start=1):
        record = run_job(job, scale, say)
        found.setdefault((job.name, job.probe), []).append(record)
        say(f"{number}/{len(jobs)}  {job.name}, {job.probe}: {record['reason'] or _describe_record(job, record)}")
        if number < len(jobs) and jobs[number].name != job.name:
            keep(tell(jobs[:number]))
    return tell(jobs)


def _describe_record(job: Job, record: dict[str, Any]) -> str:
    if job.probe == "restart":
        return f"{record['restart_s']:.1f} s to its first step"
    return f"{job.config.train.global_batch / _compute_step_s([record]):,.1f} pairs/s"


def run_job(job: Job, scale: ScaleConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one run, or read what an earlier call measured; one that failed before is tried again.

    Returns: `reason` (empty where it went well) and, step by step behind the warm-up, `samples_per_s`, `step_s`,
        `phase_s`, `lag_s`, `sent_mib`, `power_w`, `loss`; `checkpoint_s`, `memory_mib`, `start_s`; of a restart
        `restart_s` alone; and `read_origin`.
    """
    key, path, run = compute_key(job, scale), job.folder / "measured.json", Path(job.config.run.dir)
    known = read_kept(path, key)
    if known and not known["reason"]:
        _clear(job, scale, is_good=True)
        return known
    is_restart = job.probe == "restart"
    if is_restart and read_newest_step(run) != scale.steps:
        again = f"remove {job.folder.with_name('full0') / 'measured.json'} to measure it anew"
        return {"reason": f"the whole run left no checkpoint of its last step to start from; {again}"}
    if scale.launcher == "slurm":
        end_left_job(job.folder, say)
    if run.exists() and not is_restart:
        # What a run left that was cut off would be taken for a part of this one.
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        run.rename(job.folder / f"run-{int(time.time())}")
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.is_full and job.repeat == 0:
        # How long another run took to start again is not this one's.
        (job.folder.with_name("restart") / "measured.json").unlink(missing_ok=True)
    config = job.folder / "config.yaml"
    config.write_text(dump_config(job.config))
    began, reason, log = time.time(), "", job.folder / "log"
    try:
        if scale.launcher == "slurm":
            began = run_slurm_job(build_batch(job, scale, config), log, say)
        else:
            run_logged([sys.executable, "-m", "place", "pretrain", "--config", str(config)], log, scale.timeout_s)
    except RunError as error:
        reason = str(error)
    measured = read_restart(run, scale, began) if is_restart else read_steps(run, scale, job.config, began)
    record = {"reason": reason, **measured, **read_origin(run)}
    if not reason and is_restart and record["restart_s"] is None:
        record["reason"] = f"no new step was logged ({log})"
    elif not reason and not is_restart and not record["samples_per_s"]:
        record["reason"] = f"no step behind the warm-up was logged ({log})"
    write_kept(path, key, record)
    _clear(job, scale, is_good=not record["reason"])
    return record


def _clear(job: Job, scale: ScaleConfig, is_good: bool) -> None:
    """Remove the checkpoints of a run, but those that it will be started again from."""
    waits = job.is_full and job.repeat == 0 and "restart" in scale.probes
    if not (waits and is_good) and (is_good or job.probe != "restart"):
        shutil.rmtree(Path(job.config.run.dir) / "checkpoints", ignore_errors=True)


def compute_key(job: Job, scale: ScaleConfig) -> str:
    """What a measurement hangs on, as a hash: configuration, launcher, and the data where they are seen here."""
    data = ""
    with contextlib.suppress(UsageError, RunError):
        data = read_fingerprint(job.config.data)
    parts = [dump_config(job.config), scale.steps, scale.warmup_steps, scale.launcher, data]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_batch(job: Job, scale: ScaleConfig, config: Path) -> list[str]:
    """What follows `sbatch` for a run: the job's own limits, those of the site, the script and its arguments."""
    # Slurm keeps the time: what a job waits in the queue does not count.
    limits = [f"--nodes={job.config.cluster.num_nodes}", "--no-requeue", f"--time={math.ceil(scale.timeout_s / 60)}"]
    site = shlex.split(os.environ.get("PLACE_SBATCH", ""))
    # The script would take every GPU of its nodes.
    return [*limits, *site, str(SLURM_SCRIPT), str(config), f"cluster.num_workers={job.config.cluster.num_workers}"]


def read_steps(run: Path, scale: ScaleConfig, config: Config, began: float) -> dict[str, Any]:
    """What a run wrote of its steps, without those of the warm-up and the one that a checkpoint was written in."""
    records = [record for record in read_jsonl(run / "metrics.jsonl") if "samples_per_s" in record]
    pairs = list(zip(records, records[1:]))[scale.warmup_steps - 1 :]
    saved = [after for _, after in pairs if "checkpoint_copy_s" in after]
    pairs = [pair for pair in pairs if pair[1] not in saved]
    # From line to line: what writing the line takes is part of the step.
    seconds = [after["time"] - before["time"] for before, after in pairs]
    steps = [after for _, after in pairs]
    return {
        # A clock of whole milliseconds shows no time between batches of one burst.
        "samples_per_s": [config.train.global_batch / max(value, 1e-3) for value in seconds],
        "step_s": seconds,
        "phase_s": [step.get("phase_s", {}) for step in steps],
        "lag_s": [step["lag_s"] for step in steps if "lag_s" in step],
        "sent_mib": [step["sent_mib"] for step in steps if "sent_mib" in step],
        "loss": [record["total"] for record in records if "total" in record],
        "power_w": [step["gpu_power_w"] for step in steps if "gpu_power_w" in step],
        "checkpoint_s": [step["checkpoint_wait_s"] + step["checkpoint_copy_s"] for step in saved],
        "memory_mib": max((step.get("memory_mib", 0) for step in steps), default=0),
        "start_s": round(records[0]["time"] - began, 2) if records else None,
    }


def read_restart(run: Path, scale: ScaleConfig, began: float) -> dict[str, Any]:
    """Seconds from the command that a run was started again with, at unix time `began`, to its first new step."""
    records = [record for record in read_jsonl(run / "metrics.jsonl") if "samples_per_s" in record]
    new = [record for record in records if record["step"] > scale.steps and record["time"] > began]
    return {"restart_s": round(new[0]["time"] - began, 2) if new else None}


def read_origin(run: Path) -> dict[str, Any]:
    """What made a measurement: commit, versions, device, and on how many nodes; nothing of a run that did not start."""
    if not (run / "run.json").is_file():
        return {}
    about = json.loads((run / "run.json").read_text())
    workers = [worker for record in read_jsonl(run / "attempts.jsonl") for worker in record.get("workers", [])]
    return {
        "commit": about["commit"],
        "versions": ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "deepspeed")),
        "device": ", ".join(sorted({worker["device"] for worker in workers})),
        "nodes": len({worker["host"] for worker in workers}),
    }


def build_rows(
    scale: ScaleConfig,
    jobs: list[Job],
    found: dict[tuple[str, str], list[dict[str, Any]]],
    footprints: dict[str, Footprint] | None = None,
) -> list[dict[str, Any]]:
    """A row for each rung and probe: rates, efficiency against the smallest rung, where a step goes, costs.

    A restart that went well is the `restart_s` of its rung's full row, and no row of its own.

    Args:
        footprints: those known from an earlier call, which gets what it had to measure.

    Returns: `runs` that went well, `runs_failed` beside them; `pairs_per_s` all pairs over all seconds, which costs and
        efficiency are counted from; `step_pairs_per_s` median, p5, p95 of single steps, which come in bursts where
        reading is the limit; `efficiency` of a worker against a worker of the smallest rung that went well,
        `efficiency_node` against one of a single node, both among rungs of equal `config` and absent where there is no
        other; `nodes` None where not known; `phase_s` means, `unexplained` the share of the step that they miss;
        `checkpoint_s` what a step waits for a checkpoint, which is in no other figure; `start_s` from the command to
        the first step of a new run, `restart_s` to that of one that goes on from its checkpoint; `exposed_s` what is
        waited for in collectives, `exposed_by` whether the phases tell, or `alone` (see `HIDDEN`); `mfu` of the model's
        FLOPs (`flop_rule`), under what `mfu_assumed` says of them;
        `commit`, `versions`, `device` of the runs, None where an earlier version did not keep them.
    Source: ours.
    """
    rows: list[dict[str, Any]] = []
    footprints = {} if footprints is None else footprints
    for job in {(job.name, job.probe): job for job in jobs}.values():
        records = found.get((job.name, job.probe), [])
        good = [record for record in records if not record["reason"]]
        if job.probe == "restart" and good:
            full = next(row for row in rows if (row["rung"], row["probe"]) == (job.name, "full"))
            full["restart_s"] = good[0]["restart_s"]
            continue
        engine = job.config.engine
        row: dict[str, Any] = {
            "rung": job.name,
            "probe": job.probe,
            "config": list(job.rung.config),
            "workers": job.rung.workers,
            "nodes": _read_nodes(good, job.config.cluster.num_nodes),
            "engine": engine.kind if engine.kind == "torch" else f"ZeRO-{engine.zero_stage}",
            "precision": engine.precision,
            "global_batch": job.config.train.global_batch,
            "hold_out": job.rung.hold_out,
            "status": "ok" if good else "failed",
            "runs_failed": len(records) - len(good),
            "reason": "; ".join(sorted({record["reason"] for record in records if record["reason"]})),
            "mfu": None,
        }
        for name in ORIGIN:
            row[name] = " | ".join(sorted({r[name] for r in good or records if r.get(name)})) or None
        if good:
            row |= _summarize(good, job.config)
            if job.probe != "loader":
                shape = f"{job.config.data} {job.config.model} {job.config.loss} {job.config.engine}"
                if shape not in footprints:
                    footprints[shape] = measure_footprint(job.config)
                row |= _describe_work(job, footprints[shape], row["step_s"], scale)
        rows.append(row)
    _add_exposed(rows, found)
    _add_efficiency(rows)
    _add_curves(rows, found)
    return rows


def _read_nodes(records: list[dict[str, Any]], asked: int | None) -> int | None:
    """Nodes that runs were on; those asked for where they say none, or not the same."""
    counts = {record.get("nodes") for record in records}
    return counts.pop() or asked if len(counts) == 1 else asked


def _compute_step_s(records: list[dict[str, Any]]) -> float:
    """Mean seconds of a step: their median is near 0 where batches come in bursts."""
    return max(float(np.mean([value for record in records for value in record["step_s"]])), 1e-6)


def _summarize(records: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    workers, step_s = config.cluster.num_workers, _compute_step_s(records)
    rate = config.train.global_batch / step_s
    rates = [rate for record in records for rate in record["samples_per_s"]]
    phases = [phase for record in records for phase in record["phase_s"] if phase]
    names = {name: None for phase in phases for name in phase}
    means = {name: float(np.mean([phase.get(name, 0.0) for phase in phases])) for name in names}
    low, median, high = (float(value) for value in np.percentile(rates, [5, 50, 95]))
    exposed = [phase.get("gather", 0.0) + phase.get("communication", 0.0) for phase in phases]
    lags = [value for record in records for value in record["lag_s"]]
    sent = [value for record in records for value in record["sent_mib"]]
    # What an earlier version measured is kept, without power and checkpoints.
    power_w = [value for record in records for value in record.get("power_w", [])]
    saved_s = [value for record in records for value in record.get("checkpoint_s", [])]
    return {
        "runs": len(records),
        "steps": len(rates),
        "pairs_per_s": rate,
        "pairs_per_s_worker": rate / workers,
        "step_pairs_per_s": {"median": median, "p5": low, "p95": high},
        "step_s": step_s,
        "phase_s": means,
        "unexplained": abs(1 - sum(means.values()) / step_s) if means else None,
        # On GPUs phases hold their communication.
        "exposed_s": float(np.median(exposed)) if any(exposed) or (exposed and workers == 1) else None,
        "exposed_by": "phases" if any(exposed) or (exposed and workers == 1) else None,
        "lag_s": float(np.median(lags)) if lags else None,
        "sent_mib": float(np.mean(sent)) if sent else None,
        "checkpoint_s": float(np.median(saved_s)) if saved_s else None,
        "memory_mib": max(record["memory_mib"] for record in records) or None,
        "start_s": float(np.median([record["start_s"] for record in records])),
        "worker_hours_per_million": 1e6 * workers / rate / 3600,
        "kwh_per_million": float(np.mean(power_w)) * 1e6 / rate / 3.6e6 if power_w else None,
    }


def count_work(config: Config, footprint: Footprint, world: int, pairs: int) -> dict[str, float]:
    """FLOPs of one of `world` workers in a step of `pairs`, those of the model alone, and the bytes that it sends."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch": pairs})})
    plan = build_plan(config, world, pairs, 0)
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else None
    traffic = compute_traffic(footprint, plan, config, stage)
    return {
        "flop_worker": compute_flops(footprint, plan, config) / world,
        "model_flop_worker": compute_flops(footprint, plan, config, recomputed=False) / world,
        "bytes_worker": sum(traffic.values()),
    }


def _describe_work(job: Job, footprint: Footprint, step_s: float, scale: ScaleConfig) -> dict[str, Any]:
    config, world = job.config, job.config.cluster.num_workers
    work = count_work(config, footprint, world, config.train.global_batch)
    network = job.rung.network or scale.network
    return {
        **work,
        "local_batch": config.train.global_batch // world,
        "micro_batch": config.train.global_batch // world // compute_accumulation(config.train, world),
        "mfu": work["model_flop_worker"] / step_s / (scale.peak_tflops * 1e12) if scale.peak_tflops else None,
        "mfu_assumed": "; ".join(footprint.assumed) if scale.peak_tflops else None,
        "rounds": compute_rounds(world, network.topology) if network else None,
        "network": network.model_dump() if network else None,
    }


def build_predictions(scale: ScaleConfig, base: Path, rows: list[dict[str, Any]], steps: Steps) -> dict[str, Any]:
    """Fit the model to the full rungs that went well, and say what it gives for those held out and for larger sizes.

    One set of factors holds for one `config`: that of the base where such a rung was measured, else that of most rungs.

    Args:
        steps: the phases of the steps of each run.
    Returns: `factors`; `resamples`, the same fitted to resampled runs, for intervals; `rungs`, measured beside
        predicted seconds; `sizes`, predicted; `notes`, how exposed communication was found and which rungs and sizes
        were left out; or only `why_not`.
    """
    full = [row for row in rows if row["probe"] == "full" and row["status"] == "ok" and row["network"]]
    own = choose_config([row["config"] for row in full])
    others = [row["rung"] for row in full if row["config"] != own]
    full = [row for row in full if row["config"] == own]
    alone = {row["rung"]: row for row in rows if row["probe"] == "alone" and row["status"] == "ok"}
    hidden = [row["rung"] for row in full if row["exposed_by"] != "phases"]
    lacking = [rung for rung in hidden if rung not in alone]
    full = [row for row in full if row["rung"] not in lacking]
    unseen = (
        f"the phases of {', '.join(lacking)} hold their communication, as they do on GPUs, "
        "and no `alone` row is there to tell it from compute"
    )
    if lacking and not any(row["workers"] > 1 for row in full):
        return {"why_not": f"{unseen}; take `alone` into probes"}
    beside = {rung: (alone[rung], steps[rung, "alone"]) for rung in hidden if rung not in lacking}
    points = [build_point(row, steps[row["rung"], "full"], beside.get(row["rung"])) for row in full]
    fitted = [point for row, point in zip(full, points, strict=True) if not row["hold_out"]]
    if not fitted:
        return {"why_not": "no rung that went well has a network and is not held out"}
    several = [point for point in fitted if point.rounds]
    if several and not any(compute_typical(point)[1] for point in several):
        return {"why_not": "no rung of several workers shows any exposed communication to fit to"}
    notes = [HIDDEN] if beside else []
    if lacking:
        notes.append(f"left out of the model: {unseen}")
    if others:
        fitted_with = " ".join(own) or "no config of their own"
        notes.append(f"left out of the model: {', '.join(others)}, for the rungs fitted have {fitted_with}")
    models = fit_resampled(fitted)
    rungs = []
    for row, point in zip(full, points, strict=True):
        network = point.rounds, point.bandwidth, point.latency_s
        says = predict_interval(models, point.flop_worker, point.bytes_worker, *network)
        compute, exposed, rest = compute_typical(point).tolist()
        measured = {"compute": compute, "exposed": exposed, "rest": rest, "step": compute + exposed + rest}
        rungs.append({"rung": row["rung"], "hold_out": row["hold_out"], "measured": measured, "predicted": says})
    config = build_config(base, [*scale.overrides, *own])
    footprint, sizes = measure_footprint(config), []
    works = {}
    if scale.predict and not several:
        notes.append(
            "no rung of several workers was fitted: what they wait for each other is not known, none is predicted"
        )
    for world in scale.predict_workers if scale.predict and several else ():
        pairs = config.train.global_batch * (world if scale.scaling == "weak" else 1)
        try:
            works[world] = pairs, count_work(config, footprint, world, pairs)
        except UsageError as error:
            notes.append(f"{world} workers are not predicted: {error}")
    for other in scale.predict:
        for world, (pairs, work) in works.items():
            network = describe_network(other, world)
            says = predict_interval(models, work["flop_worker"], work["bytes_worker"], *network)
            sizes.append({"network": other.name, "workers": world, "global_batch": pairs, "predicted": says})
    if sizes and are_alike(fitted):
        notes.append(SAME_WORK)
    resamples = [list(model) for model in models[1:]]
    return {"factors": models[0]._asdict(), "resamples": resamples, "rungs": rungs, "sizes": sizes, "notes": notes}


def _add_exposed(rows: list[dict[str, Any]], found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Exposed communication of full rungs whose phases hold it, from one worker with its share, where that was run."""
    good = {(row["rung"], row["probe"]): row for row in rows if row["status"] == "ok"}
    for (rung, probe), row in good.items():
        alone = good.get((rung, "alone"))
        if probe != "full" or row["exposed_by"] or alone is None:
            continue
        phases = [[r["phase_s"] for r in found[rung, name] if not r["reason"]] for name in ("full", "alone")]
        if all(step for runs in phases for run in runs for step in run):
            point = build_point(row, phases[0], (alone, phases[1]))
            row |= {"exposed_s": float(compute_typical(point)[1]), "exposed_by": "alone"}


def choose_config(configs: Sequence[list[str]]) -> list[str]:
    """Of the `config` of each rung the empty one where there is one, else that of most."""
    return [] if [] in configs else max(configs, key=configs.count, default=[])


def _add_efficiency(rows: list[dict[str, Any]]) -> None:
    """Of a worker, among rungs of equal config: against the smallest, where they differ in size, and against one node.

    One node is the rung with the most workers on one; smaller ones are not compared with it.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["probe"] in ("full", "synthetic") and row["status"] == "ok":
            groups.setdefault((row["probe"], *row["config"]), []).append(row)
    for own in groups.values():
        base = min(own, key=lambda row: row["workers"])
        for row in own if len({row["workers"] for row in own}) > 1 else ():
            row["efficiency"] = row["pairs_per_s_worker"] / base["pairs_per_s_worker"]
        node = max((row for row in own if row["nodes"] == 1), key=lambda row: row["workers"], default=None)
        larger = [row for row in own if (row["nodes"] or 1) > 1]
        if node and larger:
            for row in [node, *larger]:
                row["efficiency_node"] = row["pairs_per_s_worker"] / node["pairs_per_s_worker"]


def _add_curves(rows: list[dict[str, Any]], found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """How far losses of full runs, repeats too, lie off the first run of their global batch, at most; None for it."""
    first: dict[int, np.ndarray] = {}
    for row in rows:
        if row["probe"] != "full" or row["status"] != "ok":
            continue
        curves = [np.array(r["loss"]) for r in found[row["rung"], "full"] if not r["reason"]]
        if row["global_batch"] not in first:
            first[row["global_batch"]] = curves.pop(0)
        base = first[row["global_batch"]]
        sizes = [min(len(base), len(losses)) for losses in curves]
        apart = [np.max(np.abs(losses[:size] / base[:size] - 1)) for losses, size in zip(curves, sizes)]
        row["loss_apart"] = float(max(apart)) if apart else None


def read_model(path: Path) -> tuple[list[Model], Network]:
    """What a ladder was fitted with, as `fit_resampled`, and the network it was measured on. Raises UsageError.

    Files of before the resamples were kept give the fit alone.
    """
    try:
        results = json.loads(path.read_text())
        factors, rows = results["model"]["factors"], results["rows"]
        # Earlier versions kept that of each row alone: workers of one node may have another one.
        most = max((row for row in rows if row.get("network")), key=lambda row: row["workers"])
        models = [Model(**factors), *(Model(*factors) for factors in results["model"].get("resamples", []))]
        return models, Network(**(results.get("network") or most["network"]))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the scaling.json of a `place scale`") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} holds no fitted model; give the scaling.json of a ladder with a network") from None


def list_faults(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What a reader must know first: runs that failed, gaps in the breakdown, losses and origins that differ."""
    for row in rows:
        where = f"{row['rung']}, {row['probe']}"
        if row["status"] != "ok":
            yield f"{where}: failed, {row['reason']}"
        elif row.get("runs_failed"):
            yield f"{where}: {row['runs_failed']} of {row['runs'] + row['runs_failed']} runs failed: {row['reason']}"
        if row.get("unexplained") is not None and row["unexplained"] > 0.03:
            yield f"{where}: the phases miss {row['unexplained']:.1%} of the step"
        if (row.get("loss_apart") or 0.0) > 1e-2:
            yield f"{where}: its losses are up to {row['loss_apart']:.2%} off those of the first run with that batch"
    for name in ORIGIN:
        rungs: dict[str, dict[str, None]] = {}
        for row in (row for row in rows if row["status"] == "ok"):
            for value in (row.get(name) or "not recorded").split(" | "):
                rungs.setdefault(value, {})[row["rung"]] = None
        if len(rungs) > 1:
            said = "; ".join(f"{value} ({', '.join(of)})" for value, of in rungs.items())
            yield f"the rows differ not only in size: {name} {said}"
