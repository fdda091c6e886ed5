"""What `place scale` writes: scaling.json, scaling.csv, scaling.png, and a page that needs nothing else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from place.cluster.scaling import ORIGIN, PROBES, choose_config, list_faults

from place.data.page import embed, render_page, write_page
from place.evaluation.figure import render_svg, save_figure
from place.training.phases import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "rung", "probe", "status", "workers", "nodes", "engine", "precision", "global_batch", "local_batch", "micro_batch",
    "runs", "runs_failed", "steps", "pairs_per_s",
    "pairs_per_s_worker", "step_pairs_per_s_p5", "step_pairs_per_s_median", "step_pairs_per_s_p95", "efficiency",
    "efficiency_node",
    "step_s", *(f"{name}_s" for name in PHASES), "unexplained", "exposed_s", "exposed_by", "lag_s", "sent_mib",
    "memory_mib", "mfu", "mfu_assumed", "worker_hours_per_million", "kwh_per_million", "start_s", "restart_s",
    "loss_apart", "hold_out",
    *ORIGIN, "reason",
)  # fmt: skip
DIFFERING = ("nodes", "engine", "precision", "micro_batch", *ORIGIN)
"""Columns that the page shows where they differ between rows."""
COLOURS = {
    "forward": "#3b6fb6", "loss": "#6b9fe0", "backward": "#24487a", "optimiser": "#8f6bb3", "gather": "#e0a43a",
    "communication": "#b4443a", "wait": "#3f8f5f", "copy": "#8fc7a5", "checkpoint": "#7a6a58", "other": "#b9c2cc",
}  # fmt: skip

SERIES = {
    "full": ("whole run", "#3b6fb6", "o"),
    "synthetic": ("one batch again", "#e0a43a", "^"),
    "loader": ("reading", "#3f8f5f", "s"),
}
"""What is drawn over workers: its name, its colour where all rungs have one config, its marker."""
CONFIG_COLOURS = (
    *("#3b6fb6", "#b4443a", "#3f8f5f", "#8f6bb3", "#e0a43a", "#24487a", "#c26fa0", "#7a6a58", "#4aa3a8", "#8a9a3a"),
)


def write_results(folder: Path, title: str, results: dict[str, Any], with_png: bool = True) -> Path:
    """Write all four files, or those but the PNG. Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "scaling.csv").write_text(build_csv(results["rows"]))
    good = [row for row in results["rows"] if row["status"] == "ok"]
    full = [row for row in good if row["probe"] == "full"]
    pictures = []
    if full:
        figure = draw_scaling(results)
        if with_png:
            save_figure(figure, folder / "scaling.png")
        pictures.append(embed(render_svg(figure), "image/svg+xml"))
    page = render_page(
        "place.cluster",
        "scaling.html",
        title=title,
        results=results,
        probes=PROBES,
        faults=list(list_faults(results["rows"])),
        pictures=pictures,
        phases=[name for name in PHASES if any(name in row.get("phase_s", {}) for row in full)],
        full=full,
        origin={name: list(dict.fromkeys(row[name] for row in good if row.get(name))) for name in ORIGIN},
        differing=[name for name in DIFFERING if len({row[name] for row in good if row.get(name) is not None}) > 1],
        has_within=any(row["exposed_by"] == "alone" for row in full),
        has_node=any("efficiency_node" in row for row in full),
        has_mfu=any(row["mfu"] for row in full),
        mfu_assumed=sorted({row["mfu_assumed"] for row in full if row["mfu"]}),
        has_energy=any(row["kwh_per_million"] for row in full),
        has_restart=any(row.get("restart_s") for row in full),
    )
    return write_page(folder / "scaling.html", page, "give a folder that can be written")


def build_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row; empty where a figure does not apply."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        flat = row | {f"{name}_s": seconds for name, seconds in row.get("phase_s", {}).items()}
        flat |= {f"step_pairs_per_s_{name}": rate for name, rate in row.get("step_pairs_per_s", {}).items()}
        writer.writerow(["" if flat.get(name) is None else flat[name] for name in COLUMNS])
    return out.getvalue()


