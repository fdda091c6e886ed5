"""Draws the bones of a phantom chest: ribs, spine, clavicles, shoulders."""

import numpy as np
from numpy.typing import NDArray

from place.data.phantom_anatomy import SIGN, Anatomy, Chest, Points, build_ellipse, compute_lateral, smooth_curve
from place.data.phantom_canvas import Canvas, Field
from place.data.phantom_tissue import Scene

_RIB_T = np.concatenate([np.linspace(0, 1, 16), np.linspace(1, 1.72, 13)[1:]]).astype(np.float32)[None]


def build_ribs(chest: Chest, anatomy: Anatomy, sign: float) -> NDArray[np.float32]:
    """Centre lines of a side's ten ribs in mm, (10, 28, 2): the first 16 points run posterior from the spine to the
    wall, the rest anterior and back towards the sternum."""
    number = np.arange(1, 11, dtype=np.float32)[:, None]
    drop = anatomy.rib_drop * (0.35 + 0.65 * np.minimum(1, number / 5))
    y0 = chest.apex_y[0] - 4 + anatomy.rib_gap * (number - 1) * (0.8 + 0.02 * number)
    wall = 3 + compute_lateral(chest.half_width, chest.apex_y[0], chest.angle_y[0 if sign < 0 else 1], y0 + drop)
    t, is_back = _RIB_T, _RIB_T <= 1
    swing = np.sin(np.pi / 2 * t) ** np.where(is_back, 0.9, 1)
    start = np.where(is_back, 10, 0.25 * wall)
    x = start + (wall - start) * swing
    back = drop * np.minimum(t, 1) ** 2 - 7 * np.sin(np.pi * np.minimum(t, 1))
    y = y0 + back + np.maximum(t - 1, 0) * (drop * 1.1 + 18)
    return np.stack([sign * x, y], 2).astype(np.float32)


def draw_ribs(scene: Scene, breaks: dict[tuple[str, int], tuple[float, float]]) -> Field:
    """Ten pairs of ribs with bright cortices; `breaks` gives (place along the posterior arc, step in mm)."""
    canvas, anatomy = scene.canvas, scene.anatomy
    back, front = canvas.layer(), canvas.layer()
    for side, sign in SIGN.items():
        ribs = build_ribs(scene.chest, anatomy, sign)
        broken = {number: way for (where, number), way in breaks.items() if where == side}
        whole = [i for i in range(10) if i + 1 not in broken]
        _paint_bones(canvas, back, ribs[whole, :16], 9.5, 120)
        for number, (place, step) in broken.items():
            for piece in _cut(ribs[number - 1, :16], place, step):
                _paint_bones(canvas, back, piece[None], 9.5, 120)
        _paint_bones(canvas, front, ribs[:7, 15:], 11.5, 85)
    density = np.float32(0.3 * anatomy.rib_density)
    return (canvas.lift(back, 0.5) + canvas.lift(front, 0.8)) * (density * (0.4 + 0.6 * scene.aerated))


def _cut(line: Points, place: float, step: float) -> tuple[Points, Points]:
    """The two pieces of a broken rib, the outer one `step` mm lower."""
    fine = smooth_curve(line, steps=5)
    at = int(place * (len(fine) - 1))
    return fine[: at - 1], fine[at + 2 :] + np.array([0, step], np.float32)


def _paint_bones(canvas: Canvas, layer: NDArray[np.uint8], lines: Points, width: float, value: int) -> None:
    """Long bones along centre lines (m, n, 2): a pale body between two bright cortices."""
    along = np.empty_like(lines)
    along[:, 1:-1] = lines[:, 2:] - lines[:, :-2]
    along[:, 0], along[:, -1] = lines[:, 1] - lines[:, 0], lines[:, -1] - lines[:, -2]
    normal = along[..., ::-1] * np.array([-1, 1], np.float32)
    normal *= width / 2 / np.maximum(np.hypot(normal[..., :1], normal[..., 1:]), 1e-3)
    upper, lower = lines - normal, lines + normal
    canvas.paint(layer, np.concatenate([upper, lower[:, ::-1]], 1), value)
    canvas.stroke(layer, upper, 1.6, value * 1.55)
    canvas.stroke(layer, lower, 1.6, value * 2.0)


