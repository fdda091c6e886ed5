"""What a person sees while preparing or training: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from place.config import Config
from place.runlog import Tail, read_newest_step, read_surviving
from place.runs import Standing, format_span

PLAIN_INTERVAL_S, JUDGE_INTERVAL_S = 5.0, 30.0
RUNS_COLUMNS, RUN_COLUMNS = 100, 36


def build_console() -> Console:
    """A console that keeps to 110 columns where it does not write to a terminal; brackets and colons are plain text."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False, emoji=False)


class _BarOnTerminal:
    """A context with a bar where a person looks; a log has none."""

    def __init__(self, note: str) -> None:
        self.console = build_console()
        self.bar = _build_bar(self.console, note)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()


class PrepareProgress(_BarOnTerminal):
    """Progress of `place prepare` as a context. Final."""

    def __init__(self) -> None:
        super().__init__("{task.fields[note]}")
        self.task = self.bar.add_task("prepare", total=None, note="")
        self.printed = 0.0
        self.began: tuple[float, int] | None = None

    def update(self, done: int, total: int, rejected: int) -> None:
        """Rows done of all, and how many were rejected."""
        self.began = self.began or (time.perf_counter(), done)
        rate, eta_s = compute_pace(time.perf_counter() - self.began[0], done - self.began[1], total - done)
        note = f"{rate:,.0f} rows/s, {rejected:,} rejected"
        self.bar.update(self.task, completed=done, total=total, note=note)
        if not self.console.is_terminal and (time.perf_counter() - self.printed > PLAIN_INTERVAL_S or done == total):
            self.printed = time.perf_counter()
            left = "" if eta_s is None or done == total else f", {timedelta(seconds=round(eta_s))} left"
            self.console.print(f"prepare  {done:,}/{total:,} rows  {note}{left}")

    def print_card(self, card: dict[str, Any], output: str) -> None:
        """The counts of the data card."""
        counts = card["counts"]
        if card.get("already_prepared"):
            self.console.print(f"{output} is already prepared from the same input: nothing to do")
        self.console.print(
            f"{output}: {counts['kept']:,} of {counts['input']:,} rows kept, {counts['rejected']:,} rejected"
        )
        for reason, number in Counter(card["drop_reasons"]).most_common():
            self.console.print(f"  rejected  {reason}: {number:,}")
        for note in card.get("notes", []):
            self.console.print(f"  note      {note}", markup=False)
        for warning, number in card["warnings"].items():
            self.console.print(f"  warning   {warning}: {number:,} (what it means: {output}/card.md)")
        table = Table("split", "images", "studies", "patients", "unique reports", box=None, header_style="bold")
        for split, row in ((name, value) for name, value in counts.items() if isinstance(value, dict)):
            table.add_row(split, *(f"{row[key]:,}" for key in ("images", "studies", "patients", "unique_reports")))
        self.console.print(table)


class ShardProgress(_BarOnTerminal):
    """Progress over the shards of a data set as a context; quiet where nobody looks. Final."""

    def __init__(self, verb: str) -> None:
        super().__init__(f"{verb}, shards")
        self.done = 0
        self.task = self.bar.add_task(verb, total=None)

    def update(self, done: int, total: int) -> None:
        """Shards done of all."""
        self.done = done
        self.bar.update(self.task, completed=done, total=total)


class JudgeProgress(_BarOnTerminal):
    """Progress of `place evaluate` as a context: the step under way; in a log a line now and then. Final."""

    def __init__(self) -> None:
        super().__init__("{task.description}")
        self.task: TaskID | None = None
        self.step, self.printed = "", time.perf_counter()

    def update(self, step: str, done: int, total: int) -> None:
        """What is done of a step; one that was not told of before takes the place of the last."""
        if self.task is None or step != self.step:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task, self.step = self.bar.add_task(step, total=total), step
        self.bar.update(self.task, completed=done, total=total)
        if not self.console.is_terminal and time.perf_counter() - self.printed > JUDGE_INTERVAL_S:
            self.printed = time.perf_counter()
            self.console.print(f"evaluate  {step}  {done:,}/{total:,}")