def draw_scaling(results: dict[str, Any]) -> Figure:
    """Rates over workers with the ideal line and the ceilings, a series for each config, and where a step goes."""
    from matplotlib.figure import Figure

    good = [row for row in results["rows"] if row["status"] == "ok"]
    full = [row for row in good if row["probe"] == "full"]
    configs = list(dict.fromkeys(tuple(row["config"]) for row in good))
    figure = Figure(figsize=(11, 4.3 + 0.07 * len(configs)), dpi=110, facecolor="white", layout="constrained")
    rates, parts = figure.subplots(1, 2, width_ratios=(1, 1 + 0.12 * len(full)))
    fitted = choose_config([row["config"] for row in full])
    base = min((row for row in full if row["config"] == fitted), key=lambda row: row["workers"])
    most = max(row["workers"] for row in full)
    ideal = [0, most * base["pairs_per_s_worker"]]
    rates.plot([0, most], ideal, color="0.6", linestyle="--", linewidth=1, label=f"ideal, from {base['rung']}")
    # Bars end at the frame: a single step of a burst may be a hundred times as fast as all.
    top = 1.25 * max(max(row["pairs_per_s"] for row in full), ideal[1])
    for probe, (label, colour, marker) in SERIES.items():
        own = [row for row in good if row["probe"] == probe]
        label += "" if not own or own[0]["pairs_per_s"] < top else " (above)"
        if own:
            # Of several configs the colour says which one, and the marker what.
            rates.plot([], [], color=colour if len(configs) == 1 else "0.5", marker=marker, linestyle="", label=label)
        for number, config in enumerate(configs):
            series = [row for row in own if tuple(row["config"]) == config]
            # Side by side where sizes are the same.
            aside = 0.015 * most * (number - (len(configs) - 1) / 2)
            _draw_series(rates, series, aside, colour if len(configs) == 1 else _choose_colour(number), marker)
    rates.set(xlabel="workers", ylabel="pairs a second", xlim=(0, most * 1.08), title="Rate; p5 to p95 of single steps")
    rates.set_ylim(0, top)
    rates.xaxis.get_major_locator().set_params(integer=True)
    rates.legend(frameon=False, fontsize=8)
    if len(configs) > 1:
        names = [" ".join(config) or "as the base" for config in configs]
        lines = [rates.plot([], [], color=_choose_colour(number), linewidth=4)[0] for number in range(len(configs))]
        figure.legend(lines, names, frameon=False, fontsize=8, ncols=3, loc="outside lower left")
    bottoms = [0.0] * len(full)
    for name in PHASES:
        heights = [1000 * row["phase_s"].get(name, 0.0) for row in full]
        if any(heights):
            parts.bar(range(len(full)), heights, 0.6, bottoms, color=COLOURS[name], label=name)
            bottoms = [low + height for low, height in zip(bottoms, heights)]
    # Of several configs a name is as short as it can be, and its colour says which one.
    names = [row["rung"].removesuffix(" ".join(["", *row["config"]])) for row in full]
    parts.set_xticks(range(len(full)), [name.replace(" ", "\n") for name in names], fontsize=8)
    for label, row in zip(parts.get_xticklabels() if len(configs) > 1 else (), full):
        label.set_color(_choose_colour(configs.index(tuple(row["config"]))))
    parts.set(ylabel="ms a step", title="Where a step goes: mean over workers")
    parts.set_xlim(-0.6, len(full) - 0.4)
    parts.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    for axis in (rates, parts):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    return figure


def _draw_series(rates: Axes, rows: Sequence[dict[str, Any]], aside: float, colour: str, marker: str) -> None:
    """What was measured of one config at several sizes, in order of sizes."""
    rows = sorted(rows, key=lambda row: row["workers"])
    x, y = [row["workers"] + aside for row in rows], [row["pairs_per_s"] for row in rows]
    low, high = ([row["step_pairs_per_s"][p] for row in rows] for p in ("p5", "p95"))
    rates.vlines(x, low, high, color=colour)
    rates.plot(x, y, color=colour, marker=marker, linewidth=0.8, linestyle="-" if marker == "o" else "")


def _choose_colour(number: int) -> str:
    return CONFIG_COLOURS[number % len(CONFIG_COLOURS)]
