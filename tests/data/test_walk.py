"""Folders of files: links are followed, and what cannot be listed or read stops the command, it is never left out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from archives import settings, write_dicom, write_openi_report, write_png

from place.config import RunError
from place.data.prepare import run_prepare
from place.data.sources import open_source
from place.data.walk import walk_files


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("file")


def write_tree(source: str, folder: Path) -> None:
    """Two images, each in a folder of its own."""
    for number, kind in enumerate("ab"):
        if source == "dicom-tree":
            write_dicom(folder / kind / "1", number, StudyInstanceUID=f"1.2.{number}", SOPInstanceUID=f"1.3.{number}")
        else:
            write_png(folder / kind / f"{kind}.png", number)
    (folder / "reports.csv").write_text(
        "StudyInstanceUID,text\n1.2.0,The lungs are clear.\n1.2.1,No effusion is seen.\n"
    )
    write_openi_report(folder / "a" / "1.xml", "CXR1", ["a", "b"], "The lungs are clear.", "")


def break_path(act, end: str):
    """The same function, which storage does not answer for paths with such an end."""

    def broken(path, *arguments, **options):
        if str(path).endswith(end):
            raise OSError(errno.EIO, "Input/output error", path)
        return act(path, *arguments, **options)

    return broken


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_files(tmp_path / "disk", "z/deep/4.dcm", "z/3.dcm", "2.dcm", "1.dcm")
    write_files(tmp_path / "other", "5.dcm")
    (tmp_path / "disk" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "disk" / "z" / "back").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "z" / "itself").symlink_to("itself")
    (tmp_path / "disk" / "dead.dcm").symlink_to("nowhere.dcm")
    found = ["1.dcm", "2.dcm", "dead.dcm", "more/5.dcm", "z/3.dcm", "z/itself", "z/deep/4.dcm"]
    assert list(walk_files(tmp_path / "disk")) == found


@pytest.mark.parametrize("source", ["dicom-tree", "openi", "folder"])
def test_a_folder_that_cannot_be_listed_stops_the_command(tmp_path, monkeypatch, source):
    write_tree(source, tmp_path / "in")
    config = settings(source, tmp_path / "in", min_words=0 if source == "folder" else 3)
    with monkeypatch.context() as outage:
        outage.setattr(os, "scandir", break_path(os.scandir, "in/b"))
        with pytest.raises(RunError, match=r"in/b cannot be listed \(Input/output error\): put that right and run the"):
            run_prepare(config)
    assert run_prepare(config)["counts"]["kept"] == 2


def test_a_header_that_storage_does_not_give_stops_the_command(tmp_path, monkeypatch):
    write_tree("dicom-tree", tmp_path / "in")
    config = settings("dicom-tree", tmp_path / "in")
    with monkeypatch.context() as outage:
        outage.setattr("builtins.open", break_path(open, "b/1"))
        with pytest.raises(RunError, match=r"the input cannot be read now \(Input/output error\): put that right"):
            run_prepare(config)
    assert run_prepare(config)["counts"]["kept"] == 2


def test_linked_studies_of_a_tree_are_rows_and_dead_links_are_missing(tmp_path):
    write_tree("dicom-tree", tmp_path / "in")
    (tmp_path / "in" / "b").rename(tmp_path / "elsewhere")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "c").symlink_to("nowhere")
    rows = list(open_source(settings("dicom-tree", tmp_path / "in")).rows)
    assert {os.path.relpath(row.image, tmp_path / "in"): row.reject for row in rows} == {
        "a/1": "",
        "a/1.xml": "not_dicom",
        "b/1": "",
        "c": "missing_image",
    }
