"""Tables and phantoms as rows: mapping, labels, splits, identities."""

from __future__ import annotations

import pickle
import re
import stat

import numpy as np
import pandas as pd
import pytest
from small_sets import edit_table, write_csv_source

from place.config import PrepareConfig, RunError, UsageError
from place.data.identity import IdHasher, compute_split, default_salt_path, read_salt
from place.data.report import split_sentences
from place.data.sources import SOURCES, TAKEN_BY
from place.data.sources import open_source as open_checked


def open_source(config: PrepareConfig):
    return SOURCES[config.source](config)


def set_column(config: PrepareConfig, column: str, values) -> None:
    frame = pd.read_csv(config.input, dtype=str, keep_default_na=False)
    frame[column] = values
    frame.to_csv(config.input, index=False)


def test_an_unknown_column_is_answered_with_the_nearest_name_and_the_list(tmp_path):
    config = write_csv_source(tmp_path, columns={"image": "fiel", "text": "note"})
    with pytest.raises(UsageError) as caught:
        open_source(config)
    assert str(caught.value) == (
        "unknown column 'fiel' (did you mean 'file'?); the table has file, note, who, exam, pos, edema"
    )


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"images": "file", "text": "note"}, r"unknown field 'images' in --column \(did you mean 'image'\?\)"),
        ({"text": "note"}, "no column for the image"),
        ({"image": "file"}, "no column for the report"),
        ({"image": "file", "text": "note", "findings": "note"}, "both text and findings are mapped"),
    ],
)
def test_a_mapping_that_cannot_work_is_one_clear_line(tmp_path, columns, line):
    with pytest.raises(UsageError, match=line):
        open_source(write_csv_source(tmp_path, columns=columns))


@pytest.mark.parametrize("name", TAKEN_BY)
def test_an_option_that_a_source_does_not_look_at_is_refused(tmp_path, name):
    option, takers = TAKEN_BY[name]
    value = {"columns": {"image": "file"}, "label_columns": ("edema",)}.get(name, str(tmp_path))
    for source in SOURCES:
        config = PrepareConfig(source=source, output=str(tmp_path / "out"), count=1, **{name: value})
        line = f"--{option}: source {source} takes none, only {', '.join(takers)} do; leave it out"
        with pytest.raises(UsageError) as caught:
            open_checked(config)
        assert (str(caught.value) == line) == (source not in takers)


def test_files_and_folders_that_are_not_there_are_named(tmp_path):
    config = write_csv_source(tmp_path)
    for change, line in (
        ({"input": None}, "say --input"),
        ({"input": str(tmp_path / "none.csv")}, "no such file"),
        ({"input": str(tmp_path / "images" / "secret-file-0.jpg")}, "unknown kind"),
        ({"image_root": str(tmp_path / "none")}, "no such folder"),
        ({"salt_file": str(tmp_path / "none")}, "No such file"),
    ):
        with pytest.raises(UsageError, match=line):
            open_source(config.model_copy(update=change))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", r"cannot be read \(.*\); write or download it again$"),
        (b"\xff,note\n", "cannot be read .*utf-8"),
        (b"file,note\n", "no rows"),
        (b"file,note\n\xff\xfe,b\n", "cannot be read .*UTF8"),
        (b"file,note\na,b\nc,d,e,SECRET\n", r"Expected 2 columns, got 4\); write or download it again$"),
    ],
)
def test_a_broken_table_is_one_clear_line(tmp_path, content, line):
    config = write_csv_source(tmp_path, columns={"image": "file", "text": "note"}, label_columns=())
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(RunError, match=line) as caught:
        open_source(config)
    assert not re.search("SECRET|\n", str(caught.value))


@pytest.mark.parametrize("kind", ["tsv", "parquet", "csv.gz"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path, kind):
    config = write_csv_source(tmp_path)
    frame = pd.read_csv(config.input)
    frame["edema"] = frame["edema"].astype(float).where(frame.index != 3)  # a gap makes the column one of floats
    frame.to_csv(config.input, index=False)
    other = tmp_path / f"table.{kind}"
    frame.to_parquet(other) if kind == "parquet" else frame.to_csv(
        other, sep="\t" if kind == "tsv" else ",", index=False
    )
    assert open_source(config).rows[:] == open_source(config.model_copy(update={"input": str(other)})).rows[:]


def write_notes(tmp_path, notes: list) -> PrepareConfig:
    """The table of images as parquet, with these notes."""
    config = write_csv_source(tmp_path, count=len(notes))
    table = tmp_path / "table.parquet"
    pd.read_csv(config.input).assign(note=notes).to_parquet(table)
    return config.model_copy(update={"input": str(table)})


def test_bytes_in_a_parquet_table_are_its_text(tmp_path):
    rows = open_source(write_notes(tmp_path, [b"No effusion.", " Gr\u00f6\u00dfe normal. ".encode(), None])).rows
    assert [row.sections for row in rows] == [(("text", "No effusion."),), (("text", "Größe normal."),), ()]
    broken = write_notes(tmp_path / "broken", [b"Gr\xf6\xdfe SECRET"])
    with pytest.raises(
        RunError, match=r"table.parquet: cannot be read \('utf-8' codec .*\); write or download"
    ) as caught:
        open_source(broken)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("notes", "kind"), [([["No effusion.", "SECRET"]], "list"), ([{"findings": "SECRET"}], "struct")]
)
def test_a_parquet_column_of_lists_is_one_clear_line(tmp_path, notes, kind):
    config = write_notes(tmp_path, notes)
    with pytest.raises(UsageError) as caught:
        open_source(config)
    assert str(caught.value) == (
        f"table table.parquet: column 'note' holds a {kind} in each cell; expected text, make it a column of strings"
    )


