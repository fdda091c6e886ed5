"""Outlines as data sets write them, to masks and boxes: rectangles, ellipses, polygons, and runs of pixels (RLE)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Kind = Literal["rectangle", "ellipse", "polygon", "runs", "sized runs"]
_NUMBERED: tuple[Kind, ...] = ("rectangle", "ellipse", "polygon", "sized runs")
BoxXYXY = tuple[float, float, float, float]


class Shape(NamedTuple):
    """One outline, in the pixels of the source image.

    `numbers`: x0, y0, x1, y1 of a rectangle or of the box around an ellipse; x0, y0, x1, y1, ... of a polygon's
    corners; of runs, in turn the pixels that are skipped since the last run and the pixels that are taken, going down
    each column and then to the next one; of sized runs, the height and width of their image before these.
    """

    kind: Kind
    numbers: tuple[float, ...]


def parse_shapes(cell: str) -> tuple[Shape, ...]:
    """Shapes of a cell of Object-CXR: `0 x0 y0 x1 y1;2 x0 y0 x1 y1 x2 y2`; 0 rectangle, 1 ellipse, 2 polygon.

    3 are sized runs, which `write_runs` makes of a mask of COCO.
    Raises:
        ValueError: with what is wrong.
    Source: quoted (Object-CXR, its page, 'Annotation'); 3 is ours.
    """
    return tuple(_parse_shape(part) for part in cell.split(";") if part.strip())


def _parse_shape(text: str) -> Shape:
    first, *rest = text.split()
    if first not in ("0", "1", "2", "3"):
        raise ValueError(f"'{first}' is no kind of shape; expected 0, 1, 2 or 3")
    numbers = tuple(float(word) for word in rest)
    kind = _NUMBERED[int(first)]
    if kind == "polygon":
        if len(numbers) < 6 or len(numbers) % 2:
            raise ValueError(f"a polygon has {len(numbers)} numbers; expected x and y of three corners or more")
    elif kind == "sized runs":
        if len(numbers) < 2 or len(numbers) % 2:
            raise ValueError(f"sized runs are {len(numbers)} numbers; expected height, width and pairs")
    elif len(numbers) != 4:
        raise ValueError(f"a {kind} has {len(numbers)} numbers; expected x0, y0, x1, y1")
    return Shape(kind, numbers)


def parse_runs(cell: str) -> Shape:
    """Runs of a cell of SIIM-ACR: `175349 7 1013 12`: relative offset and length in turn, down the columns.

    Raises:
        ValueError: with what is wrong.
    Source: inferred (the mask functions that come with SIIM-ACR; protocol notes of MGCA, GLoRIA).
    """
    numbers = tuple(int(word) for word in cell.split())
    if not numbers or len(numbers) % 2 or min(numbers) < 0:
        raise ValueError("runs are pairs of an offset and a length, none below 0")
    return Shape("runs", numbers)


def write_runs(mask_YX: NDArray[np.generic]) -> str:
    """A mask as sized runs of a cell that `parse_shapes` reads."""
    edges = np.flatnonzero(np.diff(mask_YX.T.ravel().astype(np.int8), prepend=0, append=0))
    return " ".join(map(str, [3, *mask_YX.shape, *np.diff(edges, prepend=0)]))


def find_box(shape: Shape) -> BoxXYXY:
    """The box (x0, y0, x1, y1) around a rectangle, ellipse or polygon. Raises ValueError for runs."""
    if shape.kind in ("runs", "sized runs"):
        raise ValueError("runs of pixels tell no corners")
    x, y = shape.numbers[::2], shape.numbers[1::2]
    return min(x), min(y), max(x), max(y)


def draw_shapes(shapes: tuple[Shape, ...], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Union of shapes as a mask of `size` (Y, X); what lies outside is cut off.

    Raises:
        ValueError: runs that go beyond the image, or are of an image of another size.
    Source: ours.
    """
    mask_YX = np.zeros(size, np.uint8)
    for shape in shapes:
        if shape.kind == "runs":
            mask_YX |= _draw_runs(shape.numbers, size)
        elif shape.kind == "sized runs":
            height, width = shape.numbers[:2]
            if (height, width) != size:
                raise ValueError(f"its runs are of {height:g} x {width:g} pixels, the image has {size[0]} x {size[1]}")
            mask_YX |= _draw_runs(shape.numbers[2:], size)
        elif shape.kind == "rectangle":
            x0, y0, x1, y1 = (max(round(value), 0) for value in shape.numbers)
            mask_YX[y0:y1, x0:x1] = 1
        else:
            cv2.fillPoly(mask_YX, [np.rint(_list_corners(shape)).astype(np.int32)], 1)
    return mask_YX.astype(bool)


def _list_corners(shape: Shape) -> NDArray[np.float64]:
    if shape.kind == "polygon":
        return np.array(shape.numbers).reshape(-1, 2)
    x0, y0, x1, y1 = shape.numbers
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    x, y = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angle), (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angle)
    return np.stack([x, y], axis=1)


def _draw_runs(runs: tuple[float, ...], size: tuple[int, ...]) -> NDArray[np.uint8]:
    height, width = size
    flat, at = np.zeros(height * width, np.uint8), 0
    for skipped, taken in zip(runs[::2], runs[1::2], strict=True):
        begin = at + int(skipped)
        at = begin + int(taken)
        flat[begin:at] = 1
    if at > flat.size:
        raise ValueError(f"its runs reach pixel {at}, the image has {flat.size}")
    return flat.reshape(width, height).T
