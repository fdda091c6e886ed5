"""Draws a phantom chest as attenuation: body, lungs, vessels, bones, heart and devices, then exposes the film."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_anatomy import SIGN, Anatomy, Chest, Points, Pose, compute_lateral, smooth_curve
from place.data.phantom_canvas import Canvas, Field
from place.data.phantom_facts import Devices

LUNG_DEPTH = 1.0
"""Attenuation that full lung takes from the body; everything else is measured against it."""


class Scene(NamedTuple):
    """What the findings draw into: a chest, its canvas, and the lung masks (right, left)."""

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
    return Scene(canvas, chest, anatomy, pose, (right, left), (right + left) * (1 - heart), heart)


def draw_body(scene: Scene, rng: Generator) -> Field:
    """Soft tissue, heart, diaphragm and air, without lungs' markings and bones."""
    canvas, chest, anatomy, pose = scene.canvas, scene.chest, scene.anatomy, scene.pose
    half, top = chest.half_width, chest.apex_y[0]
    fat = 10 + 26 * anatomy.habitus
    body = canvas.fill(_build_torso(half, top, fat, pose.arms), 2.0)
    across = np.clip(np.abs(canvas.x_mm) * np.float32(1 / (half + fat + 30)), 0, 1)
    thick = 1.15 + 0.5 * anatomy.habitus - (0.45 + 0.1 * anatomy.habitus) * across**2
    below = np.clip((canvas.y_mm - top) * np.float32(1 / anatomy.lung_height), -0.2, 1.5)
    field = body * (thick + 0.25 * below)
    lungs = scene.lungs[0] + scene.lungs[1]
    depth = 0.62 + 0.38 * canvas.soften(lungs, 22)
    field -= LUNG_DEPTH * lungs * depth * (0.9 + 0.12 * below)
    lobe = canvas.soften(scene.heart, 9)
    field += scene.heart * (0.42 + 0.3 * lobe) * (0.75 + 0.25 * lungs)
    field += _draw_breasts(scene)
    field -= _draw_airway(scene)
    field -= _draw_stomach(scene, rng)
    return field


def _build_torso(half: float, top: float, fat: float, arms: float) -> Points:
    side, neck = half + fat, 52 + 0.3 * fat
    drop = 26 + 22 * (1 - arms)
    right = [(-neck, top - 130), (-neck - 2, top - 42), (-half * 0.75, top - 22), (-side - 38, top + drop - 20),
             (-side - 78, top + drop + 46), (-side - 92, top + 190), (-side - 30, top + 190),
             (-side - 14, top + 96), (-side - 2, top + 112), (-side, top + 250), (-side - 6, top + 460)]  # fmt: skip
    curve = smooth_curve(np.array(right, np.float32), steps=4)
    return np.concatenate([curve, (curve * np.float32([-1, 1]))[::-1]])


def _draw_breasts(scene: Scene) -> Field:
    size = scene.anatomy.breast
    canvas, chest = scene.canvas, scene.chest
    if size < 0.12:
        return np.zeros_like(canvas.x_mm)
    total = np.zeros_like(canvas.x_mm)
    for sign in (-1, 1):
        x, y = sign * chest.half_width * 0.58, max(chest.dome_y) - 34 + 30 * size
        angle = np.linspace(0, 2 * np.pi, 28)
        droop = np.where(np.sin(angle) > 0, 1.0, 1.5)
        radius_x, radius_y = chest.half_width * (0.42 + 0.12 * size), 44 + 26 * size
        shape = np.stack([x + radius_x * np.cos(angle), y + droop * radius_y * np.sin(angle) * 0.8], 1)
        mask = canvas.fill(shape.astype(np.float32), 3)
        fade = np.clip((canvas.y_mm - (y - 1.2 * radius_y)) * np.float32(1 / (2 * radius_y)), 0, 1)
        total += mask * fade * np.float32(0.12 + 0.26 * size)
    return total


def _draw_airway(scene: Scene) -> Field:
    canvas, (x, y) = scene.canvas, scene.chest.carina
    layer = canvas.layer()
    top = scene.chest.apex_y[0] - 70
    canvas.stroke(layer, smooth_curve(np.array([(0, top), (0, y - 60), (x + 1, y - 20), (x, y)], np.float32)), 15, 190)
    canvas.stroke(layer, np.array([(x, y), (x - 24, y + 20)], np.float32), 11, 130)
    canvas.stroke(layer, np.array([(x, y), (x + 33, y + 22)], np.float32), 10, 110)
    return canvas.lift(layer, 1.6) * np.float32(0.26)