def print_stats(sums: dict[str, Any], image: dict[str, Any], console: Console) -> None:
    """Mean and standard deviation of each split's stored pixels, and those that training normalises with."""
    table = Table("split", "images", "pixels", "mean", "std", box=None, header_style="bold")
    for split, found in sums.items():
        table.add_row(split, f"{found.images:,}", f"{found.pixels:,}", f"{found.mean:.6f}", f"{found.std:.6f}")
    table.add_row("card", "", "", f"{image['mean']:.6f}", f"{image['std']:.6f}")
    console.print(table)
    console.print("of 1; `card` is what training normalises with: the training pixels before JPEG")


def compute_pace(elapsed_s: float, done: int, left: int) -> tuple[float, float | None]:
    """Rows or steps a second, without those that this run found finished; seconds left, if that is known.

    Source: ours.
    """
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    return rate, left / rate if rate else None


class RunScreen:
    """Follows metrics.jsonl of a run from a thread of its own and shows it. Final."""

    def __init__(self, config: Config, plan: Any):
        self.config, self.plan, self.run_dir = config, plan, Path(config.run.dir)
        self.console = build_console()
        self.bar = _build_bar(self.console, "{task.fields[note]}")
        self.began: dict[str, Any] | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> RunScreen:
        self._print_plan()
        self.attempts, self.metrics = (Tail(self.run_dir / name) for name in ("attempts.jsonl", "metrics.jsonl"))
        if self.console.is_terminal:
            self.bar.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        if self.console.is_terminal:
            self.bar.stop()

    def print_end(self, outcome: str) -> None:
        """How the run ended and where its files are."""
        if outcome == "stopped":
            step = read_newest_step(self.run_dir)
            where = "before the first checkpoint" if step is None else f"at step {step}, checkpoint saved"
            self.console.print(f"stopped {where}; the same command goes on from there")
            return
        if self.config.run.probe != "loader":
            first, last = read_epoch_means(self.run_dir)
            self.console.print(
                f"total train loss {first['total']:.3f} (epoch {first['epoch'] + 1}) -> "
                f"{last['total']:.3f} (epoch {last['epoch'] + 1})"
            )
        self.console.print(f"run folder: {self.run_dir}")

    def _print_plan(self) -> None:
        plan, engine, cluster = self.plan, self.config.engine, self.config.cluster
        stage = f" ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else ""
        self.console.print(
            f"{plan.world} workers by {cluster.launcher}, {engine.kind}{stage}, {engine.precision}; "
            f"{plan.num_samples:,} pairs, {plan.total_steps:,} steps of {plan.global_batch}, {plan.epochs} epochs, "
            f"peak learning rate {plan.peak_lr:.2e}"
        )
        self.console.print(f"image encoder: {_format_source(self.config.model.vision.source)}")
        text = self.config.model.text.source
        extra = "; its tokenizer is trained on the training reports" if text == "scratch" else ""
        self.console.print(f"report encoder: {_format_source(text)}{extra}")
        if plan.dropped_per_epoch:
            self.console.print(
                f"{plan.dropped_per_epoch} pairs do not fill a batch and are left out of each epoch, others each time"
            )
        if not plan.val_steps:
            self.console.print(
                "no validation split that fills a batch: no best checkpoint is chosen, the latest counts"
            )

    def _follow(self) -> None:
        task = self.bar.add_task("pretrain", total=self.plan.total_steps, note="workers are starting")
        printed, launches = 0.0, 0
        named: set[str] = set()  # stragglers that a line of this interval names
        while True:
            ended = self.ended.wait(0.5)
            for record in self.attempts.read():
                for note in record.get("notes", []):
                    self.console.print(note, soft_wrap=True)
                launches += "launch" in record
                if launches > 1 and "launch" in record:
                    self.console.print(f"workers started again (attempt {record['attempt']})")
            for record in self.metrics.read():
                line, left = _format_metrics(record), self._format_left(record)
                self.bar.update(task, completed=record["step"], note=line)
                is_val, is_last = "val_total" in record, record["step"] == self.plan.total_steps
                is_due = is_val or is_last or time.perf_counter() - printed > PLAIN_INTERVAL_S
                if is_due:
                    printed = time.perf_counter()
                    named.clear()
                late = {record["straggler"]} if "straggler" in record else set()
                is_news = bool(late - named)
                named |= late
                where = f"epoch {record['epoch'] + 1:>3}"
                if (is_due or is_news) and not self.console.is_terminal:
                    self.console.print(
                        f"step {record['step']:>6}/{self.plan.total_steps}  {where}  {line}{left}", soft_wrap=True
                    )
                elif is_val or is_news:
                    self.console.print(f"{where}  {line}")
            if ended:
                return

    def _format_left(self, record: dict[str, Any]) -> str:
        """Time to the last step at the pace of this attempt, by the records' own clock; empty where it is not known."""
        if self.began is None or self.began["attempt"] != record["attempt"]:
            self.began = record
        elapsed_s, done = (record[name] - self.began[name] for name in ("time", "step"))
        eta_s = compute_pace(elapsed_s, done, self.plan.total_steps - record["step"])[1]
        return f", {timedelta(seconds=round(eta_s))} left" if eta_s else ""


