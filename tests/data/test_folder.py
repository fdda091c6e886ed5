"""Images in folders of classes: labels, splits, and the way to figures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from miniatures import parse_prepare, write_image

from place.cli import main
from place.config import EvaluationConfig, UsageError
from place.data.prepared import list_splits, read_card, read_samples
from place.data.sources import open_source
from place.evaluation.suite import run_encoder_evaluation

CLASSES = ("covid", "normal", "viral pneumonia")


def write_classes(folder: Path, count: int = 8, first: int = 0) -> None:
    """Images of every kind in each class's folder; some lie deeper."""
    for kind in CLASSES:
        for number in range(count):
            suffix = (".png", ".JPG", ".dcm", ".jpeg")[number % 4]
            below = "scanner/" if number % 3 == 2 else ""
            write_image(folder / kind / f"{below}{number}{suffix}", first + 100 * CLASSES.index(kind) + number)
    (folder / "readme.txt").write_text("no image")


def list_rows(*words: object) -> list:
    table = open_source(parse_prepare("--source", "folder", "--output", "out", *words))
    return [table, *table.rows]


def test_classes_are_labels_and_the_hash_of_the_image_splits(tmp_path):
    folder = tmp_path / "xrays"
    write_classes(folder, 40)
    table, *rows = list_rows("--input", folder)
    assert table.labels == list(CLASSES)
    assert len(rows) == 120
    for row in rows:
        kind = Path(row.image).relative_to(folder).parts[0]
        assert row.labels == {name: int(name == kind) for name in CLASSES}
        assert Path(row.image).is_file()
    assert {row.split for row in rows} == {"train", "val", "test"}
    assert len({row.patient for row in rows}) == len({row.sample_id for row in rows}) == 120
    assert table.notes[0] == "each class folder is a label: covid, normal, viral pneumonia"
    write_classes(tmp_path / "other", 40)
    others = {row.patient for row in list_rows("--input", tmp_path / "other")[1:]}
    assert not others & {row.patient for row in rows}, "another data set's image of the same name"


def test_names_that_are_not_utf8_are_images_and_classes_as_any_other(tmp_path):
    folder = tmp_path / "xrays"
    write_classes(folder, 3)
    (folder / "normal" / "0.png").rename(folder / "normal" / os.fsdecode(b"M\xfcller.png"))
    (folder / "covid").rename(folder / os.fsdecode(b"\xe9tat"))
    table, *rows = list_rows("--input", folder)
    assert table.labels[:2] == ["normal", "viral pneumonia"]
    table.labels[2].encode()
    assert len(rows) == len({row.sample_id for row in rows}) == 9
    assert all(Path(row.image).is_file() for row in rows)


def test_split_folders_split_and_train_gives_a_part_where_there_is_no_val(tmp_path):
    folder = tmp_path / "xrays"
    for split in ("Train", "valid", "test"):
        write_classes(folder / split)
    table, *rows = list_rows("--input", folder)
    assert table.labels == list(CLASSES)
    expected = {"Train": "train", "valid": "val", "test": "test"}
    assert all(row.split == expected[Path(row.image).relative_to(folder).parts[0]] for row in rows)
    assert table.split_rule == "as the folders say"
    (folder / "valid").rename(tmp_path / "gone")
    table, *rows = list_rows("--input", folder, "--split", 0.6, 0.2, 0.2)
    assert {row.split for row in rows if "/Train/" in row.image} == {"train", "val"}
    assert {row.split for row in rows if "/test/" in row.image} == {"test"}
    assert table.split_rule == "as the folders say; 0.25 of train validates, by hash of the image, seed 0"


def test_folders_that_are_no_classes_are_one_line(tmp_path):
    def refuse(message: str, *words: object) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            list_rows(*words)
        assert "\n" not in str(caught.value)

    folder = tmp_path / "xrays"
    refuse("needs a folder: --input DIR; expected CLASS")
    refuse("needs a folder: --input .*xrays; expected CLASS", "--input", folder)
    folder.mkdir()
    refuse("xrays holds no images; expected CLASS", "--input", folder)
    write_classes(folder, 2)
    refuse("--min-words 3: source folder has no reports; leave it out", "--input", folder, "--min-words", 3)
    write_image(folder / "loose.png", 1)
    refuse("1 images of .*xrays lie in no class, the first is loose.png", "--input", folder)
    (folder / "loose.png").unlink()
    write_image(folder / "train" / "a" / "0.png", 1)
    refuse("xrays holds covid beside train, a class beside a split", "--input", folder)
    write_image(tmp_path / "flat" / "train" / "0.png", 1)
    refuse("1 images of .*flat lie in no class, the first is train/0.png", "--input", tmp_path / "flat")


def test_a_folder_is_prepared_and_judged_without_any_other_option(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "salt"))
    folder, data = tmp_path / "xrays", tmp_path / "data"
    for split, count, first in (("train", 8, 0), ("val", 4, 20), ("test", 4, 40)):
        write_classes(folder / split, count, first)
    words = ["prepare", "--source", "folder", "--input", str(folder), "--output", str(data)]
    assert main([*words, "--launcher", "local", "--num-workers", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "note nobody tells the patients: each image is one of its own, so one person may be in two splits" in shown
    assert read_card(data)["counts"]["kept"] == 48
    assert sum(len([*read_samples(data, split)]) for split in list_splits(data)) == 48
    settings = EvaluationConfig(bootstrap=20, label_shares=(1.0,))
    results = run_encoder_evaluation(
        "timm:resnet18", data, ["classification"], tmp_path / "out", "test", settings, random_weights=True
    )
    assert {"mean_auroc", "accuracy"} <= {*results["classification"].metrics}
