"""The picture of phrase grounding: the image with the true boxes, then each map over it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from place.data.transforms import read_image
from place.evaluation.explain import crop_square
from place.evaluation.figure import build_figure, draw_box, save_figure
from place.evaluation.metrics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "patch": "patch cosine",
    "attention": "V-POR attention",
    "occlusion": "occlusion",
    "prior": "prior: training boxes",
}


class Grounded(NamedTuple):
    """A phrase to draw: stored JPEG, words, boxes in the pixels of the centre square, maps over the patches."""

    image: bytes
    text: str
    finding: str
    boxes: list[tuple[float, ...]]
    maps: dict[str, Array]


def draw_grounded(items: Sequence[Grounded], path: Path, subtitle: str) -> None:
    """Draw a row for each phrase: image with boxes, then each map, scaled to its own range."""
    columns = 1 + max(len(item.maps) for item in items)
    figure, axes = build_figure(len(items), columns, (2.7 * columns, 0.7 + 2.95 * len(items)))
    for row, item in zip(axes, items, strict=True):
        _draw_row(row, item)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.75 / height, bottom=0.35 / height, wspace=0.04, hspace=0.26)
    figure.text(0.01, 1 - 0.22 / height, "Where a phrase points", fontsize=13, weight="bold", va="center")
    note = f"{subtitle}; cyan: the truth; each map from its least (dark) to its largest value (bright)"
    figure.text(0.01, 1 - 0.42 / height, note, fontsize=8, color="0.35", va="center")
    save_figure(figure, path)


def _draw_row(row: Sequence[Axes], item: Grounded) -> None:
    image_YX, _ = crop_square(read_image(item.image), [])
    for axis in row:
        axis.imshow(image_YX, cmap="gray", vmin=0, vmax=255)
    for axis, (name, map_YX) in zip(row[1:], item.maps.items(), strict=False):
        heat_YX = cv2.resize(map_YX.astype(np.float32), image_YX.shape, interpolation=cv2.INTER_LINEAR)
        axis.imshow(heat_YX, cmap="inferno", alpha=0.6)
        axis.set_title(TITLES[name], fontsize=8, pad=2)
    for axis in row:
        for box in item.boxes:
            draw_box(axis, box)
    words = "\n".join(textwrap.wrap(f"{item.finding}: {item.text}", 46)[:3])
    row[0].text(0.0, -0.03, words, transform=row[0].transAxes, fontsize=7.5, va="top", ha="left")