STATE_COLOURS = {"running": "green", "done": "default", "stopped": "yellow", "failed": "red", "unknown": "magenta"}


def print_runs(standings: list[Standing], folders: list[str]) -> None:
    """A line a run: state, step, loss, speed, what is left; below them why those are not done that are not."""
    console = build_console()
    if not standings:
        console.print(f"no run in or below {', '.join(folders)}")
        return
    columns = (Column(header, justify="right", no_wrap=True) for header in ("step", "loss", "pairs/s", "ETA", "age"))
    table = Table(
        Column("run", overflow="fold"), Column("state", no_wrap=True), *columns, box=None, header_style="bold"
    )
    above = find_common(standings)
    if above:
        console.print(f"below {above}:", soft_wrap=True)
    for run in standings:
        state = Text(run.state, STATE_COLOURS[run.state])
        name = os.path.relpath(run.run, above) if above else run.run
        table.add_row(name, state, _show_step(run), *_show_pace(run))
    console.print(table, width=min(console.width, RUNS_COLUMNS))
    for run in standings:
        if run.reason:
            console.print(f"{run.state}  {run.run}: {run.reason}", soft_wrap=True)


def find_common(standings: list[Standing]) -> str:
    """The folder that all runs are below, where their names are too long to be shown with it; else empty."""
    names = [run.run for run in standings]
    if max(map(len, names)) <= RUN_COLUMNS or len({os.path.isabs(name) for name in names}) > 1:
        return ""
    return os.path.commonpath([os.path.dirname(name) for name in names])


def _show_step(run: Standing) -> str:
    return "" if run.step is None or run.total_steps is None else f"{run.step:,}/{run.total_steps:,}"


def _show_pace(run: Standing) -> list[str]:
    shown = [
        "" if run.loss is None else f"{run.loss:.3f}",
        "" if run.samples_per_s is None else f"{run.samples_per_s:,.0f}",
    ]
    return [*shown, *("" if span is None else format_span(span) for span in (run.eta_s, run.age_s))]


