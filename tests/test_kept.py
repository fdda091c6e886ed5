"""Files that are whole or not there, however many write them at once and whatever breaks off."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from place.data.storage import Folder
from place.kept import drafted, write_text

THREADS, PROCESSES, WRITES = 3, 2, 40
Write = Callable[[Path, str], None]


def store_text(path: Path, text: str) -> None:
    """As data sets write."""
    Folder(path.parent).write(path.name, text.encode())


def write_and_read(write: Write, path: Path, number: int) -> set[str]:
    """Write a text of another length each time. Returns what was read between."""
    seen = set()
    for at in range(WRITES):
        write(path, f"{number}-{at};" * (1000 + 100 * number))
        seen.add(path.read_text())
    return seen


def write_in_threads(write: Write, path: Path, first: int) -> set[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return set().union(*pool.map(partial(write_and_read, write, path), range(first, first + THREADS)))


@pytest.mark.parametrize("write", [write_text, store_text])
def test_threads_and_processes_that_write_one_file_at_once_leave_it_whole(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    with ProcessPoolExecutor(PROCESSES) as pool:
        seen = set().union(*pool.map(partial(write_in_threads, write, path), range(0, PROCESSES * THREADS, THREADS)))
    for text in (*seen, path.read_text()):
        part, count = text.partition(";")[0], text.count(";")
        assert text == f"{part};" * count
        assert count == 1000 + 100 * int(part.partition("-")[0])
    assert [file.name for file in tmp_path.iterdir()] == ["outcome.json"]


def test_what_breaks_off_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_text(path, "old")

    def break_off() -> None:
        with drafted(path) as draft:
            draft.write_text("half of the n")
            raise KeyboardInterrupt

    def break_off_store() -> None:
        with Folder(tmp_path).create("table.parquet") as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    for act in (break_off, break_off_store):
        with pytest.raises(KeyboardInterrupt):
            act()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def put_text(path: Path, text: str) -> None:
    """As parts hand over what is finished already."""
    (path.parent / "finished").write_text(text)
    Folder(path.parent).put(path.parent / "finished", path.name)


def draft_folder(path: Path, text: str) -> None:
    with drafted(path) as draft:
        draft.mkdir()
        (draft / "weights").write_text(text)


@pytest.mark.parametrize("write", [write_text, store_text, put_text, draft_folder])
def test_bytes_are_on_the_disk_before_their_name_is(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, replace = set[int](), os.replace

    def check(source: Path, target: Path) -> None:
        files = [Path(source)] if Path(source).is_file() else [*Path(source).iterdir()]
        assert {file.stat().st_ino for file in files} == synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", check)
    write(tmp_path / "outcome", "all of it")
    assert len(synced) == 1
    assert (tmp_path / "outcome").exists()


def test_folders_that_are_drafted_at_once_do_not_meet_and_one_that_breaks_off_goes(tmp_path: Path) -> None:
    path = tmp_path / "export"

    def break_off() -> None:
        with drafted(path) as draft:
            (draft / "parts").mkdir(parents=True)
            (draft / "parts/weights").write_text("half of the n")
            raise OSError("the disk is full")

    with drafted(path) as draft:
        (draft / "parts").mkdir(parents=True)
        with pytest.raises(OSError, match="full"):
            break_off()
        (draft / "parts/weights").write_text("whole")
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "parts/weights").read_text() == "whole"
