"""Which charts a run's logs permit; what was not recorded is named instead of drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from place.reporting.charts import Line, Marks, Panel
from place.reporting.history import Attempt, History, Record

LOSSES = {
    "total": "Total loss",
    "instance": "ITA: images with reports",
    "pathology": "PCMA: observations with sentences",
    "correlation": "CCE: correlation of patches",
    "tokens": "Tokens: patches with words",
}
TEMPERATURES = {"temperature_instance": "ITA", "temperature_pathology": "PCMA"}
MIB_PER_GIB = 1024


class Charted(NamedTuple):
    """Charts in groups by heading, and a line each about what is not among them."""

    groups: dict[str, list[Panel]]
    left_out: list[str]


def build_charts(history: History) -> Charted:
    """All charts that a run's records hold.

    Source: ours.
    """
    optimiser, speed = _build_optimiser(history), _build_speed(history)
    left_out: list[str] = []
    losses = list(filter(None, (_build_loss(history, name, left_out) for name in LOSSES)))
    kept = {}
    for heading, panels in (("Losses", losses), ("Optimiser", optimiser), ("Speed and memory", speed)):
        left_out += [f"{panel.title}: {why_not}" for panel in panels if (why_not := _why_not(panel))]
        kept[heading] = [panel for panel in panels if not _why_not(panel)]
    if not history.attention:
        left_out.append("V-POR attention over time: not recorded")
    return Charted({heading: panels for heading, panels in kept.items() if panels}, left_out)


def _why_not(panel: Panel) -> str:
    """Why a chart would show nothing; empty where it shows something."""
    if not panel.lines:
        return "not recorded"
    return "0 throughout" if _is_zero(panel) else ""


def _is_zero(panel: Panel) -> bool:
    """Whether there are values, and all are 0."""
    return bool(panel.lines) and not any(any(line.y) for line in panel.lines)


def build_marks(history: History) -> Marks:
    """Where on the axis of steps workers started again, and where one was a straggler."""
    starts = [attempt.from_step for attempt in history.attempts[1:] if attempt.to_step is not None]
    late = [record["step"] for record in history.steps if "straggler" in record]
    last = max((record["step"] for record in (*history.steps, *history.lost)), default=None)
    return Marks([step for step in starts if step is not None], late, last)


def build_time_line(history: History) -> tuple[Panel, Marks]:
    """Steps over the hours or minutes that worker groups were there; the time between two groups is cut out.

    What a restart cost is seen as a line that begins lower than the one before it ended. Source: ours.
    """
    trained = [attempt for attempt in history.attempts if attempt.to_step is not None]
    working_s = sum(attempt.ended - attempt.began for attempt in trained)
    unit_s, unit = (3600, "hours") if working_s > 2 * 3600 else (60, "minutes")
    lines, starts, late, before_s = [], [], [], 0.0
    records = sorted([*history.steps, *history.lost], key=lambda record: record["time"])
    for place, attempt in enumerate(trained):
        own = [record for record in records if record["attempt"] == attempt.number]
        x = [(before_s + record["time"] - attempt.began) / unit_s for record in own]
        begin = [] if attempt.from_step is None else [before_s / unit_s]
        steps = [*([attempt.from_step] if attempt.from_step is not None else []), *(record["step"] for record in own)]
        lines.append(Line("step" if not place else "", "train", [*begin, *x], [float(step) for step in steps]))
        starts += [before_s / unit_s] if place else []
        late += [when for when, record in zip(x, own) if "straggler" in record]
        before_s += attempt.ended - attempt.began
    return Panel("Steps over time at work", lines, "step", f"{unit} at work"), Marks(starts, late)


def is_gpu_run(attempts: list[Attempt], versions: dict[str, str]) -> bool | None:
    """Whether the workers computed on GPUs; None where neither they nor the version of torch tell."""
    counts = [attempt.num_gpus for attempt in attempts if attempt.num_gpus is not None]
    if counts:
        return any(counts)
    return False if versions.get("torch", "").endswith("+cpu") else None


def _build_loss(history: History, name: str, left_out: list[str]) -> Panel | None:
    lines = [
        _take("train", "train", name, history.steps),
        _take("validation", "validation", f"val_{name}", history.validations),
        _take("done again later", "lost", name, history.lost),
    ]
    panel = Panel(LOSSES[name], [line for line in lines if line.x])
    if _is_zero(panel):
        left_out.append(f"{LOSSES[name]}: 0 throughout, as its weight is")
        return None
    return panel


def _build_optimiser(history: History) -> list[Panel]:
    named = zip(TEMPERATURES.items(), ("train", "other"))
    temperatures = [_take(label, role, name, history.steps) for (name, label), role in named]
    norm = [_take("gradient norm", "train", "grad_norm", history.steps)]
    clip = history.recorded.config.get("optim", {}).get("clip_norm")
    if norm[0].x and clip:
        ends = [norm[0].x[0], norm[0].x[-1]]
        norm.append(Line(f"clipped at {clip:g}", "limit", ends, [float(clip)] * 2))
    return [
        Panel("Temperatures", [line for line in temperatures if line.x]),
        Panel("Gradient norm", [line for line in norm if line.x]),
        _build_single(history, "Learning rate", "lr"),
    ]


def _build_speed(history: History) -> list[Panel]:
    on_gpu = is_gpu_run(history.attempts, history.recorded.about.get("versions", {}))
    memory = {True: "Peak GPU memory of rank 0", False: "Resident memory of rank 0", None: "Memory of rank 0"}[on_gpu]
    panels = [
        _build_single(history, "Throughput", "samples_per_s", "pairs/s"),
        _build_single(history, "Share of time waiting for data", "data_wait_share", "%", lambda share: 100 * share),
        _build_single(history, memory, "memory_mib", "GiB", lambda mib: mib / MIB_PER_GIB),
        _build_single(history, "GPU utilisation, mean of the workers", "gpu_utilisation", "%"),
        _build_single(history, "GPU power of all workers", "gpu_power_w", "kW", lambda watt: watt / 1000),
        _build_single(history, "How much later the last rank comes", "lag_s", "s"),
    ]
    waits = [
        _take("copy to host memory", "train", "checkpoint_copy_s", history.steps),
        _take("write before it", "other", "checkpoint_wait_s", history.steps),
    ]
    panels.append(Panel("What steps waited for checkpoints", [line for line in waits if line.x], "s"))
    return [*panels, _build_phases(history), _build_single(history, "Sent by all hosts, a step", "sent_mib", "MiB")]


def _build_phases(history: History) -> Panel:
    """Mean time of each phase of a step, where `run.time_phases` recorded it."""
    timed = [record for record in history.steps if "phase_s" in record]
    names = {name: None for record in timed for name in record["phase_s"]}
    x = [float(record["step"]) for record in timed]
    lines = [
        Line(name, f"C{place}", x, [1000 * record["phase_s"].get(name, 0.0) for record in timed])
        for place, name in enumerate(names)
    ]
    return Panel("Where the time of a step goes", lines, "ms")


def _build_single(
    history: History, title: str, name: str, unit: str = "", scale: Callable[[float], float] = float
) -> Panel:
    line = _take(title, "train", name, history.steps, scale)
    return Panel(title, [line] if line.x else [], unit)


def _take(label: str, role: str, name: str, records: list[Record], scale: Callable[[float], float] = float) -> Line:
    kept = [record for record in records if name in record]
    return Line(label, role, [float(record["step"]) for record in kept], [scale(record[name]) for record in kept])
