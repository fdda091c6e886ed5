"""Each downstream data set, laid out as it is downloaded, reaches labels, splits, boxes and masks by its protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from archives import write_mimic
from documents import read_blocks
from miniatures import (
    FIVE,
    MS_CXR,
    PROTOCOLS,
    RSNA_MAP,
    SIDE,
    draw_region,
    parse_prepare,
    prepare_words,
    write_chestx_det10,
    write_chexpert,
    write_coco,
    write_covidx,
    write_ms_cxr,
    write_nih,
    write_object_cxr,
    write_openi,
    write_protocol,
    write_rsna,
    write_rsna_with_patients,
    write_siim,
    write_vindr,
)

from place.config import EvaluationConfig, PrepareConfig, RunError, UsageError
from place.data.annotations import read_labels
from place.data.layout import LabelRule
from place.data.masks import read_masks
from place.data.prepare import run_prepare
from place.data.prepared import list_splits, read_samples
from place.data.protocol import list_counts, read_protocol
from place.data.shapes import draw_shapes, find_box, parse_runs, parse_shapes, write_runs
from place.data.table_source import open_table
from place.evaluation.grounding import list_phrases
from place.evaluation.leaks import read_id_map, read_rows


class Prepared(NamedTuple):
    """A miniature after `place prepare`: its card, manifest by row of the input, samples and masks by row as well."""

    card: dict[str, Any]
    rows: dict[int, dict[str, Any]]
    samples: dict[int, dict[str, Any]]
    masks: dict[int, dict[str, Any]]


def prepare(
    name: str, write: Callable[[Path], None], tmp_path: Path, counts: dict[str, Any], **changes: Any
) -> Prepared:
    """Lay out a miniature, prepare it by its protocol with the counts of the miniature, and read all of it."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write(folder)
    protocol = write_protocol(name, folder, counts=counts, counts_from="the miniature", **changes)
    return run_and_read(parse_prepare(*prepare_words(protocol, folder)))


def run_and_read(config: PrepareConfig) -> Prepared:
    card = run_prepare(config)
    rows = {row["sample_id"]: row for row in pq.read_table(Path(config.output) / "manifest.parquet").to_pylist()}
    samples, masks = {}, {}
    for split in list_splits(config.output):
        samples |= {rows[s["sample_id"]]["row"]: s for s in read_samples(config.output, split)}
        if (Path(config.output) / "masks.parquet").is_file():
            masks |= {rows[key]["row"]: found for key, found in read_masks(config.output, split).items()}
    return Prepared(card, {row["row"]: row for row in rows.values()}, samples, masks)


def list_positive(sample: dict[str, Any]) -> list[str]:
    assert {*sample["labels"].values()} <= {0, 1}
    return [name for name, sign in sample["labels"].items() if sign == 1]


