"""A pixel grid that is drawn on in millimetres: polygons, strokes, soft blobs and smooth random fields."""

from functools import cached_property

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_anatomy import Points, Pose

Field = NDArray[np.float32]
"""Image-shaped float32 field (Y, X)."""

_SUBPIXEL = 4
"""Fractional bits of the coordinates that OpenCV draws at."""


class Canvas:
    """Maps the patient's millimetres to pixels of one square image."""

    def __init__(self, size_px: int, pose: Pose) -> None:
        self.size_px = size_px
        self.spacing_mm = pose.field / size_px
        angle = np.deg2rad(pose.tilt)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        self._turn = np.array([[cos, sin], [-sin, cos]], np.float32)
        self._shift = np.array(pose.shift, np.float32)
        self.coarse_mm: tuple[Field, Field] = self._build_grid(max(8, size_px // 4))

    @cached_property
    def x_mm(self) -> Field:
        """The patient's x at each pixel, in mm."""
        return self._build_grid(self.size_px)[0]

    @cached_property
    def y_mm(self) -> Field:
        """The patient's y at each pixel, in mm."""
        return self._build_grid(self.size_px)[1]

    def _build_grid(self, count: int) -> tuple[Field, Field]:
        """Millimetre coordinates x and y of the centres of count x count cells laid over the image."""
        cell_mm = self.spacing_mm * self.size_px / count
        step = (np.arange(count, dtype=np.float32) + np.float32(0.5 - count / 2)) * np.float32(cell_mm)
        x, y = step[None, :] - self._shift[0], step[:, None] - self._shift[1]
        (cos, sin), _ = self._turn
        return x * cos + y * sin, y * cos - x * sin

    def to_px(self, points: Points) -> Points:
        """Pixel coordinates (n, 2) of millimetre points; the centre of the first pixel is (0, 0)."""
        turned = np.asarray(points, np.float32) @ self._turn
        return (turned + self._shift) / self.spacing_mm + (self.size_px / 2 - 0.5)

    def fill(self, points: Points, soft_mm: float = 0.0) -> Field:
        """Polygon as a field of coverage 0..1, edges softened by a Gaussian of `soft_mm`."""
        layer = np.zeros((self.size_px, self.size_px), np.uint8)
        cv2.fillPoly(layer, [self._fixed(points)], 255, cv2.LINE_AA, _SUBPIXEL)
        return self.lift(layer, soft_mm)

    def paint(self, layer: NDArray[np.uint8], points: Points, value: int) -> None:
        """Fill one polygon (n, 2) or several (m, n, 2) with a value 0..255 on a byte layer."""
        for outline in self._fixed(points if points.ndim == 3 else points[None]):
            cv2.fillPoly(layer, [outline], value, cv2.LINE_AA, _SUBPIXEL)

    def stroke(self, layer: NDArray[np.uint8], curves: Points, width_mm: float, value: float = 255) -> None:
        """Draw one open curve (n, 2) or several (m, n, 2) on a byte layer; finer than a pixel is fainter instead."""
        width_px = width_mm / self.spacing_mm
        strength = value * min(1.0, max(width_px, 0.35))
        fixed = list(self._fixed(curves if curves.ndim == 3 else curves[None]))
        cv2.polylines(layer, fixed, False, strength, max(1, round(width_px)), cv2.LINE_AA, _SUBPIXEL)

    def layer(self) -> NDArray[np.uint8]:
        """An empty byte layer."""
        return np.zeros((self.size_px, self.size_px), np.uint8)

    def lift(self, layer: NDArray[np.uint8], soft_mm: float = 0.0) -> Field:
        """Byte layer as a field 0..1, softened."""
        sigma = soft_mm / self.spacing_mm
        if sigma >= 0.3:
            layer = cv2.GaussianBlur(layer, (0, 0), sigma)
        return np.multiply(layer, np.float32(1 / 255), dtype=np.float32)

    def soften(self, field: Field, soft_mm: float) -> Field:
        """Gaussian blur with a standard deviation in mm; wide ones run on a shrunk image."""
        sigma = soft_mm / self.spacing_mm
        if sigma < 0.3:
            return field
        if sigma < 3:
            return cv2.GaussianBlur(field, (0, 0), sigma)
        small = max(12, int(self.size_px * 3 / sigma))
        shrunk = cv2.resize(field, (small, small), interpolation=cv2.INTER_AREA)
        shrunk = cv2.GaussianBlur(shrunk, (0, 0), sigma * small / self.size_px)
        return cv2.resize(shrunk, (self.size_px, self.size_px), interpolation=cv2.INTER_LINEAR)

    def blob(self, centre: tuple[float, float], radius_x: float, radius_y: float) -> Field:
        """Gaussian of height 1 with the given standard deviations in mm."""
        x = (self.coarse_mm[0] - np.float32(centre[0])) * np.float32(1 / radius_x)
        y = (self.coarse_mm[1] - np.float32(centre[1])) * np.float32(1 / radius_y)
        return self.spread(np.exp((x * x + y * y) * np.float32(-0.5)))

    def spread(self, coarse: Field) -> Field:
        """Enlarge a smooth field drawn on `coarse_mm` to the image."""
        return cv2.resize(coarse, (self.size_px, self.size_px), interpolation=cv2.INTER_LINEAR)

    def clouds(self, rng: Generator, cells: int) -> Field:
        """Smooth standard normal noise with about `cells` bumps across the image."""
        grid = rng.standard_normal((cells + 2, cells + 2), np.float32)
        return cv2.resize(grid, (self.size_px, self.size_px), interpolation=cv2.INTER_CUBIC)

    def _fixed(self, points: Points) -> NDArray[np.int32]:
        return np.rint(self.to_px(points) * np.float32(1 << _SUBPIXEL)).astype(np.int32)