def _draw_stomach(scene: Scene, rng: Generator) -> Field:
    size, x, y = rng.uniform(0, 1), rng.uniform(35, 75), scene.chest.dome_y[1]
    if size < 0.45:
        return np.zeros_like(scene.canvas.x_mm)
    angle = np.linspace(0, 2 * np.pi, 24)
    high = 10 + 14 * size
    shape = np.stack([x + 32 * size * np.cos(angle), y + 12 + high + high * np.sin(angle)], 1).astype(np.float32)
    return scene.canvas.fill(shape, 3) * np.float32(0.3 + 0.25 * size)


def draw_vessels(scene: Scene, rng: Generator, congestion: float) -> Field:
    """Lung markings that fan out from the hila, and the hila themselves; `congestion` 0..1 widens them."""
    canvas, chest = scene.canvas, scene.chest
    layer = canvas.layer()
    for sign, low in zip((-1, 1), chest.dome_y):
        hub = np.array([sign * 30 + chest.offset, chest.carina[1] + (26 if sign < 0 else 18)])
        for start, aim, width, bend in _branch(rng, sign, low - hub[1], chest.half_width):
            middle = (start + aim) / 2 + bend
            line = (hub + np.stack([start, middle, aim])).astype(np.float32)
            points = smooth_curve(line, steps=4)
            canvas.stroke(layer, points[:5], width * (1 + 0.5 * congestion), 150)
            canvas.stroke(layer, points[4:], 0.6 * width * (1 + 0.9 * congestion), 105)
    field = canvas.lift(layer, 0.7 + 1.2 * congestion) * np.float32(0.30 + 0.12 * congestion)
    size = scene.anatomy.hilum
    for sign, drop in ((-1, 26), (1, 16)):
        x = sign * 32 + chest.offset
        field += np.float32(0.24 * size) * canvas.blob((x, chest.carina[1] + drop), 9 * size, 17)
    return field


def _branch(rng: Generator, sign: float, reach: float, half: float) -> list[tuple[Points, Points, float, Points]]:
    """Segments (start, end, width, bend) around a hilum at the origin."""
    angles = np.deg2rad(np.linspace(-78, 84, 11) + rng.normal(0, 6, 11))
    segments = []
    for angle in angles:
        way = np.array([sign * np.cos(angle), np.sin(angle)])
        length = (0.62 * half * abs(way[0]) + 0.75 * reach * abs(way[1])) * rng.uniform(0.75, 1.1)
        end = way * length
        bend = rng.normal(0, 4, 2)
        segments.append((way * 6, end, rng.uniform(2.2, 3.6), bend))
        for split in rng.uniform(0.25, 0.85, 3):
            turn = angle + rng.choice([-1, 1]) * rng.uniform(0.3, 0.7)
            side = np.array([sign * np.cos(turn), np.sin(turn)]) * length * rng.uniform(0.25, 0.5)
            start = way * length * split + bend * split
            segments.append((start, start + side, rng.uniform(1.2, 2.0), rng.normal(0, 2, 2)))
    return segments


def build_rib(chest: Chest, anatomy: Anatomy, sign: float, number: int) -> Points:
    """Centre line of a rib in mm, 28 points: the first 16 posterior from the spine to the wall, the rest anterior."""
    drop = anatomy.rib_drop * (0.35 + 0.65 * min(1.0, number / 5))
    y0 = chest.apex_y[0] - 4 + anatomy.rib_gap * (number - 1) * (0.8 + 0.02 * number)
    side = 0 if sign < 0 else 1
    wall = compute_lateral(chest.half_width, chest.apex_y[0], chest.angle_y[side], np.float32([y0 + drop]))[0] + 3
    t = np.concatenate([np.linspace(0, 1, 16), np.linspace(1, 1.72, 13)[1:]])
    swing = np.sin(np.pi / 2 * t)
    start = np.where(t <= 1, 20.0, 0.25 * wall)
    x = start + (wall - start) * swing ** np.where(t <= 1, 0.9, 1)
    y = y0 + np.where(t <= 1, drop * t**2.0 - 7 * np.sin(np.pi * t) * (t < 1), drop + (t - 1) * (drop * 1.1 + 18))
    return np.stack([sign * x, y], 1).astype(np.float32)


