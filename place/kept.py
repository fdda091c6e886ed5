"""What long commands leave behind: files that are whole or not there, results under the key they depend on, logs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from place.config import RunError

PARTIAL = ".partial"
"""How the name of a file or folder ends that is not whole yet."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk without room: full, beyond a quota, or beyond what a file may hold."""


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A name of its own beside `path` to write under; it takes the place of `path` at the end, and goes after an error.

    A reader sees the old file or the new one, however many write it at once. A folder may be drafted too, for a `path`
    that is not there or is an empty folder.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL}")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        raise


def sync(path: Path) -> None:
    """Bring a file, or those of a folder, to the disk: a new name may outlive a power loss that its bytes do not."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def try_lock(handle: int) -> bool:
    """Lock an open file or folder for this process, or find that another one has it; the lock ends with the process."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file by rename."""
    with drafted(path) as draft:
        draft.write_text(text)


def read_kept(path: Path, key: str) -> Any:
    """The result that `write_kept` left under this key; None where there is none, or one of another key."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    return known.get("result") if known.get("key") == key else None


def write_kept(path: Path, key: str, result: Any) -> None:
    """Keep a result as JSON, with what it depends on."""
    write_text(path, json.dumps({"key": key, "result": result}))


def run_logged(command: list[str], log: Path, timeout_s: float | None = None, **environ: str) -> None:
    """Run a command to its end; what it says goes into `log`.

    Args:
        environ: variables laid over this process's.
    Raises:
        RunError: it failed, with its last line, or took longer than `timeout_s`.
        FileNotFoundError: there is no such program.
    """
    try:
        with log.open("w") as out:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | environ,
                timeout=timeout_s,
                check=False,
            ).returncode
    except subprocess.TimeoutExpired:
        raise RunError(f"not done after {timeout_s:g} s ({log})") from None
    if code:
        raise RunError(f"ended with {code}: {find_last_line(log)} ({log})")


def find_last_line(log: Path, noise: re.Pattern[str] = re.compile("$")) -> str:
    """The last line of a log that is not empty and does not begin as `noise` does, or `no output`."""
    lines = reversed(log.read_text().splitlines())
    return next((line for line in lines if line.strip() and not noise.match(line)), "no output")
