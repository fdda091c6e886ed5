"""The files below a folder, all of them or an error: what cannot be listed must not look empty."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from place.config import RunError
from place.data.images import judge_error

_Folder = tuple[int, int]


def walk_files(root: str | Path) -> Iterator[str]:
    """Paths below the root of all files, in a fixed order: a folder's own, then those of its folders.

    Links are followed, but for one to a folder that it lies in itself.
    Raises:
        RunError: a folder cannot be listed.
    Source: ours.
    """
    yield from _walk(str(root), "", frozenset())


def _walk(root: str, below: str, above: frozenset[_Folder]) -> Iterator[str]:
    folder = os.path.join(root, below)
    try:
        within = above | {_identify(folder)}
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        folders = {entry.name: entry for entry in entries if _is_folder(entry)}
    except OSError as error:
        raise RunError(
            f"{folder} cannot be listed ({error.strerror or error}): put that right and run the same command again"
        ) from None
    yield from (os.path.join(below, entry.name) for entry in entries if entry.name not in folders)
    for name, entry in folders.items():
        if not entry.is_symlink() or _identify(entry.path) not in within:
            yield from _walk(root, os.path.join(below, name), within)


def _identify(folder: str) -> _Folder:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        judge_error(error)  # passes on what tells of storage alone; the rest is a file that cannot be read
        return False