def test_nih_takes_classes_from_a_list_official_splits_and_boxes_of_its_own_table(tmp_path):
    counts = {
        "all": {"images": 24, "patients": 12, "positive": {"Cardiomegaly": 6, "Hernia": 6}},
        "test": {"images": 6, "patients": 3, "boxes": 2},
    }
    found = prepare("nih", write_nih, tmp_path, counts)
    for number, sample in found.samples.items():
        expected = [[], ["Cardiomegaly", "Emphysema"], ["Hernia"], ["Pleural_Thickening"]][(number // 2 + 1) % 4]
        assert list_positive(sample) == expected
        assert len(sample["labels"]) == 14
        assert sample["view"] == "PA"
        assert not sample["sentences"]
    split = {number: row["split"] for number, row in found.rows.items()}
    assert {number for number in split if split[number] == "test"} == {18, 19, 20, 21, 22, 23}
    assert {split[number] for number in range(18)} == {"train", "val"}
    assert all(split[number] == split[number + 1] for number in range(0, 24, 2))
    assert found.samples[18]["boxes"] == [
        {"finding": "Infiltration", "box_xyxy": [8.5 / 2, 20.25 / 2, 38.5 / 2, 60.25 / 2], "sentence": None}
    ]
    assert "0.125 of the training patients" in found.card["split_rule"]
    assert found.card["protocol"]["name"] == "nih"
    assert found.card["protocol"]["deviations"] == []
    assert {"ConVIRT", "GLoRIA"} <= {peer["name"] for peer in found.card["protocol"]["peers"]}


def test_rsna_joins_the_rows_of_an_image_to_one_label_its_boxes_and_a_mask_of_them(tmp_path):
    counts = {"all": {"images": 20, "boxes": 15, "masks": 10, "positive": {"Pneumonia": 10}}}
    found = prepare("rsna", write_rsna, tmp_path, counts)
    by_boxes: dict[int, list[int]] = {}
    for number, sample in found.samples.items():
        by_boxes.setdefault(len(sample["boxes"]), []).append(number)
        assert sample["labels"] == {"Pneumonia": int(bool(sample["boxes"]))}
        mask_YX = found.masks[number]["Pneumonia"]
        if not sample["boxes"]:
            assert mask_YX is None  # looked at, and absent
            continue
        expected_YX = np.zeros((SIDE // 2, SIDE // 2), bool)
        for box in sample["boxes"]:
            x0, y0, x1, y1 = (int(value) for value in box["box_xyxy"])
            expected_YX[y0:y1, x0:x1] = True
        assert np.array_equal(mask_YX, expected_YX)
    assert {count: len(numbers) for count, numbers in by_boxes.items()} == {0: 10, 1: 5, 2: 5}
    assert [box["box_xyxy"] for box in found.samples[1]["boxes"]] == [[5, 10, 21, 30], [30, 12, 40, 27]]
    assert {row["view"] for row in found.rows.values()} == {"PA"}  # of the DICOM header


def test_rsna_keeps_a_person_in_one_split_where_the_published_map_tells_who_it_is(tmp_path):
    found = prepare("rsna", write_rsna_with_patients, tmp_path, {"all": {"images": 20, "patients": 10}})
    rows = {sample["sample_id"]: found.rows[number] for number, sample in found.samples.items()}
    assert not any("patient" in note for note in found.card["notes"])
    nih = prepare("nih", write_nih, tmp_path, {})
    shared = {row["patient"] for row in nih.rows.values()} & {row["patient"] for row in found.rows.values()}
    assert len(shared) == 10  # so that `place evaluate` finds those that were trained on
    own = read_rows(tmp_path / "rsna-out", lambda *_: None)
    pairs = read_id_map(EvaluationConfig(id_map=str(tmp_path / "rsna" / RSNA_MAP)), own)
    images = {row["sample_id"]: number for number, row in nih.rows.items()}
    known = [(rows[a], images[b]) for a, b in pairs if a in rows]
    # Rows of NIH's miniature are two an image's patient, in order, and so are those of the map.
    assert [number for _, number in known] == list(range(20))
    splits = [row["split"] for row, _ in known]
    assert splits[::2] == splits[1::2]
    assert len({*splits}) > 1

    alone = prepare("rsna", write_rsna, tmp_path / "alone", {"all": {"images": 20, "patients": 20}})
    assert alone.card["notes"][-1] == (
        f"no patient column: {RSNA_MAP}, which would tell, is not there: each image is a patient of its own, "
        "so one person may be in two splits"
    )


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("00000000", "00000001_000.png"), ("00000000", "00000002_000.png")], "1 images are of two patients"),
        ([("ffffffff", "00000001_000.png")], "names none of the images of stage_2_train_labels.csv"),
        ([("00000000", "one.png")], "patient: 1 rows do not match"),
        ([], f"table {RSNA_MAP}: has no rows"),
    ],
)
def test_a_map_of_patients_that_does_not_fit_is_one_line(tmp_path, records, message):
    folder = tmp_path / "rsna"
    folder.mkdir()
    write_rsna(folder)
    names = [{"subset_img_id": f"{a}-14fd-4e49-80ba-63a80b6bddd6", "img_id": b} for a, b in records]
    (folder / RSNA_MAP).write_text(json.dumps(names))
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        open_table(parse_prepare(*prepare_words(PROTOCOLS / "rsna.yaml", folder)))
    assert "\n" not in str(caught.value)


def test_a_map_that_names_some_images_leaves_the_others_alone_and_another_map_is_another_request(tmp_path):
    folder = tmp_path / "rsna"
    folder.mkdir()
    write_rsna_with_patients(folder)
    records = json.loads((folder / RSNA_MAP).read_text())
    (folder / RSNA_MAP).write_text(json.dumps(records[:6]))
    config = parse_prepare(*prepare_words(PROTOCOLS / "rsna.yaml", folder))
    table = open_table(config)
    assert len({row.patient for row in table.rows}) == 3 + 14
    assert any(note.startswith("14 rows without a patient: each image is") for note in table.notes)
    (folder / RSNA_MAP).unlink()
    assert open_table(config).content != table.content


