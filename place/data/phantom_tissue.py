"""Draws the soft parts of a phantom chest as attenuation: body, lungs, heart, breasts, airway, stomach, vessels."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_anatomy import Anatomy, Chest, Points, Pose, build_ellipse, smooth_curve
from place.data.phantom_canvas import Canvas, Field


class Scene(NamedTuple):
    """What everything is drawn into: a chest, its canvas, and the masks of lungs (right, left), air and heart."""

    canvas: Canvas
    chest: Chest
    anatomy: Anatomy
    pose: Pose
    lungs: tuple[Field, Field]
    aerated: Field
    heart: Field


def build_scene(canvas: Canvas, chest: Chest, anatomy: Anatomy, pose: Pose) -> Scene:
    """Rasterise the masks that several parts need."""
    heart = canvas.fill(chest.silhouette, 1.6)
    right, left = (canvas.fill(points, 1.3) for points in chest.lung)
    return Scene(canvas, chest, anatomy, pose, (right, left), np.minimum(right + left, 1) * (1 - heart), heart)


def draw_body(scene: Scene, rng: Generator) -> Field:
    """Soft tissue, heart, diaphragm and air, without lungs' markings and bones."""
    canvas, chest, anatomy, pose = scene.canvas, scene.chest, scene.anatomy, scene.pose
    half, top = chest.half_width, chest.apex_y[0]
    fat = 10 + 26 * anatomy.habitus
    body = canvas.fill(_build_torso(half, top, fat, pose.arms), 2.0)
    x, y = canvas.coarse_mm
    across = np.clip(np.abs(x) * np.float32(1 / (half + fat + 30)), 0, 1)
    below = np.clip((y - top) * np.float32(1 / anatomy.lung_height), -0.2, 1.5)
    thick = 1.15 + 0.5 * anatomy.habitus - (0.45 + 0.1 * anatomy.habitus) * across**2
    field = body * canvas.spread(thick + np.float32(0.25) * below)
    air = cv2.addWeighted(scene.lungs[0], pose.aeration[0], scene.lungs[1], pose.aeration[1], 0)
    np.minimum(air, np.float32(max(pose.aeration)), out=air)
    deep = canvas.soften(air, 22) * np.float32(0.38)
    deep += np.float32(0.72)
    field -= air * deep
    heart = canvas.soften(scene.heart, 9) * np.float32(0.3)
    heart += canvas.spread(0.42 + np.clip(0.1 - np.abs(x) * np.float32(0.1 / 34), 0, 1))
    lungs = np.minimum(scene.lungs[0] + scene.lungs[1], 1)
    heart *= scene.heart
    heart *= np.float32(0.3) + np.float32(0.7) * lungs
    field += heart
    if anatomy.breast > 0.12:
        field += _draw_breasts(scene, lungs)
    field -= _draw_airway(scene)
    bubble = _draw_stomach(scene, rng)
    if bubble is not None:
        field -= bubble
    return field


def _build_torso(half: float, top: float, fat: float, arms: float) -> Points:
    side, neck = half + fat, 52 + 0.3 * fat
    drop = 26 + 22 * (1 - arms)
    right = [(-neck, top - 130), (-neck - 2, top - 42), (-half * 0.75, top - 22), (-side - 38, top + drop - 20),
             (-side - 78, top + drop + 46), (-side - 92, top + 190), (-side - 30, top + 190),
             (-side - 14, top + 96), (-side - 2, top + 112), (-side, top + 250), (-side - 6, top + 460)]  # fmt: skip
    curve = smooth_curve(np.array(right, np.float32), steps=4)
    return np.concatenate([curve, (curve * np.array([-1, 1], np.float32))[::-1]])


def _draw_breasts(scene: Scene, lungs: Field) -> Field:
    size, canvas, chest = scene.anatomy.breast, scene.canvas, scene.chest
    radius_x, radius_y = chest.half_width * (0.42 + 0.12 * size), 50 + 28 * size
    y = max(chest.dome_y) - 34 + 30 * size
    down = (canvas.coarse_mm[1] - y) * np.float32(1 / radius_y)
    aside = (np.abs(canvas.coarse_mm[0]) - chest.half_width * 0.58) * np.float32(1 / radius_x)
    edge = np.clip((1 - np.hypot(down, aside)) * np.float32(radius_y / 7), 0, 1)
    fade = np.clip(0.5 + 0.5 * down, 0, 1) * np.float32(0.12 + 0.26 * size)
    through = np.float32(0.35) + np.float32(0.65) * lungs  # over the abdomen they hardly show
    return canvas.spread(edge * fade) * through