def print_findings(findings: list[Any]) -> None:
    """What `place doctor` found, a line each, with what to do below it."""
    console, colours = build_console(), {"OK": "green", "WARN": "yellow", "FAIL": "red", "SKIP": "dim"}
    for finding in findings:
        where = f"  [{', '.join(finding.hosts)}]" if finding.hosts else ""
        state = (f"{finding.state:<4}", colours[finding.state])
        console.print(Text.assemble(state, f"  {finding.check:<14}  {finding.text}{where}"), soft_wrap=True)
        if finding.advice:
            console.print(f"{'':22}-> {finding.advice}", soft_wrap=True)
    counts = {state: sum(finding.state == state for finding in findings) for state in colours}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count))


MEMORY_COLUMNS = ("weights", "master", "optimiser", "gradients", "buckets", "activations", "features", "losses", "peak")


def print_forecast(forecast: dict[str, Any]) -> None:
    """What `place plan` found: model, steps, memory a worker by setting, traffic, time, data, assumptions."""
    console, plan, time_of = build_console(), forecast["plan"], forecast["time"]
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in forecast["parameters"].items())
    console.print(f"model: {sum(forecast['parameters'].values()) / 1e6:.1f} M parameters ({parts})")
    console.print(
        f"steps: {plan['num_samples']:,} pairs, {plan['steps_per_epoch']:,} steps of {plan['global_batch']} an epoch, "
        f"{plan['epochs']} epochs, {plan['total_steps']:,} steps, {plan['warmup_steps']:,} of warm-up"
    )
    chunks = f" in {plan['accumulation']} chunks of {plan['micro_batch']}" if plan["accumulation"] > 1 else ""
    console.print(f"workers: {plan['world']}, {plan['local_batch']} pairs each{chunks}")
    console.print(f"\nmemory a worker in GiB, {forecast['usable_gib']:.0f} usable (* this config):")
    table = Table(Column(no_wrap=True), *MEMORY_COLUMNS, "fits", box=None, header_style="bold")
    for row in forecast["memory"]:
        numbers = [f"{row[f'{name}_gib']:.2f}" for name in MEMORY_COLUMNS]
        table.add_row(_name_setting(row), *numbers, "yes" if row["fits"] else "no")
    console.print(table)
    console.print("\ntraffic a worker and step in GiB sent, at the bound of each collective:")
    for stage, sizes in forecast["traffic_gib"].items():
        said = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
        console.print(f"  ZeRO-{stage}  {sum(sizes.values()):.2f}  ({said})")
    low_high = time_of["step_s_interval"]
    within = f" ({low_high[0]:.3f} to {low_high[1]:.3f} in 95 % of resampled runs)" if low_high else ""
    console.print(
        f"\ntime: {time_of['tflop_per_step']:,.1f} TFLOP a step, {time_of['step_s']:.3f} s a step{within}, "
        f"{time_of['epoch_s'] / 60:.1f} min an epoch, {time_of['run_h']:.1f} h in all, {time_of['gpu_h']:.0f} GPU hours"
    )
    console.print(
        f"data: a worker eats {time_of['pairs_per_s_worker']:,.0f} pairs/s, the work of about "
        f"{time_of['loader_cores_worker']} cores" + _say_stored(forecast["data"])
    )
    console.print(f"assumed: {'; '.join(forecast['assumed'])}")