def draw_ribs(scene: Scene, breaks: dict[tuple[str, int], tuple[float, float]]) -> Field:
    """Ten pairs of ribs with bright cortices; `breaks` gives (place along the posterior arc, step in mm)."""
    canvas, anatomy = scene.canvas, scene.anatomy
    back, front = canvas.layer(), canvas.layer()
    for side, sign in SIGN.items():
        for number in range(1, 11):
            line = build_rib(scene.chest, anatomy, sign, number)
            width = 7.5 + 0.35 * min(number, 8)
            for piece in _cut(line[:16], breaks.get((side, number))):
                _paint_rib(canvas, back, piece, width, 120)
            if number < 8:
                _paint_rib(canvas, front, line[15:], width + 2, 85)
    density = np.float32(0.27 * anatomy.rib_density)
    return (canvas.lift(back, 0.5) + canvas.lift(front, 0.8)) * density


def _cut(line: Points, broken: tuple[float, float] | None) -> list[Points]:
    if broken is None:
        return [line]
    place, step = broken
    fine = smooth_curve(line, steps=5)
    at = int(place * (len(fine) - 1))
    return [fine[: at - 1], fine[at + 1 :] + np.float32([0, step])]


def _paint_rib(canvas: Canvas, layer: NDArray[np.uint8], line: Points, width: float, value: int) -> None:
    along = np.gradient(line, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1)
    normal *= width / 2 / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-3)
    upper, lower = line - normal, line + normal
    canvas.paint(layer, np.concatenate([upper, lower[::-1]]), value)
    canvas.stroke(layer, upper, 1.6, value * 1.55)
    canvas.stroke(layer, lower, 1.6, value * 2.0)


def draw_skeleton(scene: Scene) -> Field:
    """Spine, clavicles, scapulae and humeral heads."""
    canvas, chest, anatomy, pose = scene.canvas, scene.chest, scene.anatomy, scene.pose
    layer, top = canvas.layer(), chest.apex_y[0]
    for i in range(-3, 16):
        y = top - 12 + i * 21.5 + 0.2 * i * i
        x = anatomy.scoliosis * np.sin(i / 4) - 2.5 * pose.rotation
        half, high = 14.5 + 0.35 * i, 8.2 + 0.1 * i
        box = [(x - half, y - high), (x, y - high + 1.5), (x + half, y - high), (x + half - 2, y), (x + half, y + high),
               (x, y + high - 1.5), (x - half, y + high), (x - half + 2, y)]  # fmt: skip
        canvas.paint(layer, np.array(box, np.float32), 150)
        canvas.stroke(layer, np.array([(x, y - 5), (x, y + 8)], np.float32), 4, 235)
        for sign in (-1, 1):
            canvas.stroke(layer, np.array([(x + sign * 8, y - 5), (x + sign * 8, y)], np.float32), 5, 215)
    field = canvas.lift(layer, 1.1) * np.float32(0.26)
    return field + _draw_clavicles(scene) + _draw_shoulders(scene)


def _draw_clavicles(scene: Scene) -> Field:
    canvas, chest, pose = scene.canvas, scene.chest, scene.pose
    layer, top = canvas.layer(), chest.apex_y[0]
    rise = scene.anatomy.clavicle_tilt + (10 if pose.view == "AP" else 0)
    for sign in (-1, 1):
        x, half = 9 + sign * 7 * pose.rotation, chest.half_width
        shape = [(x, 30), (x + 0.2 * half, 21), (x + 0.5 * half, 18 - 0.6 * rise), (x + 0.78 * half, 4 - rise),
                 (x + 1.1 * half, -2 - rise)]  # fmt: skip
        line = smooth_curve(np.array(shape, np.float32), steps=6) * np.float32([sign, 1])
        line[:, 1] += top + (6 if pose.view == "PA" else -8)
        _paint_rib(canvas, layer, line, 11, 120)
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
        shape = smooth_curve(np.array(blade, np.float32), closed=True, steps=4) * np.float32([sign, 1])
        canvas.paint(layer, shape, 85)
        canvas.stroke(layer, shape[-12:], 2.5, 150)
        angle = np.linspace(0, 2 * np.pi, 20)
        ball = np.stack([edge + 76 + 22 * np.cos(angle), top + 22 + 22 * np.sin(angle)], 1)
        canvas.paint(layer, ball.astype(np.float32) * np.float32([sign, 1]), 190)
        arm = np.array([(edge + 80, top + 36), (edge + 102, top + 210)], np.float32) * np.float32([sign, 1])
        canvas.stroke(layer, arm, 24, 190)
    return canvas.lift(layer, 1.2) * np.float32(0.32)