def test_signs_become_labels_and_an_empty_cell_is_unknown(tmp_path):
    config = write_csv_source(tmp_path, count=5)
    set_column(config, "edema", ["1", "0", "-1", "", "1.0"])
    table = open_source(config)
    assert table.labels == ["edema"]
    assert [row.labels["edema"] for row in table.rows] == [1, 0, -1, None, 1]


def test_truth_values_in_any_case_are_signs(tmp_path):
    config = write_csv_source(tmp_path, count=7)
    set_column(config, "edema", ["TRUE", "FALSE", "True", "False", "true", "false", ""])
    table = open_source(config)
    assert table.labels == ["edema"]
    assert [row.labels["edema"] for row in table.rows] == [1, 0, 1, 0, 1, 0, None]


def test_text_classes_become_one_label_each(tmp_path):
    config = write_csv_source(tmp_path, count=3)
    set_column(config, "edema", ["mild", "severe", ""])
    table = open_source(config)
    assert table.labels == ["edema=mild", "edema=severe"]
    assert [list(row.labels.values()) for row in table.rows] == [[1, 0], [0, 1], [None, None]]


def test_label_columns_that_hold_something_else_are_refused(tmp_path):
    config = write_csv_source(tmp_path, count=70)
    set_column(config, "edema", [str(number % 5) for number in range(70)])
    with pytest.raises(UsageError, match="numbers other than 1, 0 and -1"):
        open_source(config)
    set_column(config, "edema", [f"patient {number}" for number in range(70)])
    with pytest.raises(UsageError, match="70 classes, at most 64"):
        open_source(config)
    set_column(config, "pos", [f"patient {number}" for number in range(70)])
    with pytest.raises(UsageError, match="view column has 70 different values"):
        open_source(config.model_copy(update={"label_columns": ()}))


def test_official_splits_are_honoured_under_all_their_names(tmp_path):
    config = write_csv_source(tmp_path, count=8)
    set_column(config, "exam", ["train", "Train", "val", "valid", "validate", "validation", "test", "test"])
    table = open_source(config.model_copy(update={"columns": {**config.columns, "split": "exam"}}))
    assert [row.split for row in table.rows] == ["train"] * 2 + ["val"] * 4 + ["test"] * 2
    assert table.split_rule == "as the split column says"


def test_a_patient_in_two_official_splits_is_an_error_that_names_rows_not_patients(tmp_path):
    config = write_csv_source(
        tmp_path, count=4, columns={"image": "file", "text": "note", "patient": "who", "split": "exam"}
    )
    set_column(config, "exam", ["train", "train", "val", "test"])
    with pytest.raises(RunError) as caught:
        open_source(config)
    assert str(caught.value).startswith("rows 2 and 3 are of one patient, but one is in val and one in test")
    assert "SECRET" not in str(caught.value)


def test_a_row_without_a_split_goes_where_its_patient_is(tmp_path):
    config = write_csv_source(
        tmp_path, count=6, columns={"image": "file", "text": "note", "patient": "who", "split": "exam"}
    )
    set_column(config, "exam", ["test", "", "", "", "val", ""])
    rows = open_source(config).rows[:]
    assert [rows[0].split, rows[1].split, rows[4].split, rows[5].split] == ["test", "test", "val", "val"]
    assert rows[2].split == rows[3].split == compute_split("SECRET-PATIENT-1", 0, config.split)
    set_column(config, "exam", ["test", "", "", "", "fold 3", ""])
    with pytest.raises(UsageError, match="split column holds 'fold 3'; expected train, val"):
        open_source(config)


def test_the_split_hangs_on_the_patient_and_the_seed_alone(tmp_path):
    config = write_csv_source(tmp_path, count=40)
    before = {row.sample_id: row.split for row in open_source(config).rows}
    frame = pd.read_csv(config.input, dtype=str).iloc[::-1][5:]
    frame.to_csv(config.input, index=False)
    after = {row.sample_id: row.split for row in open_source(config).rows}
    assert after == {sample: before[sample] for sample in after}
    assert {row.sample_id: row.split for row in open_source(config.model_copy(update={"seed": 1})).rows} != after