def test_siim_joins_regions_and_keeps_the_rows_of_an_image_in_one_split(tmp_path):
    counts = {"all": {"images": 20, "masks": 10, "positive": {"Pneumothorax": 10}}}
    found = prepare("siim", write_siim, tmp_path, counts)
    for place, number in enumerate(sorted(found.samples)):
        mask_YX = found.masks[number]["Pneumothorax"]
        assert found.samples[number]["labels"] == {"Pneumothorax": place % 2}
        if place % 2 == 0:
            assert mask_YX is None  # looked at, and absent
            continue
        region_YX = draw_region(place, 0) | (draw_region(place, 1) if place % 4 == 1 else False)
        assert np.array_equal(mask_YX, region_YX[::2, ::2])


def test_chexpert_maps_uncertain_labels_leaves_lateral_images_out_and_keeps_valid_as_test(tmp_path):
    found = prepare("chexpert", write_chexpert, tmp_path, {"all": {"images": 36}, "test": {"images": 6, "patients": 6}})
    numbers = sorted(found.samples)
    assert numbers == list(range(0, 72, 2))  # every second row is lateral
    for patient, number in enumerate(numbers):
        labels, finding = found.samples[number]["labels"], FIVE[patient % 5]
        certain = patient >= 30 or patient % 3 != 2
        counts_as = 1 if certain or finding not in ("Cardiomegaly", "Consolidation") else 0
        assert {name: labels[name] for name in FIVE} == dict.fromkeys(FIVE, 0) | {finding: counts_as}
        assert labels["Fracture"] == (0 if patient >= 30 else None)  # nobody mentioned it
        assert found.rows[number]["split"] in (("test",) if patient >= 30 else ("train", "val"))
    assert found.card["split_rule"].startswith("as the tables of the data set say; 0.025 of the training patients")


