"""Every picture draws a box around the very pixels that it holds."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from place.evaluation.explain import Explained, Pairing, draw_figure
from place.evaluation.figure import build_figure, draw_box, save_figure
from place.evaluation.grounding_picture import Grounded, draw_grounded

BOX = [8.0, 4.0, 24.0, 20.0]


def test_the_outline_runs_between_the_pixels_inside_and_outside(tmp_path):
    image_YX = np.zeros((8, 8), np.uint8)
    image_YX[2:5, 3:7] = 255
    figure, axes = build_figure(1, 1, (8, 8), dpi=100)
    figure.subplots_adjust(0, 0, 1, 1)
    axes[0, 0].imshow(image_YX, cmap="gray", vmin=0, vmax=255)
    draw_box(axes[0, 0], (3, 2, 7, 5), "red")
    save_figure(figure, tmp_path / "box.png")
    drawn = cv2.imread(str(tmp_path / "box.png")).astype(int)
    y, x = np.nonzero(drawn[..., 2] - drawn[..., 1] > 100)
    assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == pytest.approx([300, 200, 700, 500], abs=2)


@pytest.mark.parametrize("kind", ["explain", "grounding"])
def test_both_pictures_draw_boxes_by_the_same_rule(tmp_path, monkeypatch, kind):
    drawn, image_YX = [], np.zeros((32, 32), np.uint8)
    monkeypatch.setattr("matplotlib.axes.Axes.add_patch", lambda _, patch: drawn.append(patch.get_bbox().extents))
    if kind == "explain":
        box = {"finding": "nodule", "box_xyxy": BOX}
        study = Explained(image_YX, [box], ["nodule"], [Pairing("A nodule.", 0.5, np.ones((2, 2)) / 4, [box])])
        draw_figure([study], tmp_path / "explain.png", "test")
    else:
        jpeg = cv2.imencode(".jpg", image_YX)[1].tobytes()
        phrase = Grounded(jpeg, "A nodule.", "nodule", [tuple(BOX)], {"patch": np.eye(2)})
        draw_grounded([phrase], tmp_path / "grounding.png", "test")
    outlines = [extents for extents in drawn if extents[2] - extents[0] == 16]
    assert len(outlines) == 2
    assert all(extents.tolist() == [7.5, 3.5, 23.5, 19.5] for extents in outlines)
