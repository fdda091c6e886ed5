"""Public archives and PACS exports, laid out in their true shape: every image and report is accounted for."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from xml.dom import minidom

import pandas as pd
import pyarrow.parquet as pq
import pydicom
import pytest
from archives import (
    mimic_path,
    settings,
    write_dicom,
    write_gz,
    write_mimic,
    write_openi_report,
    write_png,
    write_r2gen,
)

from place.config import PrepareConfig, RunError, UsageError
from place.data import dicom_tree_source, r2gen_source
from place.data.frame_rows import order_by_patient
from place.data.prepare import run_prepare
from place.data.r2gen_source import iterate_annotation
from place.data.report_files import parse_openi
from place.data.sources import SOURCES


def open_source(config: PrepareConfig):
    return SOURCES[config.source](config)


def read_manifest(config: PrepareConfig) -> list[dict]:
    return pq.read_table(Path(config.output) / "manifest.parquet").to_pylist()


def read_reasons(config: PrepareConfig) -> dict[int, str]:
    table = pq.read_table(Path(config.output) / "rejected.parquet").to_pylist()
    return {row["row"]: row["reason"] for row in table}


def edit_gz(path: Path, row: int, **cells: object) -> None:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column, value in cells.items():
        frame.loc[row, column] = value
    write_gz(path, frame)


@pytest.mark.parametrize(("source", "suffix"), [("mimic-cxr", ".dcm"), ("mimic-cxr-jpg", ".jpg")])
def test_the_tree_of_mimic_gives_its_frontal_images_with_report_split_and_labels(tmp_path, source, suffix):
    write_mimic(tmp_path / "mimic", suffix)
    config = settings(source, tmp_path / "mimic")
    card = run_prepare(config)
    rows = read_manifest(config)
    assert card["counts"]["input"] == 12
    assert (len(rows), card["drop_reasons"]) == (6, {"view_excluded": 6})
    assert {(row["split"], row["view"]) for row in rows} == {("train", "PA"), ("val", "PA"), ("test", "PA")}
    assert {row["split"]: len({row["patient"]}) for row in rows} == {"train": 1, "val": 1, "test": 1}
    assert [item["section"] for item in rows[0]["sentences"]] == ["findings", "findings", "impression"]
    assert rows[0]["sentences"][1]["text"].startswith("A 2.5 cm nodule is seen in study")
    assert json.loads(rows[0]["labels"]) == {"Edema": 1, "No Finding": None, "Pleural Effusion": -1}
    assert card["split_rule"] == "as the split column says"


def test_lateral_images_are_kept_on_request_and_share_the_number_of_their_study(tmp_path):
    write_mimic(tmp_path / "mimic")
    config = settings("mimic-cxr-jpg", tmp_path / "mimic", views=("frontal", "lateral"))
    run_prepare(config)
    rows = read_manifest(config)
    assert len(rows) == 12
    views = {}
    for row in rows:
        views.setdefault(row["study_id"], []).append(row["view"])
    assert list(views.values()) == [["PA", "LATERAL"]] * 6
    assert all(0 < study < 2**63 for study in views)


def test_an_empty_view_position_is_read_from_its_code_and_else_rejected(tmp_path):
    write_mimic(tmp_path / "mimic")
    table = tmp_path / "mimic" / "mimic-cxr-2.0.0-metadata.csv.gz"
    edit_gz(table, 0, ViewPosition="")
    edit_gz(table, 2, ViewPosition="", ViewCodeSequence_CodeMeaning="")
    edit_gz(table, 4, ViewPosition="", ViewCodeSequence_CodeMeaning="left lateral")
    edit_gz(table, 6, ViewPosition="AP", ViewCodeSequence_CodeMeaning="lateral")
    config = settings("mimic-cxr-jpg", tmp_path / "mimic")
    run_prepare(config)
    assert {row["row"]: row["view"] for row in read_manifest(config) if row["row"] in (0, 6)} == {0: "PA", 6: "AP"}
    assert read_reasons(config)[2] == "view_unknown"
    assert read_reasons(config)[4] == "view_excluded"
    kept = settings("mimic-cxr-jpg", tmp_path / "mimic", views=("FRONTAL", "UNKNOWN"), output=str(tmp_path / "all"))
    run_prepare(kept)
    assert next(row["view"] for row in read_manifest(kept) if row["row"] == 2) == ""


def test_views_come_from_their_code_where_the_metadata_has_no_view_position(tmp_path):
    frame = write_mimic(tmp_path / "mimic")
    write_gz(tmp_path / "mimic" / "mimic-cxr-2.0.0-metadata.csv.gz", frame.drop(columns=["ViewPosition", "split"]))
    rows = sorted(open_source(settings("mimic-cxr-jpg", tmp_path / "mimic")).rows)
    assert [row.view for row in rows] == ["PA", "LATERAL"] * 6


def test_without_metadata_the_record_list_names_the_images_and_their_headers_the_views(tmp_path):
    frame = write_mimic(tmp_path / "mimic", ".dcm")
    (tmp_path / "mimic" / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    write_gz(tmp_path / "mimic" / "cxr-record-list.csv.gz", frame[["subject_id", "study_id", "dicom_id"]])
    config = settings("mimic-cxr", tmp_path / "mimic")
    run_prepare(config)
    assert [row["view"] for row in read_manifest(config)] == ["PA"] * 6
    assert set(read_reasons(config).values()) == {"view_excluded"}


def test_files_that_are_missing_are_counted(tmp_path):
    frame = write_mimic(tmp_path / "mimic")
    for row, suffix in ((0, f"/{frame['dicom_id'][0]}.jpg"), (2, ".txt")):
        path = mimic_path(frame["subject_id"][row], frame["study_id"][row])
        (tmp_path / "mimic" / f"{path}{suffix}").unlink()
    config = settings("mimic-cxr-jpg", tmp_path / "mimic")
    run_prepare(config)
    reasons = read_reasons(config)
    assert (reasons[0], reasons[2]) == ("missing_image", "missing_report")


def test_reports_may_lie_in_the_folder_of_their_own_archive(tmp_path):
    write_mimic(tmp_path / "mimic")
    reports = tmp_path / "mimic" / "mimic-cxr-reports"
    for path in list((tmp_path / "mimic" / "files").rglob("*.txt")):
        target = reports / path.relative_to(tmp_path / "mimic")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    assert run_prepare(settings("mimic-cxr-jpg", tmp_path / "mimic"))["counts"]["kept"] == 6
    reports.rename(tmp_path / "elsewhere")
    config = settings(
        "mimic-cxr-jpg", tmp_path / "mimic", reports=str(tmp_path / "elsewhere"), output=str(tmp_path / "o")
    )
    assert run_prepare(config)["counts"]["kept"] == 6


def test_a_patient_in_two_official_splits_stops_the_run(tmp_path):
    write_mimic(tmp_path / "mimic")
    edit_gz(tmp_path / "mimic" / "mimic-cxr-2.0.0-split.csv.gz", 6, split="test")
    with pytest.raises(
        RunError, match=r"rows 0 and 6 are of one patient, but one is in train and one in test: this is"
    ):
        open_source(settings("mimic-cxr-jpg", tmp_path / "mimic"))


def test_a_study_with_images_of_two_patients_is_rejected(tmp_path):
    write_mimic(tmp_path / "mimic", patients=1)
    edit_gz(tmp_path / "mimic" / "mimic-cxr-2.0.0-metadata.csv.gz", 1, subject_id="10000099")
    rows = list(open_source(settings("mimic-cxr-jpg", tmp_path / "mimic")).rows)
    assert sorted(row.number for row in rows if row.reject == "patient_mismatch") == [0, 1]


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("files", "holds no folder files/"),
        ("mimic-cxr-2.0.0-split.csv.gz", "no mimic-cxr-2.0.0-split.csv.gz; put it there"),
        ("mimic-cxr-2.0.0-metadata.csv.gz", "no mimic-cxr-2.0.0-metadata.csv.gz; put it there"),
    ],
)
def test_what_a_download_of_mimic_lacks_is_named(tmp_path, missing, line):
    write_mimic(tmp_path / "mimic")
    (tmp_path / "mimic" / missing).rename(tmp_path / "away")
    with pytest.raises(UsageError, match=line):
        open_source(settings("mimic-cxr-jpg", tmp_path / "mimic"))


def test_labels_and_reports_of_mimic_that_are_not_there_are_named(tmp_path):
    frame = write_mimic(tmp_path / "mimic")
    chexpert = tmp_path / "mimic" / "mimic-cxr-2.0.0-chexpert.csv.gz"
    chexpert.rename(tmp_path / "away")
    negbio = frame.drop_duplicates("study_id")[["subject_id", "study_id"]].assign(Pneumonia="1.0")
    assert open_source(settings("mimic-cxr-jpg", tmp_path / "mimic")).labels == []
    write_gz(tmp_path / "mimic" / "mimic-cxr-2.0.0-negbio.csv.gz", negbio)
    assert open_source(settings("mimic-cxr-jpg", tmp_path / "mimic")).labels == ["Pneumonia"]
    (tmp_path / "away").rename(chexpert)
    assert "Edema" in open_source(settings("mimic-cxr-jpg", tmp_path / "mimic")).labels
    for table in (tmp_path / "mimic").glob("*-2.0.0-[cn]*.csv.gz"):
        table.unlink()
    with pytest.raises(UsageError, match="holds no mimic-cxr-2.0.0-chexpert"):
        open_source(settings("mimic-cxr-jpg", tmp_path / "mimic", label_columns=("Edema",)))
    with pytest.raises(UsageError, match="--reports .* holds no folder files/"):
        open_source(settings("mimic-cxr-jpg", tmp_path / "mimic", reports=str(tmp_path)))
    with pytest.raises(UsageError, match="say --input DIR"):
        open_source(PrepareConfig(source="mimic-cxr", output=""))
    for name in ("negbio", "chexpert", "metadata"):
        for content in (b"no gzip", b""):
            (tmp_path / "mimic" / f"mimic-cxr-2.0.0-{name}.csv.gz").write_bytes(content)
            with pytest.raises(RunError, match=f"mimic-cxr-2.0.0-{name}.csv.gz: cannot be read .* download it again$"):
                open_source(settings("mimic-cxr-jpg", tmp_path / "mimic"))


def test_a_slice_of_an_archive_is_small_and_holds_no_raw_id_but_paths(tmp_path):
    frame = write_mimic(tmp_path / "mimic")
    sent = pickle.dumps(
        [
            row._replace(image="", report_path="")
            for row in open_source(settings("mimic-cxr-jpg", tmp_path / "mimic")).rows[0:4]
        ]
    )
    assert len(sent) < 4000
    assert not any(
        str(value).encode() in sent for name in ("dicom_id", "subject_id", "study_id") for value in frame[name]
    )


def test_the_studies_of_a_patient_and_the_images_of_a_study_stand_together(tmp_path):
    write_mimic(tmp_path / "mimic", num_studies=9)
    config = settings("mimic-cxr-jpg", tmp_path / "mimic", views=("ALL",), rows_per_task=4)
    run_prepare(config)
    rows = read_manifest(config)
    for unit, count in (("patient", 3), ("study", 9)):
        runs = [row[unit] for at, row in enumerate(rows) if at == 0 or rows[at - 1][unit] != row[unit]]
        assert len(runs) == len(set(runs)) == count
    frame = pd.DataFrame({"patient": list("babab"), "study": list("12134")})
    assert list(order_by_patient(frame)) == [0, 2, 4, 1, 3]


def lay_out_openi(folder: Path) -> None:
    write_openi_report(
        folder / "ecgen-radiology" / "1.xml",
        "CXR1",
        ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"],
        "The heart is normal. There are no XXXX of effusion.",
        "Normal chest.",
    )
    write_openi_report(folder / "ecgen-radiology" / "2.xml", "CXR2", [], "The heart is normal.", "Normal chest.")
    write_openi_report(folder / "ecgen-radiology" / "3.xml", "CXR3", ["CXR3_IM-1384-1001"], "", "")
    write_openi_report(folder / "ecgen-radiology" / "4.xml", "CXR4", ["CXR4_IM-2050-1001"], "Clear lungs are seen.", "")
    (folder / "ecgen-radiology" / "5.xml").write_text("<eCitation>")


def test_open_i_reports_meet_their_png_files(tmp_path):
    lay_out_openi(tmp_path / "openi")
    for name in ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "CXR3_IM-1384-1001"):
        write_png(tmp_path / "openi" / "NLMCXR_png" / f"{name}.png", len(name))
    config = settings("openi", tmp_path / "openi")
    card = run_prepare(config)
    assert [(row["row"], row["view"]) for row in read_manifest(config)] == [(0, ""), (1, "")]
    assert read_reasons(config) == {2: "no_image", 3: "empty_report", 4: "missing_image", 5: "unreadable_report"}
    assert "lateral images are among them" in card["notes"][0]
    strict = settings("openi", tmp_path / "openi", views=("FRONTAL",), output=str(tmp_path / "strict"))
    with pytest.raises(RunError, match="view_unknown 2"):
        run_prepare(strict)


def test_the_table_of_projections_tells_the_views_of_open_i(tmp_path):
    lay_out_openi(tmp_path / "openi")
    lines = ["uid,filename,projection", "1,1_IM-0001-4001.dcm.png,Frontal", "1,1_IM-0001-3001.dcm.png,Lateral"]
    (tmp_path / "openi" / "indiana_projections.csv").write_text("\n".join(lines))
    for name in ("1_IM-0001-3001", "1_IM-0001-4001"):
        write_png(tmp_path / "openi" / "images" / "images_normalized" / f"{name}.dcm.png", 3)
    config = settings("openi", tmp_path / "openi")
    run_prepare(config)
    assert [(row["row"], row["view"]) for row in read_manifest(config)] == [(1, "FRONTAL")]
    assert read_reasons(config)[0] == "view_excluded"
    (tmp_path / "openi" / "indiana_projections.csv").unlink()
    with pytest.raises(UsageError, match="was prepared with other settings"):
        run_prepare(config)


def test_an_image_of_two_open_i_reports_is_taken_once_and_files_tell_nameless_reports_apart(tmp_path):
    reports = tmp_path / "openi" / "ecgen-radiology"
    for number, images in ((7, ["CXR7_IM-1"]), (8, ["CXR7_IM-1", "CXR8_IM-2"]), (9, ["CXR9_IM-3"])):
        write_openi_report(reports / f"{number}.xml", "", images, "The heart is normal in size.", "Normal chest.")
    for name in ("CXR7_IM-1", "CXR8_IM-2", "CXR9_IM-3"):
        write_png(tmp_path / "openi" / "NLMCXR_png" / f"{name}.png", int(name[3]))
    config = settings("openi", tmp_path / "openi")
    run_prepare(config)
    assert read_reasons(config) == {1: "duplicate_id"}
    assert len({row["patient"] for row in read_manifest(config)}) == 3


def test_open_i_reports_meet_their_dicom_files(tmp_path):
    lay_out_openi(tmp_path / "openi")
    write_dicom(tmp_path / "openi" / "NLMCXR_dcm" / "1" / "1_IM-0001-4001.dcm", ViewPosition="PA")
    write_dicom(tmp_path / "openi" / "NLMCXR_dcm" / "1" / "1_IM-0001-3001.dcm", ViewPosition="LL")
    write_dicom(tmp_path / "openi" / "NLMCXR_dcm" / "4" / "4_IM-2050-1001.dcm", ViewPosition="")
    config = settings("openi", tmp_path / "openi")
    run_prepare(config)
    assert [(row["row"], row["view"]) for row in read_manifest(config)] == [(1, "PA"), (4, "")]
    assert read_reasons(config)[0] == "view_excluded"


def test_a_folder_without_open_i_reports_is_named(tmp_path):
    with pytest.raises(UsageError, match="holds no XML reports"):
        open_source(settings("openi", tmp_path))
    with pytest.raises(UsageError, match="source openi needs a folder"):
        open_source(settings("openi", tmp_path / "none"))


def read_sections_another_way(path: Path) -> dict[str, str]:
    """Findings and impression by another parser than the one that is tested."""
    nodes = minidom.parse(str(path)).getElementsByTagName("AbstractText")
    texts = {node.getAttribute("Label"): "".join(child.data for child in node.childNodes).strip() for node in nodes}
    return {name.lower(): texts[name] for name in ("FINDINGS", "IMPRESSION") if texts.get(name)}


def test_all_real_open_i_reports_are_accounted_for_with_the_sections_of_their_xml(tmp_path, real_data):
    reports = sorted((real_data / "openi-reports").glob("*.xml"))
    assert len(reports) == 988
    folder = tmp_path / "openi"
    folder.mkdir()
    (folder / "ecgen-radiology").symlink_to(real_data / "openi-reports", target_is_directory=True)
    images = {
        path: [n.getAttribute("id") for n in minidom.parse(str(path)).getElementsByTagName("parentImage")]
        for path in reports
    }
    for number, name in enumerate(name for names in images.values() for name in names):
        write_png(folder / "NLMCXR_png" / f"{name}.png", number % 7)
    config = settings("openi", folder, reports=str(folder / "ecgen-radiology"))
    card = run_prepare(config)
    told = {path: read_sections_another_way(path) for path in reports}
    rows = [(path, name) for path in sorted(reports, key=lambda path: path.name) for name in images[path] or [""]]
    kept = {row["row"]: row for row in read_manifest(config)}
    reasons = read_reasons(config)
    assert card["counts"]["input"] == len(rows) == len(kept) + len(reasons)
    assert not kept.keys() & reasons.keys()
    assert {rows[number][0] for number in [*kept, *reasons]} == set(reports)
    for number, (path, name) in enumerate(rows):
        assert dict(parse_openi(path.read_bytes())) == told[path]
        if number in kept:
            for section, text in told[path].items():
                stored = " ".join(i["text"] for i in kept[number]["sentences"] if i["section"] == section)
                assert re.sub("[^A-Za-z]", "", stored) == re.sub("[^A-Za-z]", "", text), path.name
        else:
            expected = "no_image" if not name else "empty_report" if not told[path] else "short_report"
            assert reasons[number] in (expected, "contradictory_report"), (path.name, reasons[number])
    assert len({row["study"] for row in kept.values()}) > 900


def entry(name: str, split: str, images: list[str], **more: object) -> dict:
    return {
        "id": name,
        "report": "the heart is normal . the lungs are clear .",
        "image_path": images,
        "split": split,
        **more,
    }


def test_the_annotation_of_iu_x_ray_gives_a_row_an_image(tmp_path):
    name = "CXR2384_IM-0942"
    entries = {
        "train": [entry(name, "train", [f"{name}/0.png", f"{name}/1.png"])],
        "val": [entry("CXR7_IM-2263", "val", ["CXR7_IM-2263/0.png"])],
        "test": [entry("CXR8_IM-2333", "test", ["CXR8_IM-2333/0.png"])],
    }
    write_r2gen(tmp_path / "iu", entries)
    config = settings("r2gen-json", tmp_path / "iu")
    run_prepare(config)
    rows = read_manifest(config)
    assert [row["split"] for row in rows] == ["train", "train", "val", "test"]
    assert rows[0]["study_id"] == rows[1]["study_id"] != rows[2]["study_id"]
    assert [item["text"] for item in rows[0]["sentences"]] == ["the heart is normal .", "the lungs are clear ."]


def test_the_annotation_of_mimic_gives_its_patients_and_studies(tmp_path):
    images = [f"p10/p10000032/s5041426{min(number, 1)}/{number}.jpg" for number in range(3)]
    entries = {
        "train": [
            entry(f"dicom-{at}", "train", [path], study_id=50414260 + min(at, 1), subject_id=10000032)
            for at, path in enumerate(images)
        ],
        "val": [],
        "test": [],
    }
    write_r2gen(tmp_path / "mimic", entries)
    rows = open_source(settings("r2gen-json", tmp_path / "mimic" / "annotation.json")).rows[:]
    assert len({row.patient for row in rows}) == 1
    assert [row.study for row in rows].index(rows[2].study) == 1
    assert len({row.study for row in rows}) == 2
    entries["test"] = [entry("dicom-9", "test", [], study_id=1, subject_id=10000032)]
    (tmp_path / "mimic" / "annotation.json").write_text(json.dumps(entries))
    with pytest.raises(RunError, match="rows 0 and 3 are of one patient, but one is in train and one in test"):
        open_source(settings("r2gen-json", tmp_path / "mimic"))


def test_a_report_of_null_is_an_empty_one(tmp_path):
    null, told = entry("CXR1_IM-1", "train", ["1.png"], report=None), entry("CXR2_IM-1", "train", ["2.png"])
    write_r2gen(tmp_path / "iu", {"train": [null, told], "val": [], "test": []})
    config = settings("r2gen-json", tmp_path / "iu")
    run_prepare(config)
    assert read_reasons(config) == {0: "empty_report"}


@pytest.mark.parametrize("indent", [None, 2])
def test_an_annotation_of_any_size_is_read_entry_by_entry(tmp_path, monkeypatch, indent):
    monkeypatch.setattr(r2gen_source, "_CHUNK", 64)
    monkeypatch.setattr(r2gen_source, "_AHEAD", 32)
    entries = {
        "train": [entry(f"CXR{number}_IM-1", "train", ['ä, ]} "x".png']) for number in range(50)],
        "val": [],
        "test": [entry("CXR99_IM-1", "test", [])],
    }
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps(entries, indent=indent))
    assert list(iterate_annotation(path)) == [(split, item) for split, items in entries.items() for item in items]


@pytest.mark.parametrize(
    "text", ["", "{", '{"train": [', '{"train": [{"id": 1}]}', '{"train": [7]}', "[1]", '{"train": []}']
)
def test_an_annotation_of_another_layout_is_one_clear_line(tmp_path, text):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotation.json").write_text(text)
    with pytest.raises(RunError, match=r"annotation.json: (cannot be read \(|has no entries)"):
        open_source(settings("r2gen-json", tmp_path))


def test_an_annotation_or_image_folder_that_is_not_there_is_named(tmp_path):
    for change, line in (
        ({"input": None}, "say --input annotation.json"),
        ({}, "annotation.json: no such file"),
    ):
        with pytest.raises(UsageError, match=line):
            open_source(settings("r2gen-json", tmp_path, **change))
    (tmp_path / "annotation.json").write_text("{}")
    with pytest.raises(UsageError, match="image root .*images: no such folder"):
        open_source(settings("r2gen-json", tmp_path))


def lay_out_tree(folder: Path, count: int = 6) -> None:
    """Two images a study, two studies a patient, and their reports by accession number."""
    for number in range(count):
        write_dicom(
            folder / f"DIR{number % 2}" / f"IM{number}",
            number,
            SOPInstanceUID=f"1.3.{number}",
            StudyInstanceUID=f"1.2.{number // 2}",
            AccessionNumber=f"A{number // 2}",
            PatientID=f"P{number // 4}",
        )
    reports = [f"FINDINGS: The heart is normal in {number}.\nIMPRESSION: Normal chest." for number in range(count // 2)]
    frame = pd.DataFrame({"Accession Number": [f"A{number}" for number in range(count // 2)], "Report": reports})
    frame.to_csv(folder / "reports.csv", index=False)


def edit_dicom(path: Path, **elements: str) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def test_a_folder_of_dicom_is_joined_with_its_reports_by_accession_number(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_tree_source, "_FILES_PER_SCAN", 2)
    lay_out_tree(tmp_path / "pacs")
    config = settings("dicom-tree", tmp_path / "pacs")
    run_prepare(config)
    rows = read_manifest(config)
    assert [row["row"] for row in rows] == [0, 3, 1, 4, 2, 5]  # DIR0 has 0, 2, 4; studies are 0 1, 2 3, 4 5
    assert [row["sentences"][0]["text"][-2:] for row in rows] == ["0.", "0.", "1.", "1.", "2.", "2."]
    assert len({row["patient"] for row in rows}) == 2
    assert read_reasons(config) == {}


def test_a_folder_of_dicom_is_joined_with_its_reports_by_study(tmp_path):
    lay_out_tree(tmp_path / "pacs")
    (tmp_path / "pacs" / "reports.csv").unlink()
    table = pd.DataFrame(
        {"uid": ["1.2.0", "1.2.2"], "why": ["Heart is normal.", "Lungs are clear."], "edema": ["1", ""]}
    )
    table.to_parquet(tmp_path / "reports.parquet")
    config = settings(
        "dicom-tree",
        tmp_path / "pacs",
        reports=str(tmp_path / "reports.parquet"),
        columns={"study": "uid", "text": "why"},
        label_columns=("edema",),
    )
    card = run_prepare(config)
    assert card["drop_reasons"] == {"no_report": 2}
    assert [json.loads(row["labels"])["edema"] for row in read_manifest(config)] == [1, 1, None, None]


def test_studies_that_share_an_accession_number_are_told_apart_by_their_uid(tmp_path):
    lay_out_tree(tmp_path / "pacs")
    for number in range(6):
        edit_dicom(tmp_path / "pacs" / f"DIR{number % 2}" / f"IM{number}", AccessionNumber="A0", PatientID="P0")
    texts = ["The heart is normal.", "The lungs are clear."]
    table = {"StudyInstanceUID": ["1.2.0", "1.2.1"], "AccessionNumber": ["A0", "A0"], "Report": texts}
    pd.DataFrame(table).to_csv(tmp_path / "pacs" / "reports.csv", index=False)
    config = settings("dicom-tree", tmp_path / "pacs")
    run_prepare(config)
    assert [row["sentences"][0]["text"] for row in read_manifest(config)] == [texts[0]] * 2 + [texts[1]] * 2
    assert read_reasons(config) == {2: "report_mismatch", 5: "report_mismatch"}, "the third study has the number alone"


def test_files_of_a_tree_that_cannot_be_trusted_are_rejected_by_reason(tmp_path):
    tree = tmp_path / "pacs"
    lay_out_tree(tree, 8)
    (tree / "DIR0" / "notes.txt").write_text("no DICOM at all")
    (tree / "DIR1" / "IM1b").write_bytes((tree / "DIR1" / "IM1").read_bytes())
    edit_dicom(tree / "DIR1" / "IM3", PatientID="P9")
    frame = pd.read_csv(tree / "reports.csv")
    frame = pd.concat([frame, frame.iloc[[2, 3]].assign(Report=["The lungs are clear.", frame["Report"][3]])])
    frame.loc[len(frame)] = ["A77", "no image has this accession number"]
    frame.to_csv(tree / "reports.csv", index=False)
    config = settings("dicom-tree", tree)
    card = run_prepare(config)
    names = ["IM0", "IM2", "IM4", "IM6", "notes.txt", "IM1", "IM1b", "IM3", "IM5", "IM7"]
    assert {names[row]: reason for row, reason in read_reasons(config).items()} == {
        "notes.txt": "not_dicom",
        "IM1b": "duplicate_id",
        "IM2": "patient_mismatch",
        "IM3": "patient_mismatch",
        "IM4": "report_mismatch",
        "IM5": "report_mismatch",
    }
    assert card["notes"] == ["1 rows of the reports table belong to no image"]


def test_an_image_without_a_patient_has_the_one_that_its_study_names(tmp_path):
    tree = tmp_path / "pacs"
    lay_out_tree(tree)
    edit_dicom(tree / "DIR1" / "IM1", PatientID="")
    for name in ("DIR0/IM4", "DIR1/IM5"):
        edit_dicom(tree / name, PatientID="")
    write_dicom(tree / "DIR1" / "IM3b", 9, SOPInstanceUID="1.3.9", StudyInstanceUID="1.2.1", PatientID="")
    edit_dicom(tree / "DIR1" / "IM3b", AccessionNumber="A1")
    edit_dicom(tree / "DIR1" / "IM3", PatientID="P9")
    table = open_source(settings("dicom-tree", tree))
    names = ["IM0", "IM2", "IM4", "IM1", "IM3", "IM3b", "IM5"]
    rows = {names[row.number]: row for row in table.rows}
    assert {name: row.reject for name, row in rows.items() if row.reject} == dict.fromkeys(
        ("IM2", "IM3", "IM3b"), "patient_mismatch"
    )
    assert rows["IM1"].patient == rows["IM0"].patient
    assert rows["IM4"].patient == rows["IM5"].patient != rows["IM0"].patient, "a study that names nobody is a patient"
    assert table.notes == [
        "1 rows without a patient: that of their study's other rows",
        "3 rows without a patient: each study is a patient of its own, so one person may be in two splits",
    ]


def test_files_whose_names_are_not_utf8_are_prepared_as_any_other(tmp_path):
    tree = tmp_path / "pacs"
    lay_out_tree(tree)
    odd = os.fsdecode(b"M\xfcller")
    (tree / "DIR1").rename(tree / odd)
    (tree / "DIR0" / "IM2").rename(tree / "DIR0" / odd)
    (tree / "DIR0" / os.fsdecode(b"\xe4.txt")).write_text("no DICOM at all")
    config = settings("dicom-tree", tree, num_workers=2, rows_per_task=2)
    run_prepare(config)
    assert read_reasons(config) == {3: "not_dicom"}
    assert [item["row"] for item in read_manifest(config)] == [0, 4, 2, 5, 1, 6]


def test_open_i_files_whose_names_are_not_utf8_are_read(tmp_path):
    lay_out_openi(tmp_path / "openi")
    reports = tmp_path / "openi" / os.fsdecode(b"r\xe9sultats")
    (tmp_path / "openi" / "ecgen-radiology").rename(reports)
    (reports / "1.xml").rename(reports / os.fsdecode(b"\xe9.xml"))
    write_png(tmp_path / "openi" / os.fsdecode(b"\xe9") / "CXR1_1_IM-0001-3001.png", 1)
    write_png(tmp_path / "openi" / os.fsdecode(b"\xe9") / os.fsdecode(b"\xfc.png"), 2)
    config = settings("openi", tmp_path / "openi")
    run_prepare(config)
    assert len(read_manifest(config)) == 1
    assert sorted(read_reasons(config).values()) == [
        "empty_report",
        "missing_image",
        "missing_image",
        "no_image",
        "unreadable_report",
    ]


def test_the_table_of_reports_is_no_image_however_it_is_named(tmp_path, monkeypatch):
    lay_out_tree(tmp_path / "pacs", 2)
    monkeypatch.chdir(tmp_path)
    config = settings("dicom-tree", Path("pacs"), reports=str(tmp_path / "pacs" / "reports.csv"))
    assert len(open_source(config).rows) == 2


def test_a_report_of_another_patient_is_rejected(tmp_path):
    lay_out_tree(tmp_path / "pacs", 4)
    table = pd.DataFrame(
        {"AccessionNumber": ["A0", "A1"], "PatientID": ["P0", "P5"], "findings": ["Clear lungs seen."] * 2}
    )
    table.to_csv(tmp_path / "pacs" / "reports.csv", index=False)
    rows = list(open_source(settings("dicom-tree", tmp_path / "pacs")).rows)
    assert [row.reject for row in rows] == ["", "", "patient_mismatch", "patient_mismatch"]


def test_a_split_column_of_the_reports_is_honoured_and_checked(tmp_path):
    lay_out_tree(tmp_path / "pacs")
    frame = pd.read_csv(tmp_path / "pacs" / "reports.csv")
    frame.assign(split=["val", "val", "test"]).to_csv(tmp_path / "pacs" / "reports.csv", index=False)
    rows = list(open_source(settings("dicom-tree", tmp_path / "pacs")).rows)
    assert [row.split for row in rows] == ["val"] * 4 + ["test"] * 2
    frame.assign(split=["val", "train", "test"]).to_csv(tmp_path / "pacs" / "reports.csv", index=False)
    with pytest.raises(RunError, match="are of one patient, but one is in val and one in train"):
        open_source(settings("dicom-tree", tmp_path / "pacs"))


def test_a_tree_without_usable_reports_is_one_clear_line(tmp_path):
    lay_out_tree(tmp_path / "pacs", 2)
    reports = tmp_path / "pacs" / "reports.csv"
    reports.write_text("note,uid\nClear lungs.,1\n")
    for change, line in (
        ({}, "no column for the report"),
        ({"columns": {"text": "note"}}, "no column tells which study a report is of"),
        ({"columns": {"txt": "note"}}, r"unknown field 'txt' in --column \(did you mean 'text'"),
        ({"reports": str(tmp_path / "none.csv"), "columns": {"text": "note", "study": "uid"}}, "no such file"),
        ({"input": str(tmp_path / "none")}, "source dicom-tree needs a folder"),
    ):
        with pytest.raises(UsageError, match=line):
            open_source(settings("dicom-tree", tmp_path / "pacs", **change))
    reports.write_bytes(b"")
    with pytest.raises(RunError, match="table reports.csv: cannot be read"):
        open_source(settings("dicom-tree", tmp_path / "pacs"))
    reports.rename(tmp_path / "reports.csv")
    with pytest.raises(UsageError, match="no reports: say --reports TABLE"):
        open_source(settings("dicom-tree", tmp_path / "pacs"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "reports.csv").write_text("AccessionNumber,report\n1,Clear lungs.\n")
    with pytest.raises(RunError, match="holds no files"):
        open_source(settings("dicom-tree", tmp_path / "empty", reports=str(tmp_path / "reports.csv")))