def test_chexpert_5x200_takes_as_many_images_of_each_finding_alone_and_checks_the_pools(tmp_path):
    rule = yaml.safe_load((PROTOCOLS / "chexpert_5x200.yaml").read_text())["layout"]
    rule["sample"] |= {"per_label": 3, "pool": dict.fromkeys(FIVE, 4)}
    counts = {"test": {"images": 15, "positive": dict.fromkeys(FIVE, 3)}}
    found = prepare("chexpert_5x200", write_chexpert, tmp_path, counts, layout=rule)
    assert {row["split"] for row in found.rows.values()} == {"test"}
    for number, sample in found.samples.items():
        assert list_positive(sample) == [FIVE[number // 2 % 5]]
        assert number // 2 % 3 != 2  # uncertain
    whole = prepare("chexpert", write_chexpert, tmp_path / "whole", {})
    shared = {row["patient"] for row in whole.rows.values()} & {row["patient"] for row in found.rows.values()}
    assert len(shared) == 15  # so that `place evaluate` finds those that were trained on
    rule["sample"] |= {"pool": dict.fromkeys(FIVE, 5)}
    with pytest.raises(RunError, match=r"pool\.Atelectasis: 4 found, protocol chexpert_5x200 says 5; pool\.Cardio"):
        prepare("chexpert_5x200", write_chexpert, tmp_path / "other", counts, layout=rule)


def test_covidx_tells_the_patients_of_two_sources_apart_and_keeps_the_official_lists(tmp_path):
    counts = {"all": {"images": 18, "patients": 14}, "test": {"images": 6, "positive": {"COVID-19": 4}}}
    found = prepare("covidx", write_covidx, tmp_path, counts)
    splits = [found.rows[number]["split"] for number in sorted(found.rows)]
    assert splits == ["train"] * 8 + ["val"] * 4 + ["test"] * 6
    assert [found.samples[number]["labels"]["COVID-19"] for number in range(8)] == [1, 1, 0, 0] * 2


def test_vindr_lets_the_readers_vote_on_labels_and_boxes_and_renames_a_column(tmp_path):
    counts = {"train+val": {"images": 12, "boxes": 4}, "test": {"images": 4, "boxes": 1}}
    found = prepare("vindr", write_vindr, tmp_path, counts)
    test = [row["row"] for row in found.rows.values() if row["split"] == "test"]
    assert sorted(test) == [36, 37, 38, 39]
    assert list_positive(found.samples[36]) == ["Cardiomegaly", "Other diseases"]
    assert found.samples[36]["boxes"][0]["box_xyxy"] == [5, 10, 15, 20]
    assert list_positive(found.samples[0]) == ["Cardiomegaly"]  # one reader's nodule is outvoted
    assert list_positive(found.samples[3]) == ["No finding"]
    (box,) = found.samples[0]["boxes"]
    assert box == {"finding": "Cardiomegaly", "box_xyxy": [11, 21, 31, 41], "sentence": None}  # the mean of two readers


@pytest.mark.parametrize(
    ("cells", "sign"),
    [
        (["1", "1", "-1"], "1"),
        (["1", "-1", ""], "1"),
        (["0", "-1", "-1"], "0"),
        (["0", "0", "1"], "0"),
        (["1", "0", ""], "1"),
        (["1", "0", "-1"], "-1"),
        (["-1", "-1", ""], "-1"),
        (["", "", ""], ""),
        (["", "0", ""], "0"),
    ],
)
def test_a_majority_is_of_the_readers_that_know_and_uncertain_is_half_a_vote(cells, sign):
    rows = pd.DataFrame({"identity": ["a"] * len(cells), "edema": cells})
    labels = read_labels(LabelRule(names={"edema": "edema"}, combine="majority"), rows)
    assert labels.loc["a", "edema"] == sign


def test_object_cxr_draws_rectangles_ellipses_and_polygons_on_images_of_any_shape(tmp_path):
    counts = {"all": {"images": 24, "boxes": 24, "masks": 18}, "test": {"images": 8, "positive": {"Foreign object": 6}}}
    found = prepare("object_cxr", write_object_cxr, tmp_path, counts)
    masks = [found.masks[number]["Foreign object"] for number in range(4)]
    assert masks[3] is None
    assert masks[0].shape == (60, 48)
    assert masks[0][10:30, 5:20].all()
    assert masks[0].sum() == 20 * 15
    # Pixels on an outline belong to it: 11 to 15 % of shapes as small as these.
    ellipse = np.pi * 20 * 10 / 4 + 10 * 5
    assert abs(masks[1].sum() - ellipse) < 0.2 * ellipse
    assert not masks[1][10, 10]
    triangle = 20 * 20 / 2
    assert abs(masks[2].sum() - triangle) < 0.2 * triangle
    assert masks[2][8, 20]
    assert not masks[2][22, 8]
    boxes = [[box["box_xyxy"] for box in found.samples[number]["boxes"]] for number in range(4)]
    assert boxes == [[[5, 10, 20, 30]], [[10, 10, 30, 20], [35, 5, 40, 15]], [[5, 5, 25, 25]], []]


def test_chestx_det10_unfolds_lists_to_labels_and_boxes(tmp_path):
    counts = {"train+val": {"images": 12, "positive": {"Mass": 6}}, "test": {"images": 4, "boxes": 6}}
    found = prepare("chestx_det10", write_chestx_det10, tmp_path, counts)
    assert found.samples[0]["labels"] == dict.fromkeys(found.card["labels"], 0)
    assert list_positive(found.samples[1]) == ["Effusion", "Mass"]
    boxes = [(box["finding"], box["box_xyxy"]) for box in found.samples[1]["boxes"]]
    assert boxes == [("Effusion", [2, 4, 10, 20]), ("Mass", [15, 15, 25, 30]), ("Effusion", [30, 4, 40, 20])]


def write_tubes(tmp_path: Path) -> tuple[Path, Path]:
    """A COCO data set of two categories, and the protocol that the page on preparing data has for it."""
    folder, protocol = tmp_path / "tubes", tmp_path / "tubes.yaml"
    folder.mkdir()
    write_coco(folder)
    (block,) = read_blocks((PROTOCOLS.parents[1] / "docs" / "preparing-data.md").read_text(), "yaml")
    protocol.write_text(block)
    return folder, protocol


def test_a_protocol_of_ones_own_reads_polygons_and_rle_of_coco_to_a_mask_a_category(tmp_path):
    folder, protocol = write_tubes(tmp_path)
    found = run_and_read(parse_prepare(*prepare_words(protocol, folder)))
    for number in range(32):
        image, part = (number, 0) if number < 24 else (number - 24, 30)
        row = part + 5 * (image // 4) + image % 4  # the last of every four has two
        assert (found.rows[row]["split"] == "test") == (number >= 24)
        for place, name in enumerate(("tube", "wire")):
            there = image % 4 in (1 + place, 3)
            assert found.samples[row]["labels"][name] == there
            boxes = [box["box_xyxy"] for box in found.samples[row]["boxes"] if box["finding"] == name]
            mask_YX, region_YX = found.masks[row][name], draw_region(image, place)[::2, ::2]
            assert np.array_equal(mask_YX, region_YX) if there else mask_YX is None, f"{name} of {image}"
            (y, x) = np.nonzero(region_YX)
            assert boxes == ([[x.min(), y.min(), x.max() + 1, y.max() + 1]] if there else [])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [SIDE, SIDE], "counts": [5, 9]}, f"counts of another size than {SIDE} x {SIDE} pixels; expected"),
        ({"size": [SIDE, SIDE], "counts": [-5, 5 + SIDE**2]}, "counts of another size"),
        ({"size": [SIDE, SIDE], "counts": ""}, "counts of another size"),
        ({"size": [SIDE, SIDE], "counts": "zz!!"}, "Invalid RLE"),
        ({"size": [-1, -1], "counts": "61"}, "OverflowError"),
        ({"counts": "61"}, "KeyError 'size'; expected polygons, or RLE with counts and size"),
        ([1, 2, 3, 4, 5, 6], "TypeError"),
        ("lung", "could not convert string to float: 'l'"),
        ([], "column 'polygons', row 1: has a finding without an outline"),
    ],
)
def test_a_mask_of_coco_that_cannot_be_read_is_one_line(tmp_path, segmentation, message):
    folder, protocol = write_tubes(tmp_path)
    tree = json.loads((folder / "train.json").read_text())
    tree["annotations"][0]["segmentation"] = segmentation
    (folder / "train.json").write_text(json.dumps(tree))
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        open_table(parse_prepare(*prepare_words(protocol, folder)))
    assert "\n" not in str(caught.value)


