"""Lines of text in a picture, drawn and real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from archives import settings, write_dicom
from PIL import Image, ImageDraw, ImageFont
from small_sets import draw_image

from place.config import PrepareConfig
from place.data.burned_in import has_burned_in_text
from place.data.images import decode_image
from place.data.prepare import run_prepare
from place.data.sources import SOURCES


def draw_text(image: np.ndarray, text: str, size_px: int) -> np.ndarray:
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text((12, 12), text, fill=255, font=ImageFont.load_default(size=size_px))
    return np.asarray(picture)


@pytest.mark.parametrize(("side", "size_px"), [(512, 14), (1000, 24), (3000, 70)])
def test_a_name_in_a_picture_is_found_at_any_size_and_a_side_mark_is_none(side, size_px):
    plain = draw_image(0, side, side)
    assert not has_burned_in_text(plain)
    assert not has_burned_in_text(draw_text(plain, "R  AP", size_px))
    assert has_burned_in_text(draw_text(plain, "DOE^JANE 1961", size_px))


def test_noise_and_phantoms_hold_no_text():
    rng = np.random.default_rng(0)
    assert not has_burned_in_text((rng.random((400, 400)) > 0.9).astype(np.uint8) * 255)
    rows = SOURCES["phantom"](PrepareConfig(source="phantom", output="", count=30, size_px=256)).rows
    assert not any(has_burned_in_text(decode_image(row.image)[0]) for row in rows)


# Looked at one by one: each of them has a line of text, such as AP ERECT, a time, or a date.
WITH_TEXT, OF_REAL = 40, 135


def test_text_is_found_in_real_radiographs_and_in_most_that_it_is_drawn_into(real_data):
    paths = sorted((real_data / "covid-cxr" / "images").iterdir())
    images = [decode_image(path.read_bytes())[0] for path in paths]
    assert (sum(map(has_burned_in_text, images)), len(images)) == (WITH_TEXT, OF_REAL)
    drawn = [has_burned_in_text(draw_text(image, "DOE^JANE 1961", 24)) for image in images[::5]]
    assert sum(drawn) / len(drawn) > 0.9


@pytest.mark.parametrize("case", ["keep", "lower"])
def test_warnings_are_in_the_manifest_and_counted_on_the_card(case, tmp_path):
    for number in range(3):
        write_dicom(
            tmp_path / "pacs" / f"IM{number}",
            number,
            SOPInstanceUID=f"1.3.{number}",
            StudyInstanceUID=f"1.2.{number}",
            AccessionNumber=f"A{number}",
            PatientID=f"P{number}",
            BurnedInAnnotation="YES" if number == 1 else "NO",
        )
    reports = ["Seen by Dr. Smith today.", "The lungs are clear.", "Heart is normal, Dr. ___."]
    lines = [
        f"A{number},{report}" if "," not in report else f'A{number},"{report}"' for number, report in enumerate(reports)
    ]
    (tmp_path / "pacs" / "reports.csv").write_text("\n".join(["AccessionNumber,report", *lines]))
    config = settings("dicom-tree", tmp_path / "pacs", case=case)
    card = run_prepare(config)
    assert card["warnings"] == {"burned_in_annotation": 1, "name_in_report": 1}
    rows = pq.read_table(Path(config.output) / "manifest.parquet").to_pylist()
    assert [row["warnings"] for row in rows] == [["name_in_report"], ["burned_in_annotation"], []]
    assert "| name_in_report | 1 | the report holds" in (Path(config.output) / "card.md").read_text()
