"""Phantom chest radiographs with reports and ground truth: PLACE's controlled experiment."""

import zlib
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from place.data.phantom_anatomy import build_chest, draw_anatomy, draw_pose
from place.data.phantom_bones import draw_ribs, draw_skeleton
from place.data.phantom_canvas import Canvas
from place.data.phantom_devices import draw_devices
from place.data.phantom_facts import FINDINGS, Devices, Fact, draw_facts
from place.data.phantom_facts import draw_devices as choose_devices
from place.data.phantom_film import expose_film
from place.data.phantom_findings import Layers, draw_finding
from place.data.phantom_report import write_report
from place.data.phantom_tissue import Scene, build_scene, draw_body, draw_vessels

__all__ = ["FINDINGS", "VISIBLE_AT_DEMO", "PhantomStudy", "Region", "encode_dicom", "encode_jpeg", "generate_study"]

VISIBLE_AT_DEMO: tuple[str, ...] = ("cardiomegaly", "effusion", "pneumothorax", "consolidation", "edema", "atelectasis")
"""Findings that can be seen at the demo's resolution.

Measured on `generate_study(0, i, 96)`, i < 6,000 (4,000 to train, 1,000 to choose, 1,000 to test). A network of four
convolutions on the studies shrunk to 64 px with random crops of 56, 14 epochs, reached these test AUROC: cardiomegaly
.992, effusion .982, pneumothorax .999, consolidation .897, edema .999, atelectasis .953, mean .970; nodule .641 and
fracture .541 stay hidden and are left out. Logistic regression on the standardised 96 px pixels (L2 chosen on the
second part) reached .730, .630, .612, .503, .819, .580, mean .646.
"""

_BLOCK = 6
"""Studies that are dealt out to patients together."""
_DEALS = ((1, 2, 3), (2, 1, 3), (3, 2, 1), (2, 2, 2), (3, 3), (1, 1, 2, 2), (2, 3, 1), (1, 1, 1, 3))
"""Studies a patient in a block."""


class Region(NamedTuple):
    """A finding where it is: box in pixels (x0, y0, x1, y1; x1, y1 excluded) and mask (Y, X) bool."""

    finding: str
    side: str
    severity: str
    box_xyxy: tuple[float, float, float, float]
    mask_YX: NDArray[np.bool_]


class PhantomStudy(NamedTuple):
    """A radiograph (Y, X) uint8, bright bones, with its report and truth.

    `region_of_sentence` has an entry for each findings sentence, then each impression sentence: an index into `regions`
    or -1. `labels` has 1 or 0 for each of `FINDINGS`.
    """

    image_YX: NDArray[np.uint8]
    findings: tuple[str, ...]
    impression: tuple[str, ...]
    labels: dict[str, int]
    regions: tuple[Region, ...]
    region_of_sentence: tuple[int, ...]
    view: str
    patient: str
    study: str
    spacing_mm: float


def generate_study(seed: int, index: int, size_px: int = 256) -> PhantomStudy:
    """Make one study; the same arguments give the same study, in any order and process.

    Args:
        seed: the collection. Other seeds give other patients.
        index: number of the study in it, from 0.
        size_px: side of the square image in pixels; anatomy and report do not depend on it.
    Returns:
        The study.
    Source: ours.
    """
    patient, number = _find_patient(seed, index)
    anatomy = draw_anatomy(_build_rng(seed, 1, zlib.crc32(patient.encode())))
    rng = _build_rng(seed, 2, index)
    pose = draw_pose(rng, anatomy)
    facts = draw_facts(rng)
    devices = choose_devices(rng, anatomy, pose.view)
    report = write_report(facts, devices, pose, _build_rng(seed, 3, index))
    ctr = next((fact.size_mm for fact in facts if fact.finding == "cardiomegaly"), anatomy.ctr)
    chest = build_chest(anatomy, pose, ctr, *_displace(facts))
    scene = build_scene(Canvas(size_px, pose), chest, anatomy, pose)
    image, masks = _render(scene, facts, devices, _build_rng(seed, 4, index))
    return PhantomStudy(
        image_YX=image,
        findings=report.findings,
        impression=report.impression,
        labels={name: int(any(fact.finding == name for fact in facts)) for name in FINDINGS},
        regions=tuple(_build_region(fact, mask) for fact, mask in zip(facts, masks)),
        region_of_sentence=report.fact_of_sentence,
        view=pose.view,
        patient=patient,
        study=f"{patient}-{number}",
        spacing_mm=scene.canvas.spacing_mm,
    )


def encode_jpeg(image_YX: NDArray[np.uint8], quality: int = 95) -> bytes:
    """Grey JPEG of an image."""
    done, data = cv2.imencode(".jpg", image_YX, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return data.tobytes()


def encode_dicom(study: PhantomStudy) -> bytes:
    """DICOM file of a study: 12 bits in 16, a window, and MONOCHROME1 for about a third of the studies."""
    from place.data.phantom_dicom import build_dicom

    return build_dicom(study.image_YX, study.view, study.patient, study.study, study.spacing_mm)


def _build_rng(seed: int, stream: int, index: int) -> Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, stream, index))))


def _find_patient(seed: int, index: int) -> tuple[str, int]:
    """Name of the patient that study `index` belongs to, and the study's number with him."""
    block, place = divmod(index, _BLOCK)
    deal = _DEALS[int(_build_rng(seed, 0, block).integers(len(_DEALS)))]
    ends = np.cumsum(deal)
    nth = int(np.searchsorted(ends, place, side="right"))
    return f"phantom-{seed}-{block:06d}-{nth}", place - int(ends[nth] - deal[nth])


def _displace(facts: tuple[Fact, ...]) -> tuple[tuple[float, float], float]:
    """How far facts raise the (right, left) hemidiaphragm and push the mediastinum to the image's right, in mm."""
    lifted, pushed = {"right": 0.0, "left": 0.0}, 0.0
    for fact in facts:
        away = {"right": 1.0, "left": -1.0}.get(fact.side, 0.0)
        if fact.kind == "lobar":
            lifted[fact.side] = 0.9 * fact.size_mm
            pushed -= away * 0.2 * fact.size_mm
        if fact.finding in ("effusion", "pneumothorax") and fact.severity == "large":
            pushed += away * 8
    return (lifted["right"], lifted["left"]), pushed


def _render(
    scene: Scene, facts: tuple[Fact, ...], devices: Devices, rng: Generator
) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    congestion = next((fact.size_mm for fact in facts if fact.finding == "edema"), 0.0)
    body = draw_body(scene, rng)
    layers = Layers(body, draw_vessels(scene, rng, min(congestion, 1.0)), np.zeros_like(body), scene.aerated.copy())
    masks = [draw_finding(scene, layers, fact, rng) for fact in facts]
    breaks = {(fact.side, fact.rib): (fact.place, fact.size_mm) for fact in facts if fact.finding == "fracture"}
    field = layers.body + layers.vessels * scene.aerated + layers.over
    field += draw_ribs(scene, breaks) + draw_skeleton(scene) + draw_devices(scene, devices, rng)
    return expose_film(scene, field, rng), masks


def _build_region(fact: Fact, mask: NDArray[np.bool_]) -> Region:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (0.0, 0.0, 0.0, 0.0)
    if len(rows):
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Region(fact.finding, fact.side, fact.severity, box, mask)