def test_a_count_that_is_not_met_is_an_error_unless_it_is_allowed_by_name(tmp_path):
    counts = {"all": {"images": 21, "boxes": 15, "positive": {"Pneumonia": 11}}}
    with pytest.raises(RunError) as caught:
        prepare("rsna", write_rsna, tmp_path, counts)
    told = str(caught.value)
    assert "all.images: 20 found, protocol rsna says 21; all.positive.Pneumonia: 10 found" in told
    assert "--allow-counts all.images all.positive.Pneumonia" in told
    assert "all.boxes" not in told
    protocol, folder = tmp_path / "rsna.yaml", tmp_path / "rsna"
    with pytest.raises(RunError, match="all.positive.Pneumonia"):
        run_prepare(parse_prepare(*prepare_words(protocol, folder, "--allow-counts", "all.images")))
    with pytest.raises(UsageError, match="--allow-counts all.image: .* states no such count; there are all.images"):
        run_prepare(parse_prepare(*prepare_words(protocol, folder, "--allow-counts", "all.image")))
    names = ("--allow-counts", "all.images", "all.positive.Pneumonia")
    card = run_prepare(parse_prepare(*prepare_words(protocol, folder, *names)))
    assert card["protocol"]["deviations"][0].startswith("all.images: 20 found")
    again = parse_prepare(*prepare_words(protocol, folder))
    with pytest.raises(RunError, match="all.images: 20 found"):  # also where all is prepared
        run_prepare(again)


def test_mimic_5x200_keeps_the_images_of_the_published_list_as_test(tmp_path):
    folder = tmp_path / "mimic"
    table = write_mimic(folder, num_studies=4)
    chosen = table[table["ViewPosition"] == "PA"]["dicom_id"].tolist()[1:3]
    lines = ["Path,dicom_id,subject_id,study_id,Report", *(f"path/of/images,{name},1,2,Here." for name in chosen)]
    (folder / "mimic_5x200_ids.csv").write_text("\n".join(lines) + "\n")
    protocol = write_protocol("mimic_5x200", folder, counts={"all": {"rows": 2, "missing": 0}, "test": {"images": 2}})
    card = run_prepare(parse_prepare(*prepare_words(protocol, folder)))
    assert card["counts"]["test"]["images"] == 2
    assert card["labels"]
    assert card["split_rule"] == "all images are test images, those of mimic_5x200_ids.csv"
    image = next(folder.glob(f"files/*/*/*/{chosen[0]}.jpg"))
    image.rename(tmp_path / "half.jpg")
    halved = parse_prepare(*prepare_words(protocol, folder, "--output", tmp_path / "halved"))
    with pytest.raises(RunError, match="all.missing: 1 found, protocol mimic_5x200 says 0; test.images: 1"):
        run_prepare(halved)
    (tmp_path / "half.jpg").rename(image)
    with (folder / "mimic_5x200_ids.csv").open("a") as file:
        file.write("path/of/images,ffff,1,2,Here.\n")
    with pytest.raises(UsageError, match="--only mimic_5x200_ids.csv: 1 of its 3 images are not in this MIMIC-CXR"):
        run_prepare(parse_prepare(*prepare_words(protocol, folder)))


