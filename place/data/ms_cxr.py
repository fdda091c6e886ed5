"""Phrases with boxes of MS-CXR, which join the images of MIMIC-CXR by their dicom_id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from place.config import RunError, UsageError
from place.data.table import read_table

_COLUMNS = ("dicom_id", "category_name", "label_text", "x", "y", "w", "h", "image_width", "image_height", "split")
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the shape of an image and the one that its boxes were drawn on."""


def read_ms_cxr(path: Path) -> dict[str, tuple[dict[str, Any], ...]]:
    """Boxes of each image by dicom_id, of MS_CXR_Local_Alignment_v1.1.0.csv.

    Returns:
        Each box as `finding`, `phrase`, `box_xyxy` (x0, y0, x1, y1) in an image of `drawn_on` (width, height) pixels,
        and `sentence`, None: a phrase is no sentence of the report as it is stored.
    Raises:
        UsageError: no such file, or a column is missing.
        RunError: a cell that is no number, or a box outside its image.
    Source: quoted (MS-CXR 1.1.0, PhysioNet; column names); its own split column is not used: MIMIC-CXR's is.
    """
    table = read_table(path, {name: name for name in _COLUMNS}, ())
    boxes: dict[str, tuple[dict[str, Any], ...]] = {}
    for number, row in enumerate(table.to_dict("records")):
        boxes[row["dicom_id"]] = (*boxes.get(row["dicom_id"], ()), _build_box(row, f"{path.name}, row {number}"))
    return boxes


def _build_box(row: dict[Any, Any], where: str) -> dict[str, Any]:
    try:
        x, y, w, h, width, height = (float(row[name]) for name in ("x", "y", "w", "h", "image_width", "image_height"))
    except ValueError:
        raise RunError(f"{where}: x, y, w, h or the size of the image is no number; download the table again") from None
    if not (w > 0 and h > 0 and x >= 0 and x + w <= width + 1 and y >= 0 and y + h <= height + 1):
        raise RunError(
            f"{where}: box {x:g}, {y:g}, {w:g}, {h:g} is not inside its image of {width:g} x {height:g} px; "
            "download the table again"
        )
    return {
        "finding": row["category_name"],
        "phrase": row["label_text"],
        "box_xyxy": [x, y, x + w, y + h],
        "drawn_on": [width, height],
        "sentence": None,
    }


def find_boxes(path: Path | None, images: set[str]) -> tuple[dict[str, tuple[dict[str, Any], ...]], list[str]]:
    """Boxes of a table, if one was given, and a note for the card. Raises UsageError where no image is known."""
    if path is None:
        return {}, []
    boxes = read_ms_cxr(path)
    there = boxes.keys() & images
    if not there:
        raise UsageError(
            f"--boxes {path.name}: none of its {len(boxes)} images is in this MIMIC-CXR; expected dicom_id"
        )
    count = sum(len(boxes[name]) for name in there)
    told = f"{count} boxes with phrases on {len(there)} of {len(boxes)} images of {path.name}, rejected rows included"
    return boxes, [told]
