"""How well a map over the patches finds boxes: pointing game, contrast-to-noise ratio, mIoU. Pure functions.

Scores of a map over the square that the model sees, against the union of a phrase's boxes (inside, outside):

- pointing game: 1 where the centre of the largest patch lies inside, else 0; equal patches share the hit.
  Source: quoted (Zhang et al. 2016, 'Top-down neural attention by excitation backprop'); without its 15 px tolerance.
- contrast-to-noise ratio, CNR: (mean inside - mean outside) / sqrt(variance inside + variance outside); the absolute
  one takes the difference without its sign, so that a map which avoids the boxes scores as well as one that finds them.
  Source: quoted (Boecking et al. 2022, MS-CXR, the absolute one); the sign is ours.
- mIoU: intersection over union of the pixels at or above a threshold with the boxes, mean over .1, .2, .3, .4, .5; of
  the map scaled to 0..1 over the square, and of the cosine as it stands.
  Source: quoted (Boecking et al. 2022, thresholds on the cosine); scaling is inferred (AFLoc).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from place.data.transforms import find_square
from place.evaluation.metrics import Array

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
Box = tuple[float, ...]


def move_box(box_xyxy: Sequence[float], shape: tuple[int, ...]) -> Box | None:
    """A box (x0, y0, x1, y1) of a stored image (Y, X) in its centre square, cut to it; None if nothing is left."""
    side, top, left = find_square(shape)
    x0, y0, x1, y1 = (
        float(np.clip(value - offset, 0, side)) for value, offset in zip(box_xyxy, (left, top, left, top), strict=True)
    )
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def fill_boxes(boxes: Sequence[Box], side: int, scale: float = 1.0) -> Array:
    """Union of boxes as a mask (side, side), after scaling; a box is never less than a pixel."""
    mask_YX = np.zeros((side, side), bool)
    for box in boxes:
        x0, y0, x1, y1 = (round(value * scale) for value in box)
        x0, y0 = min(x0, side - 1), min(y0, side - 1)
        mask_YX[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return mask_YX


def judge_map(map_YX: Array, truth_YX: Array) -> dict[str, float]:
    """All scores of a map.

    Args:
        map_YX: a value a patch; resized bilinearly to the truth.
        truth_YX: bool, in pixels of the square.
    Returns: `pointing_game`, `cnr`, `cnr_absolute`, `miou`, `miou_cosine`; NaN where nothing is inside or outside.
    Source: see the module.
    """
    heat_YX = cv2.resize(map_YX.astype(np.float32), truth_YX.shape[::-1], interpolation=cv2.INTER_LINEAR)
    cnr = compute_cnr(heat_YX, truth_YX)
    return {
        "pointing_game": compute_pointing(map_YX, truth_YX),
        "cnr": cnr,
        "cnr_absolute": abs(cnr),
        "miou": compute_miou(scale_map(heat_YX), truth_YX),
        "miou_cosine": compute_miou(heat_YX, truth_YX),
    }


def scale_map(heat_YX: Array) -> Array:
    """A map scaled to 0..1; an even one is 0."""
    span = float(np.ptp(heat_YX))
    return (heat_YX - heat_YX.min()) / span if span else np.zeros_like(heat_YX)


def compute_pointing(map_YX: Array, truth_YX: Array) -> float:
    """Whether the centre of the largest patch lies inside; equal patches count by their share."""
    centres = zip(np.nonzero(map_YX == map_YX.max()), map_YX.shape, truth_YX.shape, strict=True)
    y, x = (((place + 0.5) / patches * pixels).astype(int) for place, patches, pixels in centres)
    return float(truth_YX[y, x].mean())


def compute_cnr(heat_YX: Array, truth_YX: Array) -> float:
    """Signed contrast-to-noise ratio; 0 of an even map, NaN where nothing is inside or outside."""
    inside, outside = (heat_YX[mask_YX].astype(np.float64) for mask_YX in (truth_YX, ~truth_YX))
    if not len(inside) or not len(outside):
        return float("nan")
    noise = np.sqrt(inside.var() + outside.var())
    return float((inside.mean() - outside.mean()) / noise) if noise > 0 else 0.0


def compute_miou(heat_YX: Array, truth_YX: Array) -> float:
    """Mean over `THRESHOLDS` of the intersection over union."""
    shown = [heat_YX >= threshold for threshold in THRESHOLDS]
    return float(np.mean([(mask_YX & truth_YX).sum() / (mask_YX | truth_YX).sum() for mask_YX in shown]))
