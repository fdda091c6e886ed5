"""ROC and precision-recall curves of scored findings, as pictures for the page: sharp at any size and on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from place.evaluation.figure import render_svg
from place.evaluation.metrics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_INCHES = 4.6


class Scored(NamedTuple):
    """A finding's labels (1 or 0) and scores, an image each."""

    finding: str
    label_B: Array
    score_B: Array


class Chart(NamedTuple):
    """A figure, its square axes from 0 to 1, and a colour a finding."""

    figure: Figure
    axis: Axes
    palette: list[Any]


def draw_roc(scored: list[Scored]) -> bytes:
    """True against false positive rate of each finding, with its AUROC, as SVG. Source: quoted (scikit-learn)."""
    chart = _build_chart(len(scored), "false positive rate", "true positive rate")
    chart.axis.plot([0, 1], [0, 1], color="0.75", linewidth=1, linestyle="--")
    for item, colour in zip(scored, chart.palette, strict=True):
        false_T, true_T, _ = roc_curve(item.label_B, item.score_B)
        merit = roc_auc_score(item.label_B, item.score_B)
        chart.axis.plot(false_T, true_T, color=colour, linewidth=1.5, label=f"{item.finding} {merit:.3f}")
    return _finish(chart, "AUROC")


def draw_precision_recall(scored: list[Scored]) -> bytes:
    """Precision against recall of each finding, with its average precision, as SVG. Source: quoted (scikit-learn)."""
    chart = _build_chart(len(scored), "recall", "precision")
    for item, colour in zip(scored, chart.palette, strict=True):
        precision_T, recall_T, _ = precision_recall_curve(item.label_B, item.score_B)
        merit, share = average_precision_score(item.label_B, item.score_B), item.label_B.mean()
        style = {"color": colour, "linewidth": 1.5, "drawstyle": "steps-post"}
        chart.axis.plot([0, 1], [share, share], color=colour, linewidth=0.8, linestyle=":")
        chart.axis.plot(recall_T, precision_T, label=f"{item.finding} {merit:.3f}", **style)
    return _finish(chart, "average precision (dotted: share of positives)")


def _build_chart(count: int, x_name: str, y_name: str) -> Chart:
    from matplotlib import colormaps
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    legend_inches = 0.2 + 0.19 * ((count + 1) // 2)
    figure = Figure(figsize=(SIDE_INCHES, SIDE_INCHES + legend_inches), facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x_name, ylabel=y_name, aspect="equal")
    axis.grid(color="0.93")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    colours = colormaps["tab10"](range(10)) if count <= 10 else colormaps["turbo"](np.linspace(0.03, 0.97, count))
    return Chart(figure, axis, list(colours[:count]))


def _finish(chart: Chart, title: str) -> bytes:
    chart.figure.legend(
        loc="outside lower left", ncols=2, fontsize=8, title=title, title_fontsize=8, frameon=False, alignment="left"
    )
    return render_svg(chart.figure)
