"""Several readers' boxes on one image to one set: what enough of them drew, as its mean."""

from __future__ import annotations

from typing import Any

import numpy as np


def merge_readers(boxes: list[dict[str, Any]], agree: int, iou: float) -> tuple[dict[str, Any], ...]:
    """Boxes of one image on which readers agree; those without a `reader` are a consensus already and stay.

    A box joins the first group of its finding whose first box it overlaps and that has none of its reader yet; groups
    of at least `agree` readers are kept, as the mean of their boxes.
    Args:
        boxes: in the order of the table, with `finding`, `box_xyxy` and perhaps `reader`.
        agree: readers.
        iou: intersection over union from which on two boxes show the same.
    Source: ours; the readers of VinDr-CXR drew without knowing of each other.
    """
    groups: list[list[dict[str, Any]]] = []
    for box in boxes:
        group = next((group for group in groups if _belongs(box, group, iou)), None)
        if group is None:
            groups.append([box])
        else:
            group.append(box)
    kept = [group for group in groups if len(group) >= agree or "reader" not in group[0]]
    return tuple(_average(group) for group in kept)


def _belongs(box: dict[str, Any], group: list[dict[str, Any]], iou: float) -> bool:
    return (
        "reader" in box
        and box["finding"] == group[0]["finding"]
        and all(box["reader"] != other.get("reader") for other in group)
        and compute_iou(box["box_xyxy"], group[0]["box_xyxy"]) >= iou
    )


def _average(group: list[dict[str, Any]]) -> dict[str, Any]:
    plain = {name: value for name, value in group[0].items() if name != "reader"}
    return plain | {"box_xyxy": np.mean([box["box_xyxy"] for box in group], axis=0).tolist()}


def compute_iou(left: list[float], right: list[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (left, right))
    return shared / (areas - shared)