def test_mimic_cxr_keeps_the_official_split_and_counts_what_was_rejected_too(tmp_path):
    counts = {"all": {"rows": 12, "missing": 0}, **{split: {"rows": 4} for split in ("train", "val", "test")}}
    found = prepare("mimic_cxr", write_mimic, tmp_path, counts)
    # Every second row is lateral; patients are interleaved.
    assert {row: found.rows[row]["split"] for row in sorted(found.rows)} == dict(
        zip(range(0, 12, 2), ["train", "val", "test"] * 2)
    )
    assert all(row["view"] == "PA" for row in found.rows.values())
    assert found.samples[4]["labels"] == {"Edema": 1, "No Finding": None, "Pleural Effusion": -1}
    assert found.samples[4]["sentences"][-1] == {"section": "impression", "text": "No acute cardiopulmonary process."}

    def halve(folder: Path) -> None:
        table = write_mimic(folder)
        (name,) = table[(table["split"] == "test") & (table["ViewPosition"] == "PA")]["dicom_id"].tolist()[:1]
        next(folder.glob(f"files/*/*/*/{name}.jpg")).unlink()

    with pytest.raises(RunError) as caught:
        prepare("mimic_cxr", halve, tmp_path / "half", counts | {"test": {"rows": 5}})
    told = str(caught.value)
    assert "all.missing: 1 found, protocol mimic_cxr says 0; test.rows: 4 found, protocol mimic_cxr says 5;" in told


def test_ms_cxr_brings_phrases_and_boxes_to_the_stored_images_which_are_all_test(tmp_path):
    counts = {"all": {"rows": 3, "missing": 0, "boxes": 5}, "test": {"images": 3}}
    found = prepare("ms_cxr", write_ms_cxr, tmp_path, counts)
    assert {row["split"] for row in found.rows.values()} == {"test"}
    samples = sorted(found.samples.values(), key=lambda sample: len(sample["boxes"]), reverse=True)
    # 2544 x 3180 px are 48 x 60 here, of which the model sees 48 x 48 from row 6.
    boxes = [(box["finding"], box["phrase"], box["box_xyxy"]) for box in samples[0]["boxes"]]
    assert boxes == [
        ("Pneumonia", "left lower lobe opacity", [4, 20, 14, 32]),
        ("Pneumonia", "left lower lobe opacity", [0, 10, 6, 14]),
        ("Edema", "mild edema", [2, 16, 8, 20]),
    ]
    assert {box["phrase"] for sample in samples[1:] for box in sample["boxes"]} == {
        *("small apical pneumothorax", "the heart is enlarged")
    }
    first, second = ([list(list_phrases(sample)) for sample in samples] for _ in range(2))
    assert [phrase.boxes for phrase in first[0]] == [[(4, 14, 14, 26), (0, 4, 6, 8)], [(2, 10, 8, 14)]]
    assert first == second  # boxes are not moved in place
    again = {sample["sample_id"]: sample["boxes"] for sample in read_samples(f"{tmp_path}/ms_cxr-out", "test")}
    assert again == {sample["sample_id"]: sample["boxes"] for sample in samples}
    assert found.card["protocol"]["shares_images_with"] == ["mimic_5x200", "mimic_cxr"]