def test_shares_of_the_hash_split_are_met():
    splits = [compute_split(f"p{number}", 0, (0.7, 0.1, 0.2)) for number in range(5000)]
    assert [round(splits.count(name) / 5000, 2) for name in ("train", "val", "test")] == pytest.approx(
        [0.7, 0.1, 0.2], abs=0.02
    )


def test_a_row_without_a_patient_has_the_one_that_its_study_names(tmp_path):
    config = write_csv_source(tmp_path, count=8)
    set_column(config, "exam", ["S1", "S1", "S1", "S2", "S2", "7", "7", "7"])
    set_column(config, "who", ["Ann", "", "Ann", "", "", "Bob", "Cem", ""])
    table = open_source(config)
    rows = sorted(table.rows, key=lambda row: row.number)
    patients, studies = [row.patient for row in rows], [row.study for row in rows]
    assert len({*patients[:3]}) == len({*studies[:3]}) == 1
    assert patients[3] == patients[4] != patients[0], "a study that names nobody is a patient"
    assert len({*studies[5:7]}) == 2, "studies that are numbered within a patient stay apart"
    assert [row.reject for row in rows] == [*[""] * 7, "patient_mismatch"]
    assert table.notes == [
        "1 rows without a patient: that of their study's other rows",
        "3 rows without a patient: each study is a patient of its own, so one person may be in two splits",
    ]


def test_without_a_patient_the_study_keeps_images_together_and_the_card_is_told(tmp_path):
    config = write_csv_source(tmp_path, columns={"image": "file", "text": "note", "study": "who"})
    table = open_source(config)
    assert len({row.patient for row in table.rows}) == 6
    assert table.notes == ["no patient column: each study is a patient of its own, so one person may be in two splits"]
    alone = open_source(config.model_copy(update={"columns": {"image": "file", "text": "note"}}))
    assert len({row.patient for row in alone.rows}) == 12


def test_the_second_row_of_an_image_is_a_duplicate(tmp_path):
    config = write_csv_source(tmp_path)
    edit_table(config, 7, file="./secret-file-2.jpg")
    assert [row.number for row in open_source(config).rows if row.reject == "duplicate_id"] == [7]


def test_no_raw_id_is_in_what_a_task_gets(tmp_path):
    rows = open_source(write_csv_source(tmp_path)).rows[2:5]
    assert b"SECRET" not in pickle.dumps(rows)
    assert [row.number for row in rows] == [2, 3, 4]


def test_ids_hang_on_the_salt_and_cannot_be_guessed_without(tmp_path):
    salt = tmp_path / "salt"
    salt.write_text("0123456789abcdef-another")
    config = write_csv_source(tmp_path / "set")
    ours, theirs = open_source(config), open_source(config.model_copy(update={"salt_file": str(salt)}))
    assert not {row.patient for row in ours.rows} & {row.patient for row in theirs.rows}
    assert [row.split for row in ours.rows] == [row.split for row in theirs.rows]
    ids = IdHasher(b"x" * 16)
    assert ids.code("patient", "1") != ids.code("study", "1")
    assert all(0 < ids.number("image", str(number)) < 2**63 for number in range(1000))


def test_the_salt_is_made_once_and_is_for_its_owner_only(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first = read_salt(None)
    assert len(first) == 64
    assert read_salt(None) == first
    assert stat.S_IMODE(default_salt_path().stat().st_mode) == 0o600
    assert list(default_salt_path().parent.iterdir()) == [default_salt_path()]
    default_salt_path().write_text("short")
    with pytest.raises(UsageError, match="5 bytes, expected at least 16"):
        read_salt(None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "place" / "salt"))  # below a file: cannot be made
    with pytest.raises(UsageError, match="--salt-file"):
        read_salt(None)


def test_phantoms_come_with_labels_boxes_and_the_sentence_of_each_box():
    table = open_source(PrepareConfig(source="phantom", output="", count=30, size_px=64))
    for row in table.rows:
        sentences = [sentence for _, text in row.sections for sentence in split_sentences(text)]
        assert len(sentences) == len(row.sections), "the splitter must keep the phantom's sentences whole"
        assert sorted(row.labels) == sorted(table.labels)
        assert {box["finding"] for box in row.boxes} == {name for name, value in row.labels.items() if value}
        told = [box["sentence"] for box in row.boxes if box["sentence"] is not None]
        assert all(0 <= at < len(sentences) for at in told)


def test_phantom_rows_are_made_in_the_task_and_are_the_same_in_every_slice():
    rows = open_source(PrepareConfig(source="phantom", output="", count=10**6, size_px=64)).rows
    assert len(pickle.dumps(rows[500_000:500_512])) < 10_000
    assert list(rows[3:6])[1] == next(iter(rows[4:5]))


def test_phantoms_are_the_same_whatever_the_salt(tmp_path):
    salt = tmp_path / "salt"
    salt.write_bytes(np.random.default_rng(0).bytes(32))
    config = PrepareConfig(source="phantom", output="", count=2, size_px=64)
    assert list(open_source(config).rows) == list(open_source(config.model_copy(update={"salt_file": str(salt)})).rows)
