"""The sheet that every picture of an evaluation or of a run is drawn on, without a screen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def build_figure(rows: int, columns: int, size: tuple[float, float], dpi: int = 100) -> tuple[Figure, Any]:
    """A white figure of `size` (width, height) in inches, and its axes (rows, columns), all without frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def draw_box(axis: Axes, box_xyxy: Sequence[float], colour: str = "cyan", linewidth: float = 1.0) -> None:
    """Draw the outline of a box (x0, y0, x1, y1) over an image shown by `imshow`, around the pixels that it holds.

    Pixel centres are at whole numbers there: the edge of a box lies half a pixel before its first pixel. Source: ours.
    """
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box_xyxy
    outline = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=linewidth)
    axis.add_patch(outline)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def render_svg(figure: Figure) -> bytes:
    """A figure of an SVG canvas as SVG: the same figure gives the same bytes."""
    from matplotlib import rc_context

    file = io.BytesIO()
    # A fixed salt, and no date.
    with rc_context({"svg.hashsalt": "place"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