def draw_devices(scene: Scene, devices: Devices, rng: Generator) -> Field:
    """Metal and plastic that the report names."""
    canvas, chest = scene.canvas, scene.chest
    layer, top, (x, y) = canvas.layer(), chest.apex_y[0], chest.carina
    if devices.tube_mm:
        tip = (x + 1, y - devices.tube_mm)
        tube = smooth_curve(np.array([(1, top - 120), (2, top - 20), tip], np.float32))
        for side in (-4, 4):
            canvas.stroke(layer, tube + np.float32([side, 0]), 1.8, 160)
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
            angle = np.linspace(0.3, 2 * np.pi, 12)
            loop = np.stack([7 * np.cos(angle) - 2 * chest.offset / 9, y - 22 + 19 * i + 5 * np.sin(angle)], 1)
            canvas.stroke(layer, loop.astype(np.float32), 1.4, 230)
    if devices.leads:
        _draw_leads(scene, layer, rng)
    return canvas.lift(layer, 0.3) * np.float32(0.95)


def _draw_pacemaker(scene: Scene, layer: NDArray[np.uint8]) -> None:
    canvas, chest = scene.canvas, scene.chest
    x, y = 0.68 * chest.half_width, chest.apex_y[0] + 44
    angle = np.linspace(0, 2 * np.pi, 24)
    round_box = np.stack([x + 22 * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.6,
                          y + 18 * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.6], 1)  # fmt: skip
    canvas.paint(layer, round_box.astype(np.float32), 215)
    canvas.stroke(layer, round_box.astype(np.float32), 1.5, 255)
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
        angle = np.linspace(0, 2 * np.pi, 14)
        disc = np.stack([x + 5.5 * np.cos(angle), y + 5.5 * np.sin(angle)], 1).astype(np.float32)
        canvas.paint(layer, disc, 170)
        way = np.sign(x) if y < top + 100 else rng.choice([-1, 1])
        end = (x + way * rng.uniform(60, 120), y + (-140 if y < top + 100 else 160))
        path = [(x, y), (x + way * rng.uniform(5, 40), y + rng.uniform(-25, 35)), end]
        canvas.stroke(layer, smooth_curve(np.array(path, np.float32)), 1.7, 125)


def expose_film(scene: Scene, field: Field, rng: Generator) -> NDArray[np.uint8]:
    """Attenuation to grey levels: scatter, tone curve, shading, noise, collimation."""
    canvas, pose = scene.canvas, scene.pose
    scatter = rng.uniform(0.1, 0.3)
    field = field * np.float32(1 - scatter) + canvas.soften(field, 28) * np.float32(scatter)
    field += canvas.clouds(rng, 2) * np.float32(rng.uniform(0, 0.09))
    low, high = np.quantile(field[::6, ::6], (0.06, 0.985)) + rng.normal(0, 0.06, 2)
    grey = np.clip((field - low) * np.float32(1 / max(high - low, 0.4)), -0.3, 1.3)
    steep = rng.uniform(2.6, 4.6)
    grey = 1 / (1 + cv2.exp((grey - np.float32(rng.uniform(0.38, 0.58))) * np.float32(-steep)))
    floor, ceiling = rng.uniform(0.0, 0.14), rng.uniform(0.84, 1.0)
    grey = (grey - np.float32(0.12)) * np.float32((ceiling - floor) / 0.76) + np.float32(floor)
    amount = rng.uniform(0.006, 0.02) * (1.25 if pose.view == "AP" else 1.0) * 1.6 / max(canvas.spacing_mm, 1.6)
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
