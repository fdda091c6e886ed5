"""True masks of a prepared data set: masks.parquet, beside the shards, so that what training reads stays as it is."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from place.data.images import Rejected, decode_picture, read_file
from place.data.manifest import read_columns
from place.data.shapes import Shape, draw_shapes

MASKS_FILE = "masks.parquet"
MASKS = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("finding", pa.string(), nullable=False),
        pa.field("box", pa.int32()),
        pa.field("mask", pa.binary()),
    ]
)
"""A row a mask, in the pixels of the stored image, as a PNG of one bit; no mask: looked for and absent. A study without
a row of a finding was not looked at for it. `box` is the place of the same finding among the study's boxes, if any."""

Mask = NDArray[np.bool_]


class SourceMask(NamedTuple):
    """A mask as a source hands it over: in the pixels of the source image, as a PNG; empty bytes where absent.

    A path instead of bytes is read in the task; where there is no such file, nobody has looked. Outlines instead are
    drawn in the task, when the size of the image is known.
    """

    finding: str
    png: bytes | str = b""
    box: int | None = None
    shapes: tuple[Shape, ...] = ()


def encode_mask(mask_YX: Mask) -> bytes:
    """PNG of one bit a pixel. Source: ours."""
    buffer = io.BytesIO()
    Image.fromarray(mask_YX).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def decode_mask(png: bytes) -> Mask:
    """Mask (Y, X) of a PNG: true where a pixel is not black. Raises Rejected where it does not decode."""
    return decode_picture(png) > 0


def resize_mask(mask_YX: Mask, shape: tuple[int, ...]) -> Mask:
    """Mask in another size: a pixel belongs to it where at least half of its area did. Source: ours."""
    if mask_YX.shape == shape:
        return mask_YX
    height, width = shape
    method = cv2.INTER_AREA if mask_YX.shape[0] >= height else cv2.INTER_LINEAR
    return cv2.resize(mask_YX.astype(np.float32), (width, height), interpolation=method) >= 0.5


def store_mask(mask: SourceMask, source: tuple[int, ...], stored: tuple[int, ...]) -> bytes | None:
    """PNG of a mask in the pixels of the stored image, or None where the finding is absent.

    Args:
        source: shape (Y, X) of the source image.
        stored: shape of the stored one.
    Raises:
        Rejected: `unreadable_mask`, `mask_size`.
    Source: ours.
    """
    if not mask.png and not mask.shapes:
        return None
    mask_YX = _draw_mask(mask, source) if mask.shapes else _read_mask(mask.png)
    if mask_YX.shape != source:
        raise Rejected("mask_size", f"the mask has {mask_YX.shape} pixels, its image {source}")
    if isinstance(mask.png, str) and not mask_YX.any():
        return None  # a file with nothing in it says that the finding is absent
    return encode_mask(resize_mask(mask_YX, stored))


def _read_mask(png: bytes | str) -> Mask:
    try:
        return decode_mask(read_file(png) if isinstance(png, str) else png)
    except Rejected as fault:
        raise Rejected("unreadable_mask", fault.reason) from None


def _draw_mask(mask: SourceMask, source: tuple[int, ...]) -> Mask:
    try:
        return draw_shapes(mask.shapes, source)
    except ValueError as fault:
        raise Rejected("mask_size", str(fault)) from None


def list_mask_files(image: str, root: str, patterns: dict[str, str]) -> tuple[SourceMask, ...]:
    """Mask files of an image, whether they are there or not.

    Args:
        patterns: finding to path below the root; `{stem}` is the image's path without suffix, `{name}` its last part.
    Source: ours.
    """
    stem = os.path.splitext(image)[0]
    filled = {
        finding: pattern.replace("{stem}", stem).replace("{name}", os.path.basename(stem))
        for finding, pattern in patterns.items()
    }
    return tuple(SourceMask(finding, os.path.join(root, path)) for finding, path in filled.items())


def list_masked(data_dir: str | Path) -> tuple[set[str], set[str]]:
    """Splits with images that were looked at for masks, and those of them with a mask that is not empty.

    Raises RunError for a damaged file.
    """
    if not (Path(data_dir) / MASKS_FILE).is_file():
        return set(), set()
    everywhere = read_columns(data_dir, MASKS_FILE, ["split"])
    masked = read_columns(data_dir, MASKS_FILE, ["split"], ("mask", "!=", b""))
    looked, full = (set(rows["split"].unique().to_pylist()) for rows in (everywhere, masked))
    return looked, full


def read_masks(data_dir: str | Path, split: str) -> dict[int, dict[str, Mask | None]]:
    """Masks (Y, X) of a split's studies by sample_id and finding, those of one finding joined.

    Returns:
        For each study that was looked at, a mask or None (absent) for each finding it was looked at for.
    Raises:
        RunError: a damaged file.
    Source: ours.
    """
    masks: dict[int, dict[str, Mask | None]] = {}
    for row in read_columns(data_dir, MASKS_FILE, where=("split", "==", split)).to_pylist():
        study = masks.setdefault(row["sample_id"], {})
        mask_YX, before_YX = decode_mask(row["mask"]) if row["mask"] else None, study.get(row["finding"])
        study[row["finding"]] = mask_YX if before_YX is None else before_YX if mask_YX is None else before_YX | mask_YX
    return masks