def print_scaling(results: dict[str, Any], faults: list[str]) -> None:
    """What `place scale` measured: a line a row, the model against what was held out, and what a reader must know."""
    console = build_console()
    has_restart = any(row.get("restart_s") for row in results["rows"])
    start = "start, restart s" if has_restart else "start s"
    names = ("rung", "what", "pairs/s", "steps p5 to p95", "efficiency", "step ms", "exposed ms", start)
    table = Table(*(Column(n, justify="left" if n in ("rung", "what") else "right") for n in names), box=None)
    for row in (row for row in results["rows"] if row["status"] == "ok"):
        rates, exposed, failed = row["step_pairs_per_s"], row["exposed_s"], row.get("runs_failed", 0)
        table.add_row(
            row["rung"],
            row["probe"] + (f", {row['runs']} of {row['runs'] + failed} runs" if failed else ""),
            f"{row['pairs_per_s']:,.1f}",
            f"{rates['p5']:,.1f} to {rates['p95']:,.1f}",
            f"{row['efficiency']:.0%}" if "efficiency" in row else "-",
            f"{1000 * row['step_s']:,.1f}",
            "-" if exposed is None else ("≈ " if row.get("exposed_by") == "alone" else "") + f"{1000 * exposed:,.1f}",
            f"{row['start_s']:.1f}" + (f", {row['restart_s']:.1f}" if row.get("restart_s") else ""),
        )
    console.print(table)
    for row in (row for row in results["model"].get("rungs", []) if row["hold_out"]):
        # One worker waits for nobody.
        term, what = ("exposed", "exposed communication") if row["measured"]["exposed"] else ("step", "step")
        measured, (says, low, high) = row["measured"][term], row["predicted"][term]
        console.print(
            f"held out, {row['rung']}: {what} {1000 * measured:,.1f} ms, predicted {1000 * says:,.1f} "
            f"({1000 * low:,.1f} to {1000 * high:,.1f}), off by {abs(says / measured - 1):.1%}",
            soft_wrap=True,
        )
    for line in results["model"].get("notes", []):
        console.print(line, soft_wrap=True)
    if "why_not" in results["model"]:
        console.print(f"no model of scaling: {results['model']['why_not']}", soft_wrap=True)
    for line in faults:
        console.print(line, style="yellow", soft_wrap=True)


def _name_setting(row: dict[str, Any]) -> str:
    engine = "torch" if row["stage"] is None else f"ZeRO-{row['stage']}"
    recompute = ", recompute" if row["recompute"] else ""
    chunks = f", {row['accumulation']} chunks" if row["accumulation"] > 1 else ""
    return ("* " if row["is_own"] else "  ") + engine + recompute + chunks


def _say_stored(stored: dict[str, Any]) -> str:
    if not stored:
        return ""
    sizes = f"{stored['stored_gib']:.2f} GiB in {stored['shards']} shards, {stored['cache_gib']:.2f} GiB unpacked"
    return f"; {sizes} (read once an epoch, cached on each node)"


def read_epoch_means(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean logged training losses of the first and of the last epoch, over the surviving lineage."""
    records = read_surviving(run_dir / "metrics.jsonl")
    ends = []
    for epoch in (records[0]["epoch"], records[-1]["epoch"]):
        rows = [record for record in records if record["epoch"] == epoch]
        ends.append({"epoch": epoch, "step": rows[-1]["step"], "total": sum(row["total"] for row in rows) / len(rows)})
    return ends[0], ends[1]


def _format_source(source: str) -> str:
    return "trained from random weights" if source == "scratch" else f"starts from {source}"


def _format_metrics(record: dict[str, Any]) -> str:
    if "samples_per_s" in record and "total" not in record:
        return f"{record['samples_per_s']:,.0f} pairs/s read, nothing is trained (run.probe=loader)"
    if "val_total" in record:
        return (
            "validation loss {val_total:.3f} = ITA {val_instance:.3f}, PCMA {val_pathology:.3f}, "
            "CCE {val_correlation:.4f}"
        ).format(**record)
    tokens = ", tokens {tokens:.3f}" if record.get("tokens") else ""
    late = "; {straggler} is {lag_s:.2f} s late each step" if "straggler" in record else ""
    return (
        "loss {total:.3f} = ITA {instance:.3f}, PCMA {pathology:.3f}, CCE {correlation:.4f}" + tokens + "; "
        "{samples_per_s:.0f} pairs/s, waits {data_wait_share:.0%}" + late
    ).format(**record)


def _build_bar(console: Console, note: str) -> Progress:
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # rich forgets what is older than 30 s, and with it the time left where lines are further apart.
    return Progress(*columns, TextColumn(note, markup=False), console=console, speed_estimate_period=600)
