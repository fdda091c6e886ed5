"""Phantom studies are reproducible, their truth agrees with the image and their reports say what is drawn."""

import io
import re
import zlib
from collections import defaultdict
from functools import cache
from multiprocessing import get_context

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_voi_lut

from place.data.phantom import (
    FINDINGS,
    VISIBLE_AT_DEMO,
    PhantomStudy,
    Region,
    _build_rng,
    _find_patient,
    encode_dicom,
    encode_jpeg,
    generate_study,
)
from place.data.phantom_anatomy import Anatomy, draw_anatomy, draw_pose
from place.data.phantom_report import JOINT, NEGATIVE

COUNT = 300

WORDS = {
    "cardiomegaly": r"cardiomegaly|cardiac silhouette|heart size|the heart|cardiac size|enlarge|cardiothoracic",
    "effusion": r"effusion|pleural fluid|costophrenic",
    "pneumothorax": r"pneumothorax|pleural line",
    "consolidation": r"consolidation|airspace|air space|lungs are (well aerated|clear)|air bronchogram",
    "nodule": r"nodul",
    "edema": r"edema|perihilar|interstitial|congestion|septal",
    "atelectasis": r"atelectasis|volume loss|collapse|band-like",
    "fracture": r"fracture|cortical break",
}
DENIAL = re.compile(
    r"\bno\b|not enlarged|neither|normal in size|size is normal|within normal|are sharp|are clear|and clear|intact"
    r"|without"
)


@cache
def _studies() -> tuple[PhantomStudy, ...]:
    return tuple(generate_study(3, index, 96) for index in range(COUNT))


def _sentences(study: PhantomStudy) -> tuple[str, ...]:
    return study.findings + study.impression


def _digest(job: tuple[int, int, int]) -> tuple[bytes, tuple[str, ...], bytes]:
    study = generate_study(*job)
    masks = b"".join(region.mask_YX.tobytes() for region in study.regions)
    return study.image_YX.tobytes(), _sentences(study), masks


def test_a_study_depends_on_its_arguments_alone():
    jobs = [(5, index, size) for index in (7, 0, 12) for size in (64, 130)]
    first = [_digest(job) for job in jobs]
    np.random.seed(0)  # noqa: NPY002 - the global generator must not matter
    assert [_digest(job) for job in reversed(jobs)] == first[::-1]
    with get_context("spawn").Pool(1) as pool:
        assert pool.map(_digest, jobs) == first
    assert _digest((6, 7, 64)) != first[0]


def test_the_report_does_not_depend_on_the_image_size():
    for index in range(20):
        small, large = generate_study(1, index, 64), generate_study(1, index, 192)
        assert (_sentences(small), small.labels, small.view) == (_sentences(large), large.labels, large.view)
        assert small.spacing_mm * 64 == pytest.approx(large.spacing_mm * 192)


def test_image_is_grey_bytes_with_contrast():
    for study in _studies()[:40]:
        assert study.image_YX.shape == (96, 96)
        assert study.image_YX.dtype == np.uint8
        assert study.image_YX.std() > 20


def test_masks_and_boxes_agree_and_no_finding_is_empty():
    for study in _studies():
        for region in study.regions:
            rows, columns = np.nonzero(region.mask_YX)
            assert region.mask_YX.dtype == bool
            assert len(rows), (study.study, region.finding)
            assert region.box_xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_the_patients_right_is_at_the_images_left():
    seen = set()
    for study in _studies():
        centre = _find_midline(study)
        for region in study.regions:
            if region.side in ("left", "right"):
                columns = np.nonzero(region.mask_YX)[1]
                assert (columns.mean() < centre) == (region.side == "right"), (study.study, region.finding)
                seen.add((region.finding, region.side))
    assert len(seen) == 12


def _find_anatomy(seed: int, index: int) -> Anatomy:
    return draw_anatomy(_build_rng(seed, 1, zlib.crc32(_find_patient(seed, index)[0].encode())))


def _find_midline(study: PhantomStudy) -> float:
    index = next(i for i, other in enumerate(_studies()) if other is study)
    pose = draw_pose(_build_rng(3, 2, index), _find_anatomy(3, index))
    return 48 + pose.shift[0] / study.spacing_mm


def test_labels_regions_and_sentences_tell_one_story():
    for study in _studies():
        assert set(study.labels) == set(FINDINGS)
        assert {region.finding for region in study.regions} == {name for name, on in study.labels.items() if on}
        sentences = _sentences(study)
        assert len(study.region_of_sentence) == len(sentences)
        assert set(range(len(study.regions))) <= set(study.region_of_sentence[: len(study.findings)])
        for text, region in zip(sentences, study.region_of_sentence):
            _check_sentence(study, text, region)


def _check_sentence(study: PhantomStudy, text: str, region: int) -> None:
    low = text.lower()
    assert text.endswith(".")
    assert text.count(".") - len(re.findall(r"\d\.\d", text)) == 1, text
    assert "{" not in text
    named = {name for name, pattern in WORDS.items() if re.search(pattern, low)}
    if region >= 0:
        truth = study.regions[region]
        assert truth.finding in named, text
        assert not DENIAL.search(low), text
        assert all(study.labels[name] for name in named), text
        for side in {"left", "right"} - {truth.side}:
            assert truth.side == "both" or not re.search(rf"\b{side}\b", low), text
    elif DENIAL.search(low):
        assert not any(study.labels[name] for name in named), text
    else:
        assert not named, text