def test_a_phrase_of_ms_cxr_needs_no_report(tmp_path):
    found = prepare("ms_cxr", write_ms_cxr, tmp_path, {"all": {"rows": 3, "missing": 0, "images": 3, "boxes": 5}})
    kept = sorted(
        ([item["text"] for item in found.samples[number]["sentences"]], row["warnings"])
        for number, row in found.rows.items()
    )
    assert kept == [([], ["report_left_out"])] * 2 + [(["Small pneumothorax."], [])]
    card = found.card
    assert (card["boxes"], card["warnings"], card["without_report"]) == (5, {"report_left_out": 2}, 2)
    assert "5 boxes are on the kept images." in (tmp_path / "ms_cxr-out" / "card.md").read_text()
    words = prepare_words(tmp_path / "ms_cxr.yaml", tmp_path / "ms_cxr", "--min-words", 3)
    told = r"all 3 rows were rejected \(contradictory_report 1, missing_report 1, short_report 1\)"
    with pytest.raises(RunError, match=told):
        run_prepare(parse_prepare(*words, "--output", tmp_path / "strict"))


def test_half_a_table_of_ms_cxr_does_not_meet_the_counts(tmp_path):
    def halve(folder: Path) -> None:
        write_ms_cxr(folder)
        lines = (folder / MS_CXR).read_text().splitlines(keepends=True)
        (folder / MS_CXR).write_text("".join(lines[:4]))

    counts = {"all": {"rows": 3, "missing": 0, "images": 3, "boxes": 5}}
    with pytest.raises(RunError, match="all.images: 1 found, protocol ms_cxr says 3; all.boxes: 3 found, .* says 5"):
        prepare("ms_cxr", halve, tmp_path, counts)
    assert list_counts(read_protocol(PROTOCOLS / "ms_cxr.yaml")) == {
        "all.missing": 0, "all.images": 1047, "all.boxes": 1448,
    }  # fmt: skip


def test_openi_keeps_the_images_of_a_report_together_with_its_sections_and_views(tmp_path):
    found = prepare("openi", write_openi, tmp_path, {"all": {"rows": 21, "missing": 0, "images": 20, "patients": 10}})
    assert found.card["drop_reasons"] == {"no_image": 1}
    assert found.card["labels"] == []
    by_patient: dict[str, list[int]] = {}
    for number, row in found.rows.items():
        by_patient.setdefault(row["patient"], []).append(number)
    assert sorted(len(numbers) for numbers in by_patient.values()) == [2] * 10
    for numbers in by_patient.values():
        assert len({found.rows[number]["split"] for number in numbers}) == 1
        assert {found.samples[number]["view"] for number in numbers} == {"FRONTAL", "LATERAL"}
        (texts,) = {tuple((item["section"], item["text"]) for item in found.samples[n]["sentences"]) for n in numbers}
        assert texts[0] == ("findings", "The heart is normal.")
        assert texts[1][1].endswith(".5 cm nodule is seen.")
        assert texts[2] == ("impression", "Normal chest.")
    assert len({row["split"] for row in found.rows.values()}) > 1
    assert found.card["split_rule"].startswith("by hash of the patient, 0.7/0.1/0.2")


def test_a_phantom_protocol_takes_its_options_and_checks_its_counts(tmp_path):
    protocol = write_protocol(
        "phantom", tmp_path / "x", prepare={"count": 20, "split": [0.5, 0.25, 0.25]}, counts={"all": {"rows": 20}}
    )
    card = run_prepare(
        parse_prepare("--protocol", protocol, "--output", tmp_path / "out", "--size-px", 48, "--num-workers", 1)
    )
    assert card["source"] == "phantom"
    assert card["counts"]["kept"] == 20
    assert card["request"]["split"] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("stage_2_train_labels.csv", ",1\n", ",2\n", "column 'Target' holds '2', which the protocol does not know"),
        ("stage_2_train_labels.csv", "32.0", "wide", "row 1: could not convert string to float: 'wide'"),
        ("stage_2_train_labels.csv", "32.0", "-32.0", "10, 20, -32, 40 is no box"),
        ("stage_2_train_labels.csv", "Target", "Label", "unknown column 'Target'"),
        (
            "stage_2_train_labels.csv",
            "60.0,24.0,20.0,30.0,1",
            "60.0,24.0,20.0,30.0,0",
            "rows of one image say different",
        ),
    ],
)
def test_a_table_of_another_release_is_one_line(tmp_path, file, old, new, message):
    folder = tmp_path / "rsna"
    folder.mkdir()
    write_rsna(folder)
    (folder / file).write_text((folder / file).read_text().replace(old, new))
    with pytest.raises((RunError, UsageError), match=re.escape(message)) as caught:
        open_table(parse_prepare(*prepare_words(PROTOCOLS / "rsna.yaml", folder)))
    assert "\n" not in str(caught.value)


