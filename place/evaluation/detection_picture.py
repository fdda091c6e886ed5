"""The picture of detection: for each finding some images that have it, with the true and the found boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from place.data.transforms import read_image
from place.evaluation.detector import Boxes
from place.evaluation.explain import crop_square
from place.evaluation.figure import build_figure, draw_box, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, MOST_SHOWN = 4, 2


def draw_boxes(
    jpegs: Sequence[bytes],
    truths: Sequence[Boxes],
    guesses: Sequence[Boxes],
    names: Sequence[str],
    size_px: int,
    path: Path,
) -> None:
    """Draw the first images of each finding, in stored order, with the two surest boxes: no score decides."""
    figure, rows = build_figure(len(names), COLUMNS, (2.4 * COLUMNS, 0.6 + 2.6 * len(names)))
    edge = size_px - 0.5
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        row[0].set_title(name, fontsize=9, loc="left", pad=3)
        having = [image for image, truth in enumerate(truths) if bool((truth.finding_P == number).any())]
        for axis, image in zip(row, having, strict=False):
            square_YX, _ = crop_square(read_image(jpegs[image]), [])
            axis.imshow(square_YX, cmap="gray", vmin=0, vmax=255, extent=(-0.5, edge, edge, -0.5))
            _draw(axis, truths[image], number, "cyan")
            _draw(axis, guesses[image], number, "orange")
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.6 / height, bottom=0.1 / height, wspace=0.04, hspace=0.14)
    title = "Boxes: true (cyan) and found (orange, with score)"
    figure.text(0.01, 1 - 0.22 / height, title, fontsize=12, weight="bold")
    save_figure(figure, path)


def _draw(axis: Axes, boxes: Boxes, finding: int, colour: str) -> None:
    own = (boxes.finding_P == finding).nonzero()[:MOST_SHOWN, 0]
    for row in own.tolist():
        box = boxes.box_P4[row].tolist()
        draw_box(axis, box, colour, linewidth=1.2)
        if boxes.score_P is not None:
            axis.text(box[0], box[1], f"{boxes.score_P[row]:.2f}", color=colour, fontsize=7, va="bottom", clip_on=True)