def test_each_denial_is_recognised_by_this_test():
    for name, texts in NEGATIVE.items():
        for text in texts:
            assert re.search(WORDS[name], text.lower()), text
            assert DENIAL.search(text.lower()), text
    for names, texts in JOINT.items():
        for text in texts:
            assert DENIAL.search(text.lower()), text
            if "clear" not in text:
                assert all(re.search(WORDS[name], text.lower()) for name in names), text


def test_clear_lungs_are_said_of_clear_lungs_only():
    for study in _studies():
        if any(re.search(r"lungs are (well aerated and )?clear", text) for text in study.findings):
            assert not any(study.labels[name] for name in ("consolidation", "nodule", "edema", "atelectasis"))


def test_measurements_are_true_to_the_masks():
    checked = defaultdict(int)
    for index in range(120):
        study = generate_study(4, index, 256)
        for text, number in zip(_sentences(study), study.region_of_sentence):
            match = re.search(r"(\d+\.\d) cm|(\d+) mm|ratio of (?:about )?(0\.\d\d)", text)
            if number < 0 or not match or not _is_inside(study.regions[number]):
                continue
            region = study.regions[number]
            stated = float(match[1]) * 10 if match[1] else float(match[2] or match[3])
            measured = _MEASURE[region.finding](study, index, region)
            slack = 0.03 if match[3] else max(2.0, 0.1 * stated)
            assert abs(measured - stated) < slack, (text, index)
            checked[region.finding] += 1
    assert set(checked) == set(_MEASURE)
    assert min(checked.values()) > 5


def _is_inside(region: Region) -> bool:
    x0, y0, x1, y1 = region.box_xyxy
    return x0 > 0 and y0 > 0 and x1 < 256 and y1 < 256 and not (region.finding == "effusion" and region.side == "both")


def _measure_diameter(study: PhantomStudy, index: int, region: Region) -> float:
    return 2 * float(np.sqrt(region.mask_YX.sum() / np.pi)) * study.spacing_mm


def _measure_height(study: PhantomStudy, index: int, region: Region) -> float:
    return (region.box_xyxy[3] - region.box_xyxy[1]) * study.spacing_mm


def _measure_rim(study: PhantomStudy, index: int, region: Region) -> float:
    """Depth of the free air straight below the apex."""
    rows, columns = np.nonzero(region.mask_YX)
    below = region.mask_YX[rows.min() :, round(columns[rows <= rows.min() + 1].mean())]
    below = below[int(np.argmax(below)) :]
    return float(np.argmin(below)) * study.spacing_mm


def _measure_ratio(study: PhantomStudy, index: int, region: Region) -> float:
    width = (region.box_xyxy[2] - region.box_xyxy[0]) * study.spacing_mm
    return width / (2 * _find_anatomy(4, index).half_width)


_MEASURE = {
    "nodule": _measure_diameter,
    "effusion": _measure_height,
    "pneumothorax": _measure_rim,
    "cardiomegaly": _measure_ratio,
}


def test_each_finding_has_its_share_and_a_quarter_is_normal():
    labels = np.array([[study.labels[name] for name in FINDINGS] for study in _studies()])
    assert (labels.mean(0) > 0.12).all(), labels.mean(0)
    assert (labels.mean(0) < 0.28).all(), labels.mean(0)
    assert 0.18 < (labels.sum(1) == 0).mean() < 0.32
    assert labels.sum(1).max() == 4


def test_patients_have_one_to_three_studies_and_one_name_each():
    studies = _studies()[: COUNT - COUNT % 6]
    groups = defaultdict(list)
    for study in studies:
        groups[study.patient].append(study.study)
    sizes = {len(names) for names in groups.values()}
    assert sizes == {1, 2, 3}
    assert len({study.study for study in studies}) == len(studies)
    assert all(name.startswith(patient) for patient, names in groups.items() for name in names)
    assert not {study.patient for study in studies} & {generate_study(4, i, 32).patient for i in range(12)}


def test_reports_differ_from_study_to_study():
    texts = {" ".join(_sentences(study)) for study in _studies()[:200]}
    assert len(texts) >= 190


def test_jpeg_keeps_the_image():
    image = _studies()[0].image_YX
    back = cv2.imdecode(np.frombuffer(encode_jpeg(image), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.abs(back.astype(int) - image).mean() < 3


def test_dicom_gives_the_image_back_also_from_monochrome1():
    kinds = defaultdict(int)
    for study in _studies()[:24]:
        dataset = pydicom.dcmread(io.BytesIO(encode_dicom(study)))
        kinds[dataset.PhotometricInterpretation] += 1
        windowed = apply_voi_lut(dataset.pixel_array, dataset) / 4095 * 255
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            windowed = 255 - windowed
        assert np.abs(windowed - study.image_YX).max() <= 1
        assert dataset.pixel_array.max() < 4096
        assert (dataset.BitsStored, dataset.BitsAllocated) == (12, 16)
        assert (dataset.PatientID, dataset.ViewPosition) == (study.patient, study.view)
        assert float(dataset.PixelSpacing[0]) == pytest.approx(study.spacing_mm, abs=1e-5)
        assert str(dataset.PatientName) == "Phantom"
    assert set(kinds) == {"MONOCHROME1", "MONOCHROME2"}


def test_visible_findings_are_findings():
    assert set(VISIBLE_AT_DEMO) < set(FINDINGS)
