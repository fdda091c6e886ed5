"""What training processes of a host leave behind when they are killed: noted beforehand, removed afterwards.

Imports nothing heavy: `python -m place.node clean FOLDER` runs while a job is being cancelled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

_SHARED_MEMORY = Path("/dev/shm")


def note_cache(run_dir: Path, cache: Path) -> None:
    """Note a folder of unpacked shards before it is made."""
    _append(run_dir, {"cache": str(cache)})


def note_shared_memory(run_dir: Path, prefixes: list[str]) -> None:
    """Note the shared memory that streaming has made under these prefixes."""
    for prefix in prefixes:
        inode = (_SHARED_MEMORY / f"{prefix}locals").stat().st_ino
        _append(run_dir, {"prefix": prefix, "inode": inode})


def clean_node(run_dir: Path) -> int:
    """Remove the shared memory and the shard cache that workers of this run left on this host, and nobody else's.

    Returns:
        How many segments of shared memory and lock files were removed.
    """
    return _clean(note_path(run_dir))


def clean_folder(folder: Path) -> int:
    """`clean_node` for every run of this user whose workers had `folder` as their temporary folder on this host."""
    return sum(_clean(path) for path in folder.glob(f"place-{'?' * 16}-{socket.gethostname()}.node.jsonl"))


def note_path(run_dir: Path) -> Path:
    """Where the workers of this host note what a run of theirs will leave behind; hosts may share the folder."""
    key = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"place-{key}-{socket.gethostname()}.node.jsonl"


def _append(run_dir: Path, record: dict[str, Any]) -> None:
    with note_path(run_dir).open("a") as file:
        file.write(json.dumps(record) + "\n")


def _clean(path: Path) -> int:
    try:
        # Its name can be guessed, and others may write in a temporary folder: what they put there is not done.
        if not path.is_file() or path.is_symlink() or path.stat().st_uid != os.geteuid():
            return 0
        lines = path.read_text().splitlines()
    except FileNotFoundError:  # another process of this host has just cleaned up
        return 0
    # A worker killed while it wrote leaves half a line.
    removed = sum(_remove(json.loads(line), path.parent) for line in lines if line.endswith("}"))
    path.unlink(missing_ok=True)
    return removed


def _remove(record: dict[str, Any], folder: Path) -> int:
    if "cache" in record:
        shutil.rmtree(record["cache"], ignore_errors=True)
        return 0
    # Names are used again once they are free: the inode tells whether it is still ours.
    mark = _SHARED_MEMORY / f"{record['prefix']}locals"
    try:
        if mark.stat().st_ino != record["inode"]:
            return 0
    except FileNotFoundError:
        return 0
    paths = [*mark.parent.glob(f"{record['prefix']}*"), *folder.glob(f"{record['prefix']}*_filelock")]
    # While the mark is there nobody takes the names.
    for path in sorted(paths, key=lambda path: path == mark):
        path.unlink(missing_ok=True)
    return len(paths)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "clean":
        sys.exit("usage: python -m place.node clean FOLDER")
    clean_folder(Path(sys.argv[2]))
