"""Exposes a phantom: attenuation to grey levels with scatter, tone curve, noise and collimation."""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_canvas import Canvas, Field
from place.data.phantom_tissue import Scene


def expose_film(scene: Scene, field: Field, rng: Generator) -> NDArray[np.uint8]:
    """Attenuation to grey levels: scatter, shading, tone curve, noise, collimation."""
    canvas = scene.canvas
    field = field + canvas.spread(_shade(canvas, field, rng))
    low, high = np.quantile(field[::6, ::6], (0.06, 0.985)) + rng.normal(0, 0.1, 2)
    steep, middle = rng.uniform(2.2, 5.0), rng.uniform(0.3, 0.66)
    rate = steep / max(high - low, 0.4)
    field *= np.float32(-rate)
    field += np.float32(rate * low + steep * middle)
    grey = cv2.exp(field)
    grey += np.float32(1)
    np.reciprocal(grey, out=grey)
    floor, ceiling = rng.uniform(0.0, 0.2), rng.uniform(0.75, 1.0)
    gain = (ceiling - floor) / 0.76
    grey *= np.float32(gain)
    grey += np.float32(floor - 0.12 * gain)
    _add_grain(scene, grey, rng)
    _collimate(canvas, grey, rng)
    grey *= np.float32(255)
    return np.clip(grey, 0, 255, out=grey).astype(np.uint8)


def _shade(canvas: Canvas, field: Field, rng: Generator) -> Field:
    """Smooth parts of the film, on the coarse grid."""
    x, y = canvas.coarse_mm
    coarse = cv2.resize(field, x.shape[::-1], interpolation=cv2.INTER_AREA)
    # scatter adds the surroundings, the dynamic-range compression of digital readers takes them off
    wide, sigma_mm = rng.uniform(-0.6, 0.3), rng.uniform(24, 42)
    sigma = sigma_mm / canvas.spacing_mm * len(x) / canvas.size_px
    coarse = cv2.GaussianBlur(coarse, (0, 0), sigma) * np.float32(wide)
    lean = rng.normal(0, 0.09, 2) / 150
    coarse += x * np.float32(lean[0]) + y * np.float32(lean[1])
    cloud = cv2.resize(rng.standard_normal((4, 4), np.float32), x.shape[::-1], interpolation=cv2.INTER_CUBIC)
    return coarse + cloud * np.float32(rng.uniform(0, 0.12))


def _add_grain(scene: Scene, grey: Field, rng: Generator) -> None:
    """Quantum noise, in place: stronger where the film is bright, finer pixels have more."""
    spacing, bedside = scene.canvas.spacing_mm, scene.pose.view == "AP"
    amount = rng.uniform(0.005, 0.013) * (1.25 if bedside else 1.0) * 1.6 / max(spacing, 1.6)
    raw = np.frombuffer(rng.bytes(grey.size), np.uint8).reshape(grey.shape)
    grain = cv2.GaussianBlur(raw, (0, 0), 0.6).astype(np.float32)
    grain -= np.float32(127.5)
    grain *= np.float32(2 * amount / 74)
    grey += grain * (np.float32(0.6) + grey)


def _collimate(canvas: Canvas, grey: Field, rng: Generator) -> None:
    """Black borders where the beam was cut, on some films."""
    edges = rng.uniform(-0.25, 0.055, 4)
    size = canvas.size_px
    for axis, (start, stop) in enumerate(np.maximum(edges, 0).reshape(2, 2)):
        first, last = round(start * size), size - round(stop * size)
        view = grey if axis == 0 else grey.T
        view[:first] *= np.float32(0.08)
        view[last:] *= np.float32(0.08)
