"""The picture of segmentation: for each finding some images that have it, with the true and the predicted outline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from place.data.transforms import read_image
from place.evaluation.explain import crop_square
from place.evaluation.figure import build_figure, save_figure
from place.evaluation.metrics import Array

COLUMNS = 4


def draw_masks(jpegs: Sequence[bytes], mask_BFYX: Array, shown_BFYX: Array, names: Sequence[str], path: Path) -> None:
    """Draw the first images of each finding, in stored order: no score decides."""
    figure, rows = build_figure(len(names), COLUMNS, (2.4 * COLUMNS, 0.6 + 2.6 * len(names)))
    edge = shown_BFYX.shape[-1] - 0.5
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        row[0].set_title(name, fontsize=9, loc="left", pad=3)
        for axis, image in zip(row, np.flatnonzero(mask_BFYX[:, number].any((1, 2))), strict=False):
            square_YX, _ = crop_square(read_image(jpegs[image]), [])
            axis.imshow(square_YX, cmap="gray", vmin=0, vmax=255, extent=(-0.5, edge, edge, -0.5))
            for mask_YX, colour in ((mask_BFYX[image, number], "cyan"), (shown_BFYX[image, number], "orange")):
                if mask_YX.any() and not mask_YX.all():
                    axis.contour(mask_YX, levels=[0.5], colors=colour, linewidths=1.2)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.6 / height, bottom=0.1 / height, wspace=0.04, hspace=0.14)
    figure.text(0.01, 1 - 0.22 / height, "Masks: true (cyan) and predicted (orange)", fontsize=12, weight="bold")
    save_figure(figure, path)
