"""Exposes a phantom: attenuation to grey levels with scatter, tone curve, noise and collimation."""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_canvas import Canvas, Field
from place.data.phantom_tissue import Scene


def expose_film(scene: Scene, field: Field, rng: Generator) -> NDArray[np.uint8]:
    """Attenuation to grey levels: scatter, tone curve, shading, noise, collimation."""
    canvas, pose = scene.canvas, scene.pose
    # scatter adds the surroundings, the dynamic-range compression of digital readers takes them off
    wide = rng.uniform(-0.6, 0.3)
    field = field + canvas.soften(field, rng.uniform(24, 42)) * np.float32(wide)
    x, y = canvas.coarse_mm
    lean = rng.normal(0, 0.09, 2) / 150
    field += canvas.spread(x * np.float32(lean[0]) + y * np.float32(lean[1]))
    field += canvas.clouds(rng, 2) * np.float32(rng.uniform(0, 0.12))
    low, high = np.quantile(field[::6, ::6], (0.06, 0.985)) + rng.normal(0, 0.1, 2)
    grey = np.clip((field - np.float32(low)) * np.float32(1 / max(high - low, 0.4)), -0.3, 1.3)
    steep = rng.uniform(2.2, 5.0)
    grey = 1 / (1 + cv2.exp((grey - np.float32(rng.uniform(0.3, 0.66))) * np.float32(-steep)))
    floor, ceiling = rng.uniform(0.0, 0.2), rng.uniform(0.75, 1.0)
    grey = (grey - np.float32(0.12)) * np.float32((ceiling - floor) / 0.76) + np.float32(floor)
    amount = rng.uniform(0.005, 0.013) * (1.25 if pose.view == "AP" else 1.0) * 1.6 / max(canvas.spacing_mm, 1.6)
    grain = rng.standard_normal(grey.shape, np.float32)
    grey += cv2.GaussianBlur(grain, (0, 0), 0.6) * (np.float32(2 * amount) * (np.float32(0.6) + grey))
    _collimate(canvas, grey, rng)
    return np.clip(grey * np.float32(255), 0, 255).astype(np.uint8)


def _collimate(canvas: Canvas, grey: Field, rng: Generator) -> None:
    """Black borders where the beam was cut, on some films."""
    edges = rng.uniform(-0.25, 0.055, 4)
    size = canvas.size_px
    for axis, (start, stop) in enumerate(np.maximum(edges, 0).reshape(2, 2)):
        first, last = round(start * size), size - round(stop * size)
        view = grey if axis == 0 else grey.T
        view[:first] *= np.float32(0.08)
        view[last:] *= np.float32(0.08)
