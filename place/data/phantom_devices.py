"""Draws what is not the patient: tube, catheter, pacemaker, wires, leads."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_anatomy import SIGN, build_ellipse, smooth_curve
from place.data.phantom_canvas import Field
from place.data.phantom_facts import Devices
from place.data.phantom_tissue import Scene


def draw_devices(scene: Scene, devices: Devices, rng: Generator) -> Field:
    """Metal and plastic that the report names."""
    canvas, chest = scene.canvas, scene.chest
    layer, top, (x, y) = canvas.layer(), chest.apex_y[0], chest.carina
    if devices.tube_mm:
        tip = (x + 1, y - devices.tube_mm)
        tube = smooth_curve(np.array([(1, top - 120), (2, top - 20), tip], np.float32))
        for side in (-4, 4):
            canvas.stroke(layer, tube + np.array([side, 0], np.float32), 1.8, 160)
        canvas.stroke(layer, tube, 1.2, 120)
    if devices.line_side:
        sign = SIGN[devices.line_side]
        path = [(sign * 62, top - 60), (sign * 42, top + 8), (sign * 16 if sign < 0 else -2, top + 42),
                (-19 + chest.offset, y - 12), (-21 + chest.offset, y + 26)]  # fmt: skip
        canvas.stroke(layer, smooth_curve(np.array(path, np.float32)), 2.4, 190)
    if devices.pacemaker:
        _draw_pacemaker(scene, layer)
    if devices.sternotomy:
        for i in range(6):
            canvas.stroke(layer, build_ellipse(-2 * chest.offset / 9, y - 22 + 19 * i, 7, 5, 14), 1.3, 210)
    if devices.leads:
        _draw_leads(scene, layer, rng)
    return canvas.lift(layer, 0.3) * np.float32(0.95)


def _draw_pacemaker(scene: Scene, layer: NDArray[np.uint8]) -> None:
    canvas, chest = scene.canvas, scene.chest
    x, y = 0.68 * chest.half_width, chest.apex_y[0] + 44
    circle = build_ellipse(0, 0, 1, 1)
    box = np.array([x, y], np.float32) + np.sign(circle) * np.abs(circle) ** 0.6 * np.array([22, 18], np.float32)
    canvas.paint(layer, box, 215)
    canvas.stroke(layer, box, 1.5, 255)
    top, carina = chest.apex_y[0], chest.carina[1]
    shared = [(x - 16, y - 6), (40, top + 30), (4, top + 48), (-17 + chest.offset, carina)]
    atrium = [*shared, (-22 + chest.offset, carina + 50), (chest.heart_right * 0.6, chest.heart_y - 6)]
    ventricle = [*shared, (-18 + chest.offset, carina + 60), (-4 + chest.offset, chest.heart_y + 26),
                 (0.55 * chest.heart_left, chest.heart_y + 30)]  # fmt: skip
    for path in (atrium, ventricle):
        canvas.stroke(layer, smooth_curve(np.array(path, np.float32)), 1.8, 225)


def _draw_leads(scene: Scene, layer: NDArray[np.uint8], rng: Generator) -> None:
    canvas, chest = scene.canvas, scene.chest
    half, top = chest.half_width, chest.apex_y[0]
    spots = np.array([(-0.72, 40), (0.74, 38), (-0.7, 172), (0.78, 176), (0.3, 118)])
    for i in rng.permutation(5)[: int(rng.integers(3, 6))]:
        x, y = spots[i, 0] * half + rng.normal(0, 9), top + spots[i, 1] + rng.normal(0, 9)
        canvas.paint(layer, build_ellipse(x, y, 5.5, 5.5, 14), 170)
        way = np.sign(x) if y < top + 100 else rng.choice([-1, 1])
        end = (x + way * rng.uniform(60, 120), y + (-140 if y < top + 100 else 160))
        path = [(x, y), (x + way * rng.uniform(5, 40), y + rng.uniform(-25, 35)), end]
        canvas.stroke(layer, smooth_curve(np.array(path, np.float32)), 1.7, 125)
