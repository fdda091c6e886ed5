"""MS-CXR in its true layout: phrases and boxes reach the stored images of MIMIC-CXR, and the square the model sees."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from archives import settings, write_mimic

from place.config import PrepareConfig, RunError, UsageError
from place.data.prepare import run_prepare
from place.data.prepared import read_samples
from place.evaluation.grounding import list_phrases

COLUMNS = ["dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h"]
COLUMNS += ["image_width", "image_height", "split"]
FIRST, THIRD = ("00000000-pa-68608f2f-0eb4b0b7-6df44c49", "00000002-pa-68608f2f-0eb4b0b7-6df44c49")
WIDTH, HEIGHT = 2544, 3180
"""The pixels that the boxes are of; the images of the miniature have 64 x 80, stored at 48 x 60."""


def write_table(folder: Path, *rows: tuple) -> Path:
    """A table as PhysioNet has it."""
    lines = [[name, finding, text, f"files/p10/{name}.jpg", *numbers, "test"] for name, finding, text, *numbers in rows]
    path = folder / "MS_CXR_Local_Alignment_v1.1.0.csv"
    pd.DataFrame(lines, columns=COLUMNS).to_csv(path, index=False)
    return path


@pytest.fixture
def archive(tmp_path) -> Path:
    write_mimic(tmp_path / "mimic")
    return tmp_path / "mimic"


def prepare(archive: Path, table: Path, **changes) -> tuple[PrepareConfig, dict]:
    config = settings("mimic-cxr-jpg", archive, boxes=str(table), **changes)
    return config, run_prepare(config)


def test_boxes_come_to_the_stored_size_and_to_the_square_with_their_phrase(archive, tmp_path):
    table = write_table(
        tmp_path,
        (FIRST, "Pneumonia", "left lower lobe opacity", 212, 1060, 530, 636, WIDTH, HEIGHT),
        (FIRST, "Pneumonia", "left lower lobe opacity", 0, 0, WIDTH, HEIGHT, WIDTH, HEIGHT),
        (FIRST, "Edema", "mild edema", 0, 0, 318, 200, WIDTH, HEIGHT),
        (THIRD, "Pneumothorax", "small apical pneumothorax", 100, 500, 200, 300, WIDTH, HEIGHT),
        ("not-there", "Edema", "edema", 0, 0, 10, 10, WIDTH, HEIGHT),
    )
    config, card = prepare(archive, table)
    told = "4 boxes with phrases on 2 of 3 images of MS_CXR_Local_Alignment_v1.1.0.csv, rejected rows included"
    assert (card["notes"], card["boxes"]) == ([told], 4)
    found = {
        s["boxes"][0]["finding"]: s
        for split in ("train", "test")
        for s in read_samples(config.output, split)
        if s["boxes"]
    }
    boxes = found["Pneumonia"]["boxes"]
    assert boxes[0] == {
        "finding": "Pneumonia", "phrase": "left lower lobe opacity", "box_xyxy": [4, 20, 14, 32], "sentence": None,
    }  # fmt: skip
    assert boxes[1]["box_xyxy"] == [0, 0, 48, 60]
    # The model sees 48 x 48 px, from row 6: what lies above is cut, and a box that is all above has no phrase.
    phrases = list(list_phrases(found["Pneumonia"]))
    assert [(p.text, p.finding, p.side_px) for p in phrases] == [("left lower lobe opacity", "Pneumonia", 48)]
    assert phrases[0].boxes == [(4, 14, 14, 26), (0, 0, 48, 48)]
    assert [p.text for p in list_phrases(found["Pneumothorax"])] == ["small apical pneumothorax"]


def test_an_image_of_another_shape_than_its_boxes_is_rejected(archive, tmp_path):
    table = write_table(tmp_path, (FIRST, "Edema", "edema", 0, 0, 100, 100, HEIGHT, WIDTH))
    _, card = prepare(archive, table)
    assert card["drop_reasons"]["box_frame"] == 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0, "wide", 100, WIDTH, HEIGHT), "row 0: x, y, w, h or the size of the image is no number"),
        ((2500, 0, 100, 100, WIDTH, HEIGHT), "row 0: box 2500, 0, 100, 100 is not inside its image of 2544 x 3180"),
        ((0, 0, 0, 100, WIDTH, HEIGHT), "row 0: box 0, 0, 0, 100 is not inside"),
    ],
)
def test_a_damaged_row_is_named(archive, tmp_path, numbers, message):
    with pytest.raises(RunError, match=message):
        prepare(archive, write_table(tmp_path, (FIRST, "Edema", "edema", *numbers)))


def test_wrong_tables_and_sources_are_told(archive, tmp_path):
    with pytest.raises(UsageError, match="none of its 1 images is in this MIMIC-CXR"):
        prepare(archive, write_table(tmp_path, ("x", "Edema", "edema", 0, 0, 9, 9, WIDTH, HEIGHT)))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="unknown column 'dicom_id'"):
        prepare(archive, tmp_path / "other.csv")
    with pytest.raises(UsageError, match="--boxes: source phantom takes none"):
        run_prepare(PrepareConfig(source="phantom", output=str(tmp_path / "out"), boxes="x.csv"))


def test_another_table_of_boxes_is_another_request(archive, tmp_path):
    table = write_table(tmp_path, (FIRST, "Edema", "edema", 0, 0, 100, 100, WIDTH, HEIGHT))
    prepare(archive, table)
    assert "boxes" not in json.loads((Path(f"{archive}-out") / "card.json").read_text())["request"]
    write_table(tmp_path, (FIRST, "Edema", "edema", 0, 0, 200, 100, WIDTH, HEIGHT))
    with pytest.raises(UsageError, match="was prepared with other settings"):
        prepare(archive, table)