def _draw_airway(scene: Scene) -> Field:
    canvas, (x, y) = scene.canvas, scene.chest.carina
    layer = canvas.layer()
    top = scene.chest.apex_y[0] - 70
    canvas.stroke(layer, smooth_curve(np.array([(0, top), (0, y - 60), (x + 1, y - 20), (x, y)], np.float32)), 15, 190)
    canvas.stroke(layer, np.array([(x, y), (x - 24, y + 20)], np.float32), 11, 130)
    canvas.stroke(layer, np.array([(x, y), (x + 33, y + 22)], np.float32), 10, 110)
    return canvas.lift(layer, 1.6) * np.float32(0.26)


def _draw_stomach(scene: Scene, rng: Generator) -> Field | None:
    size, x, y = rng.uniform(0, 1), rng.uniform(35, 75), scene.chest.dome_y[1]
    if size < 0.5:
        return None
    high = 8 + 14 * size
    bubble = scene.canvas.fill(build_ellipse(x, y + 14 + high, 30 * size, high), 3)
    return bubble * np.float32(0.15 + 0.3 * size)


def draw_vessels(scene: Scene, rng: Generator, congestion: float) -> Field:
    """Lung markings that fan out from the hila, and the hila themselves; `congestion` 0..1 widens them."""
    canvas, chest, size = scene.canvas, scene.chest, scene.anatomy.hilum
    layer = canvas.layer()
    for sign, low, drop in zip((-1, 1), chest.dome_y, (26, 18)):
        hub = np.array([sign * 30 + chest.offset, chest.carina[1] + drop], np.float32)
        trunks, twigs = _branch(rng, sign, low - hub[1], chest.half_width)
        canvas.stroke(layer, hub + twigs, 1.5 * (1 + 0.9 * congestion), 120)
        canvas.stroke(layer, hub + trunks[:, 4:], 1.7 * (1 + 0.8 * congestion), 130)
        canvas.stroke(layer, hub + trunks[:, :5], 3.2 * (1 + 0.5 * congestion), 150)
    field = canvas.lift(layer, 0.7 + 1.2 * congestion) * np.float32(0.30 + 0.12 * congestion)
    for sign, drop in ((-1, 28), (1, 18)):
        field += np.float32(0.24 * size) * canvas.blob((sign * 32 + chest.offset, chest.carina[1] + drop), 9 * size, 17)
    return field


def _branch(rng: Generator, sign: float, reach: float, half: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Curves (n, points, 2) around a hilum at the origin: trunks, and the twigs that leave them."""
    count, splits = 12, 4
    angle = np.deg2rad(np.linspace(-78, 84, count) + rng.normal(0, 6, count))
    way = np.stack([sign * np.cos(angle), np.sin(angle)], 1)
    length = (0.72 * half * np.abs(way[:, 0]) + 1.0 * reach * np.abs(way[:, 1])) * rng.uniform(0.75, 1.1, count)
    bend = rng.normal(0, 5, (count, 2))
    t = np.linspace(0, 1, 9)[None, :, None]
    trunks = (way * length[:, None])[:, None] * t + bend[:, None] * (4 * t * (1 - t))
    turn = angle[:, None] + rng.choice([-1, 1], (count, splits)) * rng.uniform(0.3, 0.75, (count, splits))
    far = length[:, None] * rng.uniform(0.2, 0.5, (count, splits))
    twig = np.stack([sign * np.cos(turn) * far, np.sin(turn) * far], 2).reshape(-1, 1, 2)
    start = trunks[np.arange(count)[:, None], rng.integers(2, 8, (count, splits))].reshape(-1, 1, 2)
    t = np.linspace(0, 1, 4)[None, :, None]
    twigs = start + twig * t + rng.normal(0, 2.5, twig.shape) * (4 * t * (1 - t))
    return trunks.astype(np.float32), twigs.astype(np.float32)
