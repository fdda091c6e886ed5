"""Lays out archives in the shape in which they are downloaded, with drawn images and invented reports."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pydicom
from small_sets import draw_image, encode

from place.config import PrepareConfig
from place.data.phantom_dicom import build_dicom

MIMIC_REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___F with cough  // eval for pneumonia
 
 TECHNIQUE:  Chest PA and lateral
 
 COMPARISON:  None.
 
 FINDINGS: 
 
 There is no focal consolidation, pleural effusion or pneumothorax.  A 2.5 cm
 nodule is seen in study {}.
 
 IMPRESSION: 
 
 No acute cardiopulmonary process.
"""
METADATA = [
    "dicom_id",
    "subject_id",
    "study_id",
    "PerformedProcedureStepDescription",
    "ViewPosition",
    "Rows",
    "Columns",
    "StudyDate",
    "StudyTime",
    "ProcedureCodeSequence_CodeMeaning",
    "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]


def settings(source: str, folder: Path, **changes: Any) -> PrepareConfig:
    """The config that prepares an archive in `folder` into `folder-out`."""
    base = {"source": source, "input": str(folder), "output": f"{folder}-out", "size_px": 48, "num_workers": 1}
    return PrepareConfig(**{**base, **changes})


def write_gz(path: Path, frame: pd.DataFrame) -> None:
    """A csv.gz as PhysioNet has it."""
    path.write_bytes(gzip.compress(frame.to_csv(index=False).encode()))


def mimic_path(subject: int, study: int) -> str:
    """files/p10/p10000032/s50414267"""
    return f"files/p{str(subject)[:2]}/p{subject}/s{study}"


def write_mimic(folder: Path, suffix: str = ".jpg", num_studies: int = 6, patients: int = 3) -> pd.DataFrame:
    """A tree of MIMIC-CXR(-JPG), a PA and a lateral image a study, patients interleaved. Returns the list of images."""
    rows = []
    for number in range(num_studies):
        subject, study = 10000032 + number % patients, 50414267 + number
        report = folder / f"{mimic_path(subject, study)}.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(MIMIC_REPORT.format(number))
        report.with_suffix("").mkdir()
        for view, meaning in (("PA", "postero-anterior"), ("LATERAL", "lateral")):
            name = f"{number:08x}-{view.lower()[:4]}-68608f2f-0eb4b0b7-6df44c49"
            image = draw_image(number)
            data = (
                encode(image) if suffix == ".jpg" else build_dicom(image, view, str(subject), f"{study}{view}", 0.139)
            )
            (report.with_suffix("") / f"{name}{suffix}").write_bytes(data)
            taken = ["CHEST (PA AND LAT)", view, 3056, 2544, 21800506, "213014.531", "", meaning, "Erect"]
            rows.append([name, subject, study, *taken])
    frame = pd.DataFrame(rows, columns=METADATA)
    write_gz(folder / "mimic-cxr-2.0.0-metadata.csv.gz", frame)
    names = {0: "train", 1: "validate", 2: "test"}
    frame["split"] = (frame["subject_id"] - 10000032).map(lambda at: names.get(at, "train"))
    write_gz(folder / "mimic-cxr-2.0.0-split.csv.gz", frame[["dicom_id", "study_id", "subject_id", "split"]])
    labels = frame.drop_duplicates("study_id")[["subject_id", "study_id"]]
    labels = labels.assign(**{"Edema": "1.0", "No Finding": "", "Pleural Effusion": "-1.0"})
    write_gz(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", labels)
    return frame


def write_png(path: Path, seed: int) -> None:
    """A small grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(draw_image(seed, 40, 32), "PNG"))


def write_openi_report(path: Path, name: str, images: list[str], findings: str, impression: str) -> None:
    """An XML report with the elements that matter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = "".join(f'<parentImage id="{image}"><figureId>F1</figureId></parentImage>' for image in images)
    path.write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/><uId id="{name}"/>'
        f'<MedlineCitation><Article><Abstract><AbstractText Label="COMPARISON">None.</AbstractText>'
        f'<AbstractText Label="INDICATION"/>'
        f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
        f'<AbstractText Label="IMPRESSION">{impression}</AbstractText></Abstract></Article></MedlineCitation>'
        f"{figures}</eCitation>"
    )


def write_r2gen(folder: Path, entries: dict[str, list[dict[str, Any]]]) -> None:
    """annotation.json beside images/, and an image for each path in it."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotation.json").write_text(json.dumps(entries))
    for number, path in enumerate(
        path for split in entries.values() for entry in split for path in entry["image_path"]
    ):
        write_png(folder / "images" / path, number)


def write_dicom(path: Path, seed: int = 0, **elements: Any) -> None:
    """A radiograph of 12 bits with the given header elements."""
    data = build_dicom(draw_image(seed), "PA", "P1", f"study {seed}", 0.15)
    dataset = pydicom.dcmread(io.BytesIO(data))
    for name, value in elements.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
