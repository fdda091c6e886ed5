"""Masks reach masks.parquet in the pixels of the stored image, absent findings are told from unknown ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_sets import draw_image, encode, write_csv_source

from place.config import PrepareConfig, RunError, UsageError
from place.data.images import Rejected
from place.data.masks import (
    MASKS,
    MASKS_FILE,
    SourceMask,
    decode_mask,
    encode_mask,
    list_masked,
    read_masks,
    resize_mask,
    store_mask,
)
from place.data.phantom import generate_study
from place.data.prepare import run_prepare
from place.data.prepared import read_samples
from place.data.rows import Row
from place.data.task import read_sample
from place.data.transforms import read_image
from place.data.verify import find_faults

COUNT, SIZE_PX = 24, 48


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masks") / "data"
    settings = {"source": "phantom", "count": COUNT, "size_px": SIZE_PX, "rows_per_task": 10, "num_workers": 1}
    run_prepare(PrepareConfig(output=str(folder), split=(0.5, 0.2, 0.3), **settings))
    return folder


def build_row(mask: SourceMask, height: int = 120, width: int = 90) -> Row:
    image = encode(draw_image(0, height, width))
    sections = (("findings", "There is a nodule in the lung."),)
    return Row(0, 7, "p", "a1", "test", image, sections, "PA", {}, masks=(mask,))


def test_a_phantom_keeps_the_mask_of_each_of_its_findings(data_dir):
    numbers = {
        row["sample_id"]: (row["row"], row["split"]) for row in pq.read_table(data_dir / "manifest.parquet").to_pylist()
    }
    masks = {split: read_masks(data_dir, split) for split in ("train", "val", "test")}
    assert sum(map(len, masks.values())) == len(numbers) == COUNT
    for sample_id, (number, split) in numbers.items():
        study, truth = masks[split][sample_id], generate_study(0, number, SIZE_PX)
        assert {name for name, mask in study.items() if mask is not None} == {r.finding for r in truth.regions}
        assert study.keys() == truth.labels.keys()
        for name in {region.finding for region in truth.regions}:
            union = np.any([region.mask_YX for region in truth.regions if region.finding == name], axis=0)
            assert np.array_equal(study[name], union)


def test_boxes_of_stored_samples_lie_around_their_masks(data_dir):
    masks, seen = read_masks(data_dir, "train"), 0
    rows = {row["sample_id"]: [] for row in pq.read_table(data_dir / "masks.parquet").to_pylist()}
    for row in pq.read_table(data_dir / "masks.parquet").to_pylist():
        rows[row["sample_id"]] += [row] if row["mask"] else []
    for sample in read_samples(data_dir, "train"):
        assert sample["sample_id"] in masks
        for row in rows[sample["sample_id"]]:
            box = sample["boxes"][row["box"]]
            y, x = np.nonzero(decode_mask(row["mask"]))
            assert box["finding"] == row["finding"]
            assert len(x) == 0 or box["box_xyxy"] == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            seen += 1
    assert seen > 5


def test_masks_do_not_change_the_shards_and_are_hashed_in_the_card(data_dir, tmp_path):
    damaged = data_dir / "masks.parquet"
    whole = damaged.read_bytes()
    assert list(find_faults(data_dir)) == []
    try:
        damaged.write_bytes(whole[:-1] + b"?")
        assert [fault.split(" is ")[0] for fault in find_faults(data_dir)] == [str(damaged)]
        with pytest.raises(RunError, match="prepare the data set again"):
            read_masks(data_dir, "test")
    finally:
        damaged.write_bytes(whole)
    sample = next(read_samples(data_dir, "train"))
    assert sorted(sample["boxes"][0] if sample["boxes"] else {"box_xyxy": 0}) in (
        ["box_xyxy", "finding", "sentence", "severity", "side"],
        ["box_xyxy"],
    )


def test_a_mask_shrinks_with_its_image_and_stays_over_the_same_pixels():
    mask_YX = np.zeros((120, 90), bool)
    mask_YX[40:80, 30:60] = True
    sample = read_sample(
        build_row(SourceMask("nodule", encode_mask(mask_YX), 0)),
        PrepareConfig(source="csv", output="x", size_px=45, jpeg_quality=100),
    )
    stored_YX = decode_mask(sample.masks[0]["mask"])
    assert stored_YX.shape == read_image(sample.stored["image"]).shape == (60, 45)
    expected_YX = np.zeros((60, 45), bool)
    expected_YX[20:40, 15:30] = True
    assert np.array_equal(stored_YX, expected_YX)
    assert sample.masks[0] | {"mask": None} == {
        "sample_id": 7, "split": "test", "finding": "nodule", "box": 0, "mask": None,
    }  # fmt: skip


def test_a_pixel_belongs_where_half_of_its_area_did():
    mask_YX = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], bool)
    assert resize_mask(mask_YX, (1, 2)).tolist() == [[True, False]]
    assert resize_mask(mask_YX, (4, 8)).shape == (4, 8)


@pytest.mark.parametrize(
    ("png", "reason"),
    [
        (encode_mask(np.ones((90, 120), bool)), "mask_size"),
        (b"\x89PNG\r\n\x1a\n", "unreadable_mask"),
        (b"GIF89a", "unreadable_mask"),
    ],
)
def test_a_mask_of_another_frame_or_that_does_not_decode_rejects_its_row(png, reason):
    with pytest.raises(Rejected) as caught:
        read_sample(build_row(SourceMask("nodule", png)), PrepareConfig(source="csv", output="x"))
    assert caught.value.reason == reason


def test_absent_is_no_mask_and_masks_are_lossless_and_the_same_each_time():
    assert store_mask(SourceMask("nodule", b""), (9, 9), (9, 9)) is None
    mask_YX = np.random.default_rng(0).random((37, 53)) > 0.5
    assert np.array_equal(decode_mask(encode_mask(mask_YX)), mask_YX)
    assert hashlib.sha256(encode_mask(mask_YX)).digest() == hashlib.sha256(encode_mask(mask_YX)).digest()


def test_a_data_set_without_masks_says_so(data_dir, tmp_path):
    assert list_masked(data_dir) == ({"train", "val", "test"}, {"train", "val", "test"})
    assert list_masked(tmp_path) == (set(), set())
    rows = pq.read_table(data_dir / MASKS_FILE).to_pylist()
    rows = [row | {"mask": None if row["split"] == "val" else row["mask"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=MASKS), tmp_path / MASKS_FILE)
    assert list_masked(tmp_path) == ({"train", "val", "test"}, {"train", "test"})


@pytest.mark.parametrize("read", [list_masked, lambda folder: read_masks(folder, "test")])
def test_a_damaged_file_of_masks_is_one_line(tmp_path, read):
    (tmp_path / MASKS_FILE).write_bytes(b"PAR1")
    with pytest.raises(RunError, match=f"^{tmp_path / MASKS_FILE} cannot be read .*; prepare the data set again"):
        read(tmp_path)


def test_mask_files_of_a_table_are_told_apart_from_absent_and_unknown(tmp_path):
    config = write_csv_source(tmp_path, count=3, masks={"lungs": "../masks/{stem}.lungs.png"})
    (tmp_path / "masks").mkdir()
    mask_YX = np.zeros((80, 64), bool)
    (tmp_path / "masks" / "secret-file-1.lungs.png").write_bytes(encode_mask(mask_YX))
    mask_YX[10:50, 8:40] = True
    (tmp_path / "masks" / "secret-file-0.lungs.png").write_bytes(encode_mask(mask_YX))
    run_prepare(config)
    studies = [study for split in ("train", "val", "test") for study in read_masks(config.output, split).values()]
    assert len(studies) == 2  # the third has no file
    assert [study["lungs"] is None for study in studies].count(True) == 1
    (found,) = [study["lungs"] for study in studies if study["lungs"] is not None]
    assert found.shape == (60, 48)
    assert found.mean() == pytest.approx(mask_YX.mean(), abs=0.02)


def test_a_mask_pattern_without_a_stem_is_told(tmp_path):
    with pytest.raises(UsageError, match="expected {stem} in it"):
        run_prepare(write_csv_source(tmp_path, count=2, masks={"lungs": "lungs.png"}))


@pytest.mark.parametrize("source", ["phantom", "mimic-cxr", "mimic-cxr-jpg", "openi", "dicom-tree", "r2gen-json"])
def test_masks_of_a_source_that_takes_none_are_refused(tmp_path, source):
    config = PrepareConfig(source=source, output=str(tmp_path), masks={"lungs": "{stem}.png"})
    with pytest.raises(UsageError, match=f"--masks lungs: source {source} takes no mask files, only csv"):
        run_prepare(config)
    assert not any(tmp_path.iterdir())