def test_an_image_in_no_official_list_or_in_two_is_an_error(tmp_path):
    folder = tmp_path / "nih"
    folder.mkdir()
    write_nih(folder)
    config = parse_prepare(*prepare_words(PROTOCOLS / "nih.yaml", folder))
    listed = (folder / "test_list.txt").read_text()
    (folder / "test_list.txt").write_text(listed.replace("00000010_000.png\n", ""))
    with pytest.raises(RunError, match="row 18 and 0 others stand in no list"):
        open_table(config)
    (folder / "test_list.txt").write_text(listed + "00000001_000.png\n")
    with pytest.raises(RunError, match="test_list.txt: an image is also listed for train"):
        open_table(config)
    (folder / "test_list.txt").unlink()
    with pytest.raises(UsageError, match="holds no test_list.txt, the list of the official test images"):
        open_table(config)


def test_a_data_set_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    words = prepare_words(PROTOCOLS / "rsna.yaml", tmp_path / "empty")
    with pytest.raises(UsageError, match="holds no stage_2_train_labels.csv"):
        open_table(parse_prepare(*words))
    with pytest.raises(UsageError, match="source table needs a folder"):
        open_table(parse_prepare(*prepare_words(PROTOCOLS / "rsna.yaml", tmp_path / "none")))
    with pytest.raises(UsageError, match="source table needs a protocol"):
        open_table(parse_prepare("--source", "table", "--input", tmp_path, "--output", tmp_path / "out"))


def test_runs_are_relative_and_go_down_the_columns():
    assert draw_shapes((parse_runs("1 2 3 1"),), (4, 2)).T.tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]
    with pytest.raises(ValueError, match="reach pixel 9, the image has 8"):
        draw_shapes((parse_runs("1 2 3 3"),), (4, 2))
    for cell in ("1 2 3", "1 -2", "", "a b"):
        with pytest.raises(ValueError, match=r"runs are pairs|invalid literal"):
            parse_runs(cell)
    for cell in ("4 1 2 3 4", "0 1 2 3", "2 1 2 3 4", "1 1 2 3 4 5", "3 4", "3 4 2 1"):
        with pytest.raises(ValueError, match=r"no kind|numbers; expected"):
            parse_shapes(cell)


def test_sized_runs_are_of_an_image_of_their_size_and_have_no_box():
    mask_YX = np.random.default_rng(0).random((5, 7)) < 0.5
    for drawn_YX in (mask_YX, np.zeros_like(mask_YX), np.ones_like(mask_YX)):
        (shape,) = parse_shapes(write_runs(drawn_YX))
        assert np.array_equal(draw_shapes((shape,), (5, 7)), drawn_YX)
    with pytest.raises(ValueError, match="its runs are of 5 x 7 pixels, the image has 7 x 5"):
        draw_shapes((shape,), (7, 5))
    with pytest.raises(ValueError, match="tell no corners"):
        find_box(shape)


def test_coco_boxes_and_masks_of_real_radiographs(real_data, tmp_path):
    """Lung boxes of 135 radiographs, and the lung masks of 26, by the protocol of the generic readers."""
    source = real_data / "covid-cxr"
    labels = [{"column": "intubated", "names": {"intubated": "Y"}, "others": ["N"], "unknown": ["", "Not visible"]}]
    layout = yaml.safe_load((PROTOCOLS / "covid_cxr.yaml").read_text())["layout"] | {"labels": labels}
    counts = {"all": {"images": 135, "boxes": 270}}
    protocol = write_protocol("covid_cxr", tmp_path / "x", layout=layout, counts=counts)
    config = parse_prepare("--protocol", protocol, "--input", source, "--output", tmp_path / "out", "--num-workers", 1)
    card = run_prepare(config)
    assert card["counts"]["kept"] == 135
    assert card["label_counts"]["intubated"] == {"positive": 32, "negative": 20, "uncertain": 0, "unknown": 83}
    masks = [
        study["lungs"]
        for split in list_splits(tmp_path / "out")
        for study in read_masks(tmp_path / "out", split).values()
    ]
    assert len(masks) == 26
    assert all(mask_YX.mean() > 0.05 for mask_YX in masks)
