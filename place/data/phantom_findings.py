"""Draws the findings of a phantom study into its attenuation and returns their true masks."""

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_anatomy import SIGN, Points, build_lung, compute_lateral, smooth_curve
from place.data.phantom_bones import build_ribs
from place.data.phantom_canvas import Field
from place.data.phantom_facts import Fact
from place.data.phantom_tissue import Scene


class Layers(NamedTuple):
    """Fields under way: the body, the lung markings, what lies over everything, and the share of lung still aired."""

    body: Field
    vessels: Field
    over: Field
    air: Field


def draw_finding(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> NDArray[np.bool_]:
    """Add one finding to the layers, in place. Returns its mask (Y, X). Source: ours."""
    mask = _DRAW[fact.finding](scene, layers, fact, rng)
    return mask > 0.5


def _sides(fact: Fact) -> list[str]:
    return ["right", "left"] if fact.side == "both" else [fact.side]


def _index(side: str) -> int:
    return 0 if side == "right" else 1


def _find_wall(scene: Scene, i: int, y: float) -> float:
    """Distance of the lung's lateral wall from the midline at height y, in mm."""
    chest = scene.chest
    return float(compute_lateral(chest.half_width, chest.apex_y[i], chest.angle_y[i], np.array([y], np.float32))[0])


def _zone_centre(scene: Scene, fact: Fact) -> tuple[float, float]:
    """A point of the lung in the named zone, `place` of the way from the mediastinum to the wall."""
    chest, i, sign = scene.chest, _index(fact.side), SIGN[fact.side]
    top, dome = chest.apex_y[i], chest.dome_y[i]
    share = {"upper": 0.24, "mid": 0.53, "lower": 0.8}[fact.zone]
    y = top + share * (dome - top)
    wall = _find_wall(scene, i, y)
    near = np.abs(y - chest.heart_y) < 45
    border = abs(chest.heart_left if sign > 0 else chest.heart_right) if near else 30.0
    border = min(border + 6, wall - 22)
    return sign * (border + fact.place * (wall - 8 - border)), y


def _draw_cardiomegaly(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    """The wide heart is in the contour already; its mask is the silhouette from the carina down."""
    below = scene.canvas.y_mm > scene.chest.carina[1] + 20
    return scene.heart * below


def _draw_effusion(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    canvas, chest = scene.canvas, scene.chest
    total = np.zeros_like(layers.body)
    for side in _sides(fact):
        i, sign = _index(side), SIGN[side]
        lung, height = scene.lungs[i], 1.07 * fact.size_mm  # the soft meniscus ends a little below its line
        width = chest.half_width * (1 - 0.05 * sign * scene.pose.rotation)
        across = np.clip(canvas.x_mm * np.float32(sign / width), 0, 1)
        level = chest.angle_y[i] - height * (0.42 + 0.58 * across**3.2)
        fluid = _ramp((canvas.y_mm - level) * np.float32(1 / 5)) * lung
        _fill_air(scene, layers, side, fluid, 0.98)
        layers.vessels[...] *= 1 - fluid
        total += fluid
    return total


def _fill_air(
    scene: Scene, layers: Layers, side: str, where: Field, strength: float, texture: Field | float = 1.0
) -> None:
    """Put something dense where air was: no brighter than a body without lungs."""
    air = 0.95 * scene.pose.aeration[_index(side)]
    layers.body[...] += where * layers.air * texture * np.float32(strength * air)
    layers.air[...] *= 1 - where * np.float32(min(strength, 1))


def _ramp(field: Field) -> Field:
    """Soft step through 0.5 at 0."""
    return np.clip(field * np.float32(0.5) + np.float32(0.5), 0, 1)


def _draw_pneumothorax(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    canvas, chest, i, sign = scene.canvas, scene.chest, _index(fact.side), SIGN[fact.side]
    rim = fact.size_mm
    width = chest.half_width * (1 - 0.05 * sign * scene.pose.rotation) - 0.62 * rim
    base = chest.angle_y[i] - 0.25 * rim
    lung = build_lung(sign, width, chest.apex_y[i] + rim, chest.dome_y[i], max(base, chest.dome_y[i] + 6))
    inner = canvas.fill(lung, 0.8) * scene.lungs[i]
    free = np.clip(scene.lungs[i] - inner, 0, 1) * (1 - scene.heart)
    layers.body[...] += inner * (0.05 + min(rim, 60) / 60 * 0.14) * (1 - scene.heart) - free * 0.3
    layers.vessels[...] *= 1 - free
    layers.air[...] *= 1 - free
    line = canvas.layer()
    canvas.stroke(line, lung[:30], 1.7, 200)
    layers.over[...] += canvas.lift(line, 0.4) * scene.lungs[i] * np.float32(0.3)
    return free


def _draw_consolidation(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    canvas, i = scene.canvas, _index(fact.side)
    centre = _zone_centre(scene, fact)
    radius = fact.size_mm / 2
    ragged = canvas.clouds(rng, int(canvas.spacing_mm * canvas.size_px / 26))
    shape = canvas.blob(centre, radius * 0.85, radius * rng.uniform(0.65, 0.9)) * (1 + 0.22 * ragged)
    cloud = np.clip((shape - np.float32(0.3)) * np.float32(1 / 0.5), 0, 1) * scene.lungs[i]
    strength = {"mild": 0.62, "moderate": 0.76, "severe": 0.9}[fact.severity]
    patchy = 1 + 0.14 * canvas.clouds(rng, int(canvas.spacing_mm * canvas.size_px / 9))
    _fill_air(scene, layers, fact.side, cloud, strength, patchy)
    layers.vessels[...] *= 1 - 0.8 * cloud
    bronchi = canvas.layer()
    for _ in range(3):
        aim = rng.normal(0, radius * 0.5, 2)
        path = np.array([(centre[0] - aim[0], centre[1] - 0.4 * aim[1]), centre + aim * (1, 0.6)], np.float32)
        canvas.stroke(bronchi, path, 2.2, 200)
    layers.over[...] -= canvas.lift(bronchi, 0.8) * cloud * np.float32(0.16)
    return (cloud > 0.35).astype(np.float32)


def _draw_nodule(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    canvas = scene.canvas
    x, y = _zone_centre(scene, fact)
    radius = fact.size_mm / 2
    away = ((canvas.x_mm - np.float32(x)) ** 2 + (canvas.y_mm - np.float32(y)) ** 2) * np.float32(1 / radius**2)
    ball = np.sqrt(np.clip(1 - away, 0, None))
    layers.over[...] += canvas.soften(ball, 0.7) * np.float32(0.3 + 0.012 * fact.size_mm)
    return (away <= 1).astype(np.float32)


def _draw_edema(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    canvas, chest, grade = scene.canvas, scene.chest, fact.size_mm
    haze = np.zeros_like(layers.body)
    lines = canvas.layer()
    for i, sign in enumerate((-1, 1)):
        hub = (sign * (40 + 0.1 * chest.half_width) + chest.offset, chest.carina[1] + 38)
        haze += canvas.blob(hub, 30 + 9 * grade, 40 + 12 * grade) * np.float32(rng.uniform(0.75, 1.1))
        for y in np.linspace(chest.angle_y[i] - 58, chest.angle_y[i] - 18, 7) + rng.normal(0, 2, 7):
            wall = _find_wall(scene, i, y)
            ends = np.array([(sign * (wall - 2), y), (sign * (wall - rng.uniform(10, 17)), y + 1.5)], np.float32)
            canvas.stroke(lines, ends, 1.1, 230)
    lung = layers.air * np.float32(np.mean(scene.pose.aeration))
    cells = int(canvas.spacing_mm * canvas.size_px / 11)
    mottled = 1 + 0.36 * canvas.clouds(rng, cells) + 0.3 * canvas.clouds(rng, 2 * cells)
    cloud = np.clip(haze, 0, 1) * lung
    layers.body[...] += (cloud * np.float32(0.4 * grade) + lung * np.float32(0.06 * grade)) * mottled
    layers.over[...] += canvas.lift(lines, 0.4) * lung * np.float32(0.22 * grade)
    return (np.clip(haze, 0, 1) * scene.aerated > 0.3).astype(np.float32)


def _draw_atelectasis(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    return (_draw_band if fact.kind == "band" else _draw_lobar)(scene, layers, fact, rng)


def _draw_band(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    """Plate-like: a straight dense band a few mm thick."""
    canvas, i = scene.canvas, _index(fact.side)
    x, y = _zone_centre(scene, fact)
    slope = rng.uniform(-0.35, 0.35)
    thick = {"mild": 5.0, "moderate": 7.0, "severe": 9.0}[fact.severity]
    half = fact.size_mm / 2
    ends = np.array([(x - half, y - half * slope), (x, y - 2), (x + half, y + half * slope)], np.float32)
    layer = canvas.layer()
    middle = smooth_curve(ends)
    taper = thick / 2 * np.sin(np.linspace(0.25, np.pi - 0.12, len(middle), dtype=np.float32))[:, None]
    up = np.array([0, 1], np.float32) * taper
    canvas.paint(layer, np.concatenate([middle - up, (middle + up)[::-1]]), 255)
    sharp = canvas.lift(layer) * scene.lungs[i]
    layers.over[...] += canvas.soften(sharp, 1.3) * np.float32(0.5)
    layers.body[...] += canvas.soften(sharp, 7) * np.float32(0.3)
    return sharp


def _draw_lobar(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    """Lower-lobe volume loss: the diaphragm is up already; a wedge above it has lost its air."""
    canvas, chest, i, sign = scene.canvas, scene.chest, _index(fact.side), SIGN[fact.side]
    height = fact.size_mm
    across = np.clip(canvas.x_mm * np.float32(sign / chest.half_width), 0, 1.2)
    level = chest.dome_y[i] + 4 - height * (1.15 - 1.05 * across)
    wedge = _ramp((canvas.y_mm - level) * np.float32(1 / 7)) * scene.lungs[i]
    _fill_air(scene, layers, fact.side, wedge, 0.75)
    layers.vessels[...] *= 1 - 0.7 * wedge
    return wedge


def _draw_fracture(scene: Scene, layers: Layers, fact: Fact, rng: Generator) -> Field:
    """The rib is drawn broken; the mask is a disc around the gap."""
    point = find_break(scene, fact)
    far = (scene.canvas.x_mm - point[0]) ** 2 + (scene.canvas.y_mm - point[1]) ** 2
    return (far < 14**2).astype(np.float32)


def find_break(scene: Scene, fact: Fact) -> Points:
    """Where the rib is broken, in mm."""
    line = smooth_curve(build_ribs(scene.chest, scene.anatomy, SIGN[fact.side])[fact.rib - 1, :16], steps=5)
    return line[int(fact.place * (len(line) - 1))]


_DRAW = {
    "cardiomegaly": _draw_cardiomegaly, "effusion": _draw_effusion, "pneumothorax": _draw_pneumothorax,
    "consolidation": _draw_consolidation, "nodule": _draw_nodule, "edema": _draw_edema,
    "atelectasis": _draw_atelectasis, "fracture": _draw_fracture,
}  # fmt: skip
