"""`report.html` of a run: one page that shows all that its logs hold; it needs nothing else, and reads on paper."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from place.config import RunError, UsageError
from place.data.page import embed, render_page, write_page
from place.reporting.charts import draw_attention, draw_panel
from place.reporting.history import (
    Attempt,
    Epoch,
    History,
    Record,
    compute_gpu_hours,
    compute_working_s,
    read_history,
)
from place.reporting.panels import build_charts, build_marks, build_time_line, is_gpu_run
from place.runs import Standing, compute_standing, format_span, is_run, tell_damage

PAGE = "report.html"


class Tile(NamedTuple):
    """A figure and what it is."""

    value: str
    name: str


class AttemptRow(NamedTuple):
    """A line of the table of attempts, as shown."""

    number: int
    began: str
    workers: str
    steps: str
    lost: str
    idle: str
    working: str
    pace: str
    reasons: list[str]


class EpochRow(NamedTuple):
    """A line of the table of epochs, as shown."""

    epoch: Epoch
    again: int
    """Pairs that the epoch saw more than once."""
    train: str
    val: str


def write_report(run: Path) -> Path:
    """Write the page of a run into its folder, from its logs; again while it goes on.

    Raises:
        UsageError: it is no run folder.
        RunError: a log is damaged, nothing was started yet, or the page cannot be written.
    Source: ours.
    """
    if not is_run(run):
        raise UsageError(
            f"{run} is no run folder (no config.yaml and run.json); give the run.dir of a `place pretrain`"
        )
    with tell_damage(run):
        history = read_history(run)
        if not history.attempts:
            raise RunError(f"{run}: no worker has started yet, there is nothing to report; wait for the first step")
        page = build_page(history, compute_standing(str(run), history.recorded, time.time()))
    return write_page(run / PAGE, page, "make the run folder writable, or copy it")


def build_page(history: History, standing: Standing) -> str:
    """The page as HTML."""
    charted, marks, plan = build_charts(history), build_marks(history), history.recorded.about["plan"]
    has_steps = bool(history.steps or history.lost)
    charts = {
        heading: [(panel.title, embed(draw_panel(panel, marks), "image/svg+xml")) for panel in panels]
        for heading, panels in charted.groups.items()
    }
    return render_page(
        "place.reporting",
        "run.html",
        title=standing.run,
        standing=standing,
        tiles=build_tiles(history, standing),
        facts=build_facts(history),
        time_line=_draw_time_line(history) if has_steps else "",
        attention=_draw_attention(history) if history.attention else "",
        charts=charts,
        marks=marks,
        num_lost=len(history.lost),
        left_out=charted.left_out,
        attempts=build_attempt_rows(history.attempts, [*history.steps, *history.lost], plan["total_steps"]),
        epochs=build_epoch_rows(history),
        num_samples=plan["num_samples"],
        dropped=plan["dropped_per_epoch"],
    )


def build_tiles(history: History, standing: Standing) -> list[Tile]:
    """The figures at the top; those that were not recorded are not among them."""
    steps, validations = history.steps, history.validations
    working_s, gpu_hours = compute_working_s(history.attempts), compute_gpu_hours(history.attempts)
    tiles = [Tile(f"{standing.step:,}", f"of {standing.total_steps:,} steps")]
    if steps:
        tiles.append(Tile(f"{steps[-1]['total']:.3f}", f"total train loss at step {steps[-1]['step']:,}"))
    if validations:
        best = min(validations, key=lambda record: record["val_total"])
        tiles.append(Tile(f"{best['val_total']:.3f}", f"best validation loss, step {best['step']:,}"))
    if history.epochs:
        tiles.append(Tile(f"{sum(epoch.pairs for epoch in history.epochs):,}", "pairs seen"))
    if steps:
        pace = statistics.median(record["samples_per_s"] for record in steps)
        tiles.append(Tile(f"{pace:,.0f}", "pairs/s, median"))
    tiles.append(Tile(format_span(working_s), "at work, over all attempts"))
    if gpu_hours:
        tiles.append(Tile(f"{gpu_hours:,.1f}", "GPU hours"))
    if standing.eta_s is not None:
        tiles.append(Tile(format_span(standing.eta_s), "left"))
    tiles.append(Tile(f"{len(history.attempts) - 1}", "restarts"))
    return tiles


def build_facts(history: History) -> list[tuple[str, str]]:
    """What the run was made of: name and value, without what its folder does not say."""
    config, about = history.recorded.config, history.recorded.about
    plan, data, model, engine = about["plan"], config["data"], config["model"], config["engine"]
    last = max(attempt.ended for attempt in history.attempts)
    streams = ", ".join(stream["path"] for stream in data.get("streams") or ()) or data["path"]
    stage = f" ZeRO-{engine['zero_stage']}" if engine["kind"] == "deepspeed" else ""
    chunks = f" in {plan['accumulation']} chunks" if plan["accumulation"] > 1 else ""
    return [
        (
            "data",
            f"{streams}, split '{data['train_split']}': {plan['num_samples']:,} pairs, {data['image_size_px']} px",
        ),
        ("data fingerprint", about["data_fingerprint"]),
        ("image encoder", describe_encoder(model["vision"])),
        ("report encoder", describe_encoder(model["text"])),
        ("loss weights", describe_weights(config["loss"])),
        ("batch", f"{plan['global_batch']:,} pairs, {plan['local_batch']:,} a worker{chunks}"),
        ("steps", f"{plan['total_steps']:,} in {plan['epochs']} epochs, peak learning rate {plan['peak_lr']:.2e}"),
        ("engine", f"{engine['kind']}{stage}, {engine['precision']}, by {config['cluster']['launcher']}"),
        ("hardware", describe_hardware(history)),
        ("commit", about["commit"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
        ("first and last record", f"{_show_time(history.attempts[0].began)} to {_show_time(last)} UTC"),
    ]


def describe_encoder(section: Record) -> str:
    """An encoder by its section of the configuration: where it starts from, and its size where that is told."""
    source = section["source"]
    if source != "scratch":
        return f"starts from {source}"
    sizes = section.get("overrides") or {key: section[key] for key in ("width", "depth", "num_heads") if key in section}
    said = [section["architecture"]] if "architecture" in section else []
    said += [f"{name.replace('_', ' ')} {value}" for name, value in sizes.items()]
    return f"from random weights: {', '.join(said)}" if said else "from random weights"


def describe_weights(section: Record) -> str:
    """Weights of the loss terms that count."""
    weights = {name: part["weight"] for name, part in section.items() if isinstance(part, dict)}
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)


def describe_hardware(history: History) -> str:
    """Workers, what they compute on, and on how many hosts, of the newest attempt."""
    workers = history.attempts[-1].workers
    on_gpu = is_gpu_run(history.attempts, history.recorded.about["versions"])
    devices = sorted({worker["device"] for worker in workers if "device" in worker})
    kind = ", ".join(devices) or {True: "GPU", False: "cpu", None: "a device that was not recorded"}[on_gpu]
    hosts = sorted({worker["host"] for worker in workers})
    named = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return f"{_count(len(workers), 'worker')} on {kind}, {_count(len(hosts), 'host')} ({named})"


def build_attempt_rows(attempts: list[Attempt], records: list[Record], total_steps: int) -> list[AttemptRow]:
    """The table of attempts, from all training records, those of lost steps too."""
    rows = []
    for place, attempt in enumerate(attempts):
        paces = [record["samples_per_s"] for record in records if record["attempt"] == attempt.number]
        later = [item.from_step for item in attempts[place + 1 :] if item.from_step is not None]
        lost = max(0, attempt.to_step - min(later)) if later and attempt.to_step is not None else 0
        idle = format_span(max(0.0, attempt.began - attempts[place - 1].ended)) if place else ""
        begun = "" if attempt.from_step is None else f"{attempt.from_step:,}"
        steps = begun if attempt.to_step is None else f"{begun} to {attempt.to_step:,}"
        rows.append(
            AttemptRow(
                attempt.number,
                _show_time(attempt.began),
                f"{len(attempt.workers)} on {len({worker['host'] for worker in attempt.workers})}",
                steps,
                f"{lost:,}" if lost else "",
                idle,
                format_span(attempt.ended - attempt.began),
                f"{statistics.median(paces):,.0f}" if paces else "",
                [*attempt.notes, *_say_reasons(attempt, place < len(attempts) - 1, total_steps)],
            )
        )
    return rows


def build_epoch_rows(history: History) -> list[EpochRow]:
    """The table of epochs: samples, mean train loss of the logged steps, validation loss at the end."""
    rows = []
    for epoch in history.epochs:
        own = [record["total"] for record in history.steps if record["epoch"] == epoch.number - 1]
        judged = [record["val_total"] for record in history.validations if record["epoch"] == epoch.number - 1]
        train, val = (f"{statistics.fmean(own):.3f}" if own else ""), (f"{judged[-1]:.3f}" if judged else "")
        rows.append(EpochRow(epoch, epoch.pairs - epoch.distinct, train, val))
    return rows


def _draw_time_line(history: History) -> str:
    panel, marks = build_time_line(history)
    return embed(draw_panel(panel, marks, is_wide=True), "image/svg+xml")


def _draw_attention(history: History) -> str:
    maps = [(record["step"], record["attention"]) for record in history.attention]
    return embed(draw_attention(maps), "image/svg+xml")


def _show_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _say_reasons(attempt: Attempt, is_over: bool, total_steps: int) -> list[str]:
    """Why an attempt ended, as far as anybody noted it."""
    reached = max(attempt.to_step or 0, attempt.from_step or 0)
    return attempt.reasons or (["its end was not recorded"] if is_over and reached < total_steps else [])