def draw_skeleton(scene: Scene) -> Field:
    """Spine, clavicles, scapulae and humeral heads."""
    canvas, chest, anatomy, pose = scene.canvas, scene.chest, scene.anatomy, scene.pose
    layer = canvas.layer()
    i = np.arange(-4, 17, dtype=np.float32)
    y = chest.apex_y[0] - 12 + i * 20.5 + 0.25 * i * i
    x = anatomy.scoliosis * np.sin(i / 4) - 2.5 * pose.rotation
    half, high = 13.5 + 0.4 * i, 8 + 0.12 * i
    for shape_x, shape_y, value in _VERTEBRA:
        outline = np.stack([x[:, None] + half[:, None] * shape_x, y[:, None] + high[:, None] * shape_y], 2)
        canvas.paint(layer, outline, value)
    fade = np.clip((canvas.coarse_mm[1] - np.float32(chest.apex_y[0] - 90)) * np.float32(1 / 90), 0.45, 1)
    field = canvas.lift(layer, 1.3) * canvas.spread(fade * np.float32(0.2))
    return field + _draw_clavicles(scene) + _draw_shoulders(scene)


_VERTEBRA = tuple(
    (np.array(x, np.float32), np.array(y, np.float32), value)
    for x, y, value in (
        ((-1, 0, 1, 0.86, 1, 0, -1, -0.86), (-1, -0.82, -1, 0, 1, 0.82, 1, 0), 140),
        ((-0.14, 0.14, 0.1, -0.1), (-0.2, -0.2, 1.05, 1.05), 200),
        ((-0.7, -0.4, -0.4, -0.7), (-0.6, -0.6, 0.15, 0.15), 190),
        ((0.7, 0.4, 0.4, 0.7), (-0.6, -0.6, 0.15, 0.15), 190),
    )
)
"""Outlines in half widths and heights: body, spinous process, pedicles."""


def _draw_clavicles(scene: Scene) -> Field:
    canvas, chest, pose = scene.canvas, scene.chest, scene.pose
    layer, top = canvas.layer(), chest.apex_y[0]
    rise = scene.anatomy.clavicle_tilt + (10 if pose.view == "AP" else 0)
    for sign in (-1, 1):
        x, half = 9 + sign * 7 * pose.rotation, chest.half_width
        shape = [(x, 30), (x + 0.2 * half, 21), (x + 0.5 * half, 18 - 0.6 * rise), (x + 0.78 * half, 4 - rise),
                 (x + 1.1 * half, -2 - rise)]  # fmt: skip
        line = smooth_curve(np.array(shape, np.float32), steps=6) * np.array([sign, 1], np.float32)
        line[:, 1] += top + (6 if pose.view == "PA" else -8)
        _paint_bones(canvas, layer, line[None], 11, 120)
    return canvas.lift(layer, 0.6) * np.float32(0.36)


def _draw_shoulders(scene: Scene) -> Field:
    """Scapulae overlie the lungs when the patient cannot roll his shoulders forward."""
    canvas, chest, pose = scene.canvas, scene.chest, scene.pose
    layer, top = canvas.layer(), chest.apex_y[0]
    inward = (10 + 22 * pose.arms) if pose.view == "AP" else -8 + 12 * pose.arms
    for sign in (-1, 1):
        edge = chest.half_width - inward
        blade = [(edge - 8, top + 48), (edge + 30, top + 18), (edge + 62, top + 22), (edge + 48, top + 60),
                 (edge + 20, top + 110), (edge + 8, top + 148), (edge, top + 128)]  # fmt: skip
        shape = smooth_curve(np.array(blade, np.float32), closed=True, steps=4) * np.array([sign, 1], np.float32)
        canvas.paint(layer, shape, 85)
        canvas.stroke(layer, shape[-12:], 2.5, 150)
        canvas.paint(layer, build_ellipse(sign * (edge + 76), top + 22, 22, 22), 190)
        arm = np.array([(edge + 80, top + 36), (edge + 102, top + 210)], np.float32) * np.array([sign, 1], np.float32)
        canvas.stroke(layer, arm, 24, 190)
    return canvas.lift(layer, 1.2) * np.float32(0.32)
