"""Charts of a run over its steps, as pictures for the page: sharp at any size and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from place.evaluation.figure import render_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES, WIDE_INCHES = (4.4, 2.8), (9.6, 3.2)
MOST_POINTS = 500
"""A longer line is drawn as means of that many stretches, with a band from the least to the largest value of each."""
MOST_COLUMNS, MOST_QUERIES = 6, 4
FEW_POINTS = 20
"""So few values are drawn with a dot each."""
LOG_FROM_RATIO = 50.0
"""Values that span more than this ratio are drawn on a logarithmic scale."""
COLOURS = {"train": "#3b6fb6", "validation": "#e08a1e", "lost": "#a9b4c0", "other": "#3d8f6b", "limit": "#8a94a0"}
RESTART_COLOUR, STRAGGLER_COLOUR = "#b4443a", "#7b4fa3"
Floats = NDArray[np.float64]


class Line(NamedTuple):
    """Values of one kind over steps; `role` is one of `COLOURS`, or a colour of matplotlib's own such as C0."""

    name: str
    role: str
    x: list[float]
    y: list[float]


class Panel(NamedTuple):
    """One chart: what it shows, its lines, and what its axes are called."""

    title: str
    lines: list[Line]
    unit: str = ""
    x_name: str = "step"


class Marks(NamedTuple):
    """Steps at which workers started again, and at which one was a straggler."""

    restarts: list[float]
    stragglers: list[float]
    end: float | None = None
    """Where the axis ends; None where the lines do."""


def draw_panel(panel: Panel, marks: Marks, is_wide: bool = False) -> bytes:
    """A chart as SVG. Source: ours."""
    figure, axis = _build_figure(WIDE_INCHES if is_wide else SIZE_INCHES)
    for line in panel.lines:
        _draw_line(axis, line)
    if choose_log(panel):
        axis.set_yscale("log")
    _draw_marks(axis, marks)
    axis.set(xlabel=panel.x_name, ylabel=panel.unit)
    # All charts over steps have one axis, also those of what is written seldom.
    # A mark at the last step is seen whole.
    axis.set_xlim(left=0, right=marks.end and 1.01 * marks.end)
    names = axis.get_legend_handles_labels()[1]
    if len(names) > 1:
        figure.legend(loc="outside lower left", ncols=3, fontsize=8, frameon=False, handlelength=1.6, columnspacing=1.2)
    return render_svg(figure)


def draw_attention(maps: Sequence[tuple[int, Sequence[Sequence[float]]]]) -> bytes:
    """Shares of the patches of one image in the attention of a few V-PORs, a column a step, as SVG.

    Shown are the `MOST_QUERIES` queries that are most peaked at the end, at `MOST_COLUMNS` steps from first to last,
    each map by its own largest share.

    Args:
        maps: step and shares (K,N) of each validation; N is a square.
    Source: ours.
    """
    places = np.linspace(0, len(maps) - 1, min(len(maps), MOST_COLUMNS)).round().astype(int)
    chosen = [maps[place] for place in places]
    last_KN = np.asarray(chosen[-1][1])
    queries = np.sort(np.argsort(-last_KN.max(1), kind="stable")[:MOST_QUERIES])
    side = math.isqrt(last_KN.shape[1])
    figure = _build_canvas((1.5 * len(chosen) + 0.6, 1.5 * len(queries) + 0.3))
    axes = figure.subplots(len(queries), len(chosen), squeeze=False)
    for column, (step, shares_KN) in enumerate(chosen):
        for row, query in enumerate(queries):
            axis = axes[row, column]
            axis.imshow(np.asarray(shares_KN[query]).reshape(side, side), cmap="viridis", vmin=0)
            axis.set(xticks=[], yticks=[])
            if not row:
                axis.set_title(f"step {step:,}", fontsize=9)
            if not column:
                axis.set_ylabel(f"query {query + 1}", fontsize=9)
    return render_svg(figure)


def choose_log(panel: Panel) -> bool:
    """Whether a chart's values span so much that small ones would lie on the axis."""
    values = [value for line in panel.lines for value in line.y]
    return min(values) > 0 and max(values) > LOG_FROM_RATIO * float(np.median(values))


def thin(x: list[float], y: list[float]) -> tuple[Floats, Floats, Floats, Floats]:
    """Means of x and y, least and largest y, over at most `MOST_POINTS` stretches of equally many points.

    Source: ours.
    """
    x_N, y_N = np.asarray(x, float), np.asarray(y, float)
    parts = np.array_split(np.arange(len(x_N)), min(len(x_N), MOST_POINTS))
    columns = [(x_N[part].mean(), y_N[part].mean(), y_N[part].min(), y_N[part].max()) for part in parts]
    means_P, values_P, low_P, high_P = np.array(columns).T
    return means_P, values_P, low_P, high_P


def _draw_line(axis: Axes, line: Line) -> None:
    colour = COLOURS.get(line.role, line.role)
    if line.role == "limit":
        axis.plot(line.x, line.y, color=colour, linewidth=0.9, linestyle="--", label=line.name)
        return
    x_P, y_P, low_P, high_P = thin(line.x, line.y)
    if len(line.x) > MOST_POINTS:
        axis.fill_between(x_P, low_P, high_P, color=colour, alpha=0.2, linewidth=0)
    # Few values are seen as such, and one alone is no line.
    marker = "o" if line.role == "validation" or len(x_P) <= FEW_POINTS else ""
    order = 1 if line.role == "lost" else 3 if line.role == "validation" else 2
    style: dict[str, Any] = {"linewidth": 1.0 if line.role == "lost" else 1.4, "markersize": 3, "zorder": order}
    axis.plot(x_P, y_P, color=colour, marker=marker, label=line.name, **style)


def _draw_marks(axis: Axes, marks: Marks) -> None:
    for place, step in enumerate(marks.restarts):
        name = "" if place else "restart"
        axis.axvline(step, color=RESTART_COLOUR, linewidth=1, linestyle=(0, (3, 2)), zorder=0, label=name)
    if marks.stragglers:
        low = [0.0] * len(marks.stragglers)
        style: dict[str, Any] = {"marker": "^", "markersize": 4, "linestyle": "", "clip_on": False}
        axis.plot(
            marks.stragglers,
            low,
            transform=axis.get_xaxis_transform(),
            color=STRAGGLER_COLOUR,
            label="straggler",
            **style,
        )


def _build_canvas(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _build_figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = _build_canvas(size)
    axis = figure.subplots()
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.tick_params(labelsize=8)
    axis.grid(color="0.93")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis
