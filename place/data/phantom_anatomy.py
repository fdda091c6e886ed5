"""Who the phantom patient is and how he stands: anatomy, pose, and the contours of his organs in millimetres.

Origin: midline, mid-lung. x runs to the image's right, which is the patient's left; y runs down.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Points = NDArray[np.float32]
"""Contour or polyline, shape (n, 2), millimetres."""

SIGN = {"right": -1.0, "left": 1.0}


class Anatomy(NamedTuple):
    """What stays with a patient from study to study; lengths in mm."""

    is_female: bool
    half_width: float
    lung_height: float
    habitus: float
    ctr: float
    axis: float
    aorta: float
    hilum: float
    breast: float
    scoliosis: float
    rib_gap: float
    rib_drop: float
    rib_density: float
    clavicle_tilt: float
    has_pacemaker: bool
    has_sternotomy: bool


class Pose(NamedTuple):
    """What differs between two studies of a patient; lengths in mm, angles in degrees."""

    view: str
    inspiration: float
    raised: tuple[float, float]
    rotation: float
    tilt: float
    shift: tuple[float, float]
    field: float
    arms: float
    aeration: tuple[float, float]


class Chest(NamedTuple):
    """Contours that the drawing and the findings share; pairs are (right, left)."""

    half_width: float
    apex_y: tuple[float, float]
    dome_y: tuple[float, float]
    angle_y: tuple[float, float]
    lung: tuple[Points, Points]
    silhouette: Points
    heart_right: float
    heart_left: float
    heart_y: float
    ctr: float
    carina: tuple[float, float]
    offset: float


def draw_anatomy(rng: Generator) -> Anatomy:
    """A random patient."""
    is_female = bool(rng.random() < 0.5)
    size = float(rng.uniform(0.8, 1.08))
    height = size * float(np.clip(rng.normal(228 if is_female else 240, 16), 185, 285))
    return Anatomy(
        is_female=is_female,
        half_width=size * float(np.clip(rng.normal(126 if is_female else 136, 9), 104, 158)),
        lung_height=height,
        habitus=float(rng.beta(1.6, 1.8)),
        ctr=float(rng.uniform(0.38, 0.485)),
        axis=float(rng.uniform(-1, 1)),
        aorta=float(rng.uniform(0, 1)),
        hilum=float(rng.uniform(0.6, 1.6)),
        breast=float(rng.uniform(0.15, 1.0)) if is_female else float(rng.uniform(0, 0.2)),
        scoliosis=float(rng.normal(0, 4)),
        rib_gap=height * float(rng.uniform(0.097, 0.112)),
        rib_drop=size * float(rng.uniform(26, 58)),
        rib_density=float(rng.uniform(0.6, 1.4)),
        clavicle_tilt=float(rng.uniform(-6, 16)),
        has_pacemaker=bool(rng.random() < 0.1),
        has_sternotomy=bool(rng.random() < 0.1),
    )


def draw_pose(rng: Generator, anatomy: Anatomy) -> Pose:
    """A random way to stand (PA) or lie (AP) before the detector."""
    view = "AP" if rng.random() < 0.5 else "PA"
    inspiration = float(np.clip(rng.normal(-0.45 if view == "AP" else 0.35, 0.65), -1.6, 1.4))
    raised = [0.0, 0.0]
    if rng.random() < 0.08:
        raised[int(rng.integers(2))] = float(rng.uniform(14, 26))
    spread = 1.25 if view == "AP" else 1.0
    return Pose(
        view=view,
        inspiration=inspiration,
        raised=(raised[0], raised[1]),
        rotation=float(np.clip(rng.normal(0, 0.45 * spread), -1.3, 1.3)),
        tilt=float(np.clip(rng.normal(0, 4.5 * spread), -13, 13)),
        shift=(float(rng.uniform(-38, 38)), float(rng.uniform(-28, 36))),
        field=float(rng.uniform(290, 430)) * (0.5 + 0.5 * anatomy.half_width / 130),
        arms=float(rng.uniform(0, 1)),
        aeration=_draw_aeration(rng),
    )


def _draw_aeration(rng: Generator) -> tuple[float, float]:
    """How much air the (right, left) lung holds, around 1: emphysema is darker, a poor breath or a skin fold paler."""
    common = rng.uniform(0.62, 1.1)
    tilt = rng.normal(0, 0.05)
    return float(common + tilt), float(common - tilt)


def build_chest(anatomy: Anatomy, pose: Pose, ctr: float, lifted: tuple[float, float], pushed: float) -> Chest:
    """The contours of one study.

    Args:
        anatomy: the patient.
        pose: how he stands.
        ctr: cardiothoracic ratio that the heart is drawn with.
        lifted: how far volume loss raises the (right, left) hemidiaphragm, in mm.
        pushed: displacement of the mediastinum towards the image's right, in mm.
    Returns:
        Lung polygons, cardiomediastinal silhouette and the heights that findings hang on.
    Source: ours.
    """
    half, top = anatomy.half_width, -anatomy.lung_height / 2
    depth = anatomy.lung_height / 2 - 18 + 17 * pose.inspiration
    dome = (depth - 12 - pose.raised[0] - lifted[0], depth - pose.raised[1] - lifted[1])
    angle = tuple(max(depth + 26 - 0.25 * up, low + 16) for up, low in zip(lifted, dome))
    widths = (half * (1 + 0.05 * pose.rotation), half * (1 - 0.05 * pose.rotation))
    lungs = tuple(build_lung(sign, width, top, low, cp) for sign, width, low, cp in zip((-1, 1), widths, dome, angle))
    offset = 9 * pose.rotation + pushed
    width = 2 * half * ctr
    share = 0.66 + 0.05 * anatomy.axis
    heart_left, heart_right = share * width + offset, -(1 - share) * width + offset
    heart_y = float(np.mean(dome)) - 34 - 8 * anatomy.axis
    silhouette = _build_silhouette(anatomy, heart_left, heart_right, heart_y, top, offset, max(dome))
    carina = (2 + offset * 0.5, top + 0.33 * anatomy.lung_height)
    return Chest(
        half,
        (top, top),
        dome,
        (angle[0], angle[1]),
        (lungs[0], lungs[1]),
        silhouette,
        heart_right,
        heart_left,
        heart_y,
        ctr,
        carina,
        offset,
    )


def compute_lateral(width: float, top: float, bottom: float, y: Points) -> Points:
    """Distance of the lateral lung wall from the midline at heights y, all in mm."""
    t = np.clip((y - top) / (bottom - top), 0, 1)
    start = 0.3 * width
    return start + (width - start) * (1 - (1 - t) ** 3.0) ** (1 / 2.1) * (1 - 0.05 * t**4)


def build_lung(sign: float, width: float, top: float, dome: float, angle: float) -> Points:
    """Polygon of one lung: medial edge, apex, lateral wall, costophrenic angle, diaphragm."""
    y = np.concatenate([np.linspace(top, top + 20, 8), np.linspace(top + 28, angle, 22)]).astype(np.float32)
    lateral = compute_lateral(width, top, angle, y)
    lateral[-1] *= 0.99
    peak = 0.42 * width
    x = np.linspace(lateral[-1], -1, 24)[1:]
    outer = np.clip((x - peak) / (lateral[-1] - peak), 0, 1) ** 2.3
    inner = np.clip((peak - x) / peak, 0, 1) ** 2
    low = dome + (angle - dome) * outer + 13 * inner
    medial_x, medial_y = np.array([-1, 3, 0.16 * width]), np.array([top + 60, top + 14, top + 3])
    points = np.stack([np.concatenate([lateral, x, medial_x]), np.concatenate([y, low, medial_y])], 1)
    points[:, 0] *= sign
    return points.astype(np.float32)


def smooth_curve(points: Points, closed: bool = False, steps: int = 6) -> Points:
    """Catmull-Rom curve through points (n, 2), `steps` samples a span; an open curve ends with its last point."""
    points = np.asarray(points, np.float32)
    if closed:
        ring = np.concatenate([points[-1:], points, points[:2]])
    else:
        ring = np.concatenate([points[:1], points, points[-1:]])
    spans = _basis(steps) @ np.stack([ring[i : len(ring) - 3 + i] for i in range(4)], 1)
    curve = spans.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, points[-1:]])


@cache
def _basis(steps: int) -> Points:
    t = np.linspace(0, 1, steps, endpoint=False, dtype=np.float32)
    columns = [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]
    return np.stack(columns, 1) / 2


@cache
def _circle(count: int) -> Points:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def build_ellipse(x: float, y: float, radius_x: float, radius_y: float, count: int = 24) -> Points:
    """Axis-aligned ellipse, in mm."""
    return _circle(count) * np.array([radius_x, radius_y], np.float32) + np.array([x, y], np.float32)


def _build_silhouette(
    anatomy: Anatomy, left: float, right: float, y: float, top: float, offset: float, dome: float
) -> Points:
    """Mediastinum and heart as one outline, clockwise from the right side of the neck."""
    level = top + 0.33 * anatomy.lung_height
    knob = 6 + 9 * anatomy.aorta
    base = dome + 14
    hinge = min(level + 34, y - 42)
    vessel = 0.52 * left + 12
    shape = [
        (-25, top - 150), (-23, top - 40), (-23, top + 10), (-24 + offset * 0.6, level - 14), (-25 + offset, hinge),
        (right * 0.93, y - 28), (right, y), (right * 0.9, y + 24), (right * 0.55, base), (left * 0.45, base + 2),
        (left * 0.88, y + 34), (left, y + 14), (left * 0.88, y - 12), (vessel, hinge + 8),
        (30 + offset, level + 10), (26 + knob + offset, level - 12), (24 + 0.7 * knob + offset, level - 26),
        (21, level - 44), (23, top + 4), (23, top - 40), (25, top - 150),
    ]  # fmt: skip
    return smooth_curve(np.array(shape, np.float32), closed=True)
