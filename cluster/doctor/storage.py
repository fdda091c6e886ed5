"""Throughput of the storage that a run reads and writes, and whether all nodes see the same folder."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from place.cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding
from place.cluster.doctor.host import find_existing

MIB = 1 << 20
CHUNK = 4 * MIB


def check_writing(folder: Path, size_mib: int = 64, budget_s: float = 3.0) -> list[Finding]:
    """Write a file with fsync and read it back past the page cache; then small files, as a checkpoint's listing has."""
    where = find_existing(folder)
    path = where / f".place-doctor-{uuid.uuid4().hex}"
    try:
        written, write_s = _write(path, size_mib * MIB, budget_s)
        read, read_s = _read(iter([path]), written, budget_s)
        small_ms = _time_small_files(path)
    except OSError as error:
        advice = "choose a folder you may write to, with space left"
        return [Finding("storage", FAIL, f"run.dir {where}: {error.strerror}", advice)]
    finally:
        path.unlink(missing_ok=True)
    write_mib_s, read_mib_s = written / MIB / write_s, read / MIB / read_s
    text = (
        f"run.dir {where}: write + fsync {write_mib_s:,.0f} MiB/s, read {read_mib_s:,.0f} MiB/s, "
        f"a small file {small_ms:.1f} ms"
    )
    if write_mib_s < 50:
        return [Finding("storage", WARN, text, "a 3 GiB checkpoint takes over a minute: use faster shared storage")]
    if small_ms > 200:
        return [Finding("storage", WARN, text, "small files are slow: keep run.dir off a busy or distant file system")]
    return [Finding("storage", OK, text)]


def check_reading(path: str, size_mib: int = 256, budget_s: float = 3.0) -> list[Finding]:
    """Read shards of the data set, asking the kernel to forget them first; a server's own cache still helps."""
    if "://" in path:
        return [Finding("data", SKIP, f"data.path {path} is remote: the first batch tells how fast it comes")]
    folder = Path(path)
    shards = sorted(folder.glob("*/*.mds*"), key=lambda path: path.stat().st_atime)
    if not shards:
        return [Finding("data", SKIP, f"data.path {folder}: no shards there", "place prepare writes them")]
    try:
        read, took_s = _read(iter(shards), size_mib * MIB, budget_s)
    except OSError as error:
        return [Finding("data", FAIL, f"data.path {folder}: {error.strerror}", "check the mount and its permissions")]
    rate = read / MIB / took_s
    total = sum(path.stat().st_size for path in shards)
    text = f"data.path {folder}: {total / MIB:,.0f} MiB in {len(shards)} shards, cold read {rate:,.0f} MiB/s"
    if rate < 50 and read > 16 * MIB:
        return [Finding("data", WARN, text, "loaders may wait: set data.cache_dir to a local disk of each node")]
    return [Finding("data", OK, text)]


def write_mark(folder: Path) -> tuple[Path | None, list[Finding]]:
    """A file that other nodes are asked for, which the caller removes; or that none could be written."""
    path = find_existing(folder) / f".place-doctor-{uuid.uuid4().hex}"
    try:
        path.write_text("place doctor\n")
    except OSError as error:
        text = f"run.dir {path.parent} cannot be written ({error.strerror}): nodes were not asked for a file in it"
        return None, [Finding("shared folder", FAIL, text, "give run.dir a folder that you may write")]
    return path, []


def check_mark(mark: Path) -> list[Finding]:
    """Whether this node sees a file that another one wrote."""
    deadline = time.monotonic() + 5  # NFS may keep a folder's listing for some seconds
    while not mark.is_file():
        if time.monotonic() > deadline:
            text = f"run.dir {mark.parent} is not the same folder on all nodes"
            return [Finding("shared folder", FAIL, text, "put run.dir on storage that every node mounts")]
        time.sleep(0.2)
    return [Finding("shared folder", OK, f"run.dir {mark.parent} is seen by all nodes")]


def _write(path: Path, size: int, budget_s: float) -> tuple[int, float]:
    chunk, began, written = os.urandom(CHUNK), time.perf_counter(), 0
    with path.open("wb", buffering=0) as file:
        while written < size and time.perf_counter() - began < budget_s:
            written += file.write(chunk)
            os.fsync(file.fileno())
    return written, time.perf_counter() - began


def _read(paths: Iterator[Path], size: int, budget_s: float) -> tuple[int, float]:
    began, done = time.perf_counter(), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := file.read(CHUNK):
                done += len(chunk)
                if done >= size or time.perf_counter() - began > budget_s:
                    return done, time.perf_counter() - began
    return done, max(1e-9, time.perf_counter() - began)


def _time_small_files(path: Path, count: int = 10) -> float:
    """Milliseconds to write, sync and rename a small file."""
    began = time.perf_counter()
    for _ in range(count):
        part = path.with_suffix(".part")
        with part.open("w") as file:
            file.write("x")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    return (time.perf_counter() - began) / count * 1000
