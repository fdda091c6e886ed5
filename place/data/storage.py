"""Where a prepared data set lies: a folder, or a prefix of an S3 bucket; the same few operations on both."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

from place.config import RunError, UsageError
from place.kept import PARTIAL, drafted, sync

S3 = "s3://"


class Store(Protocol):
    """A place for named files; names are relative, with `/`. What is written appears whole or not at all."""

    def __str__(self) -> str:
        """How a user calls it."""

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError."""

    def open(self, name: str) -> IO[bytes]:
        """A file to seek and read in. Raises FileNotFoundError."""

    def size(self, name: str) -> int | None:
        """A file's bytes, counted; None where there is no such file."""

    def write(self, name: str, data: bytes) -> None:
        """Make or replace a file."""

    def put(self, file: Path, name: str) -> None:
        """Make or replace a file from a finished one in a folder of `stage`, which may be moved away."""

    def create(self, name: str) -> Any:
        """Context of a stream to a file that appears at its end."""

    def stage(self, name: str) -> Any:
        """Context of a local folder to build files in; it is gone at the end."""

    def list_files(self, prefix: str) -> list[str]:
        """Names of the files right in a folder, sorted; none where there is no such folder."""

    def list_top(self) -> list[str]:
        """Names of files and folders at the top, sorted."""

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all in it, if it is there."""


def open_store(where: str | Path) -> Store:
    """The store of a folder or of `s3://BUCKET/PREFIX`; nothing is made or looked up yet.

    Raises:
        UsageError: an address without a bucket, or of another kind.
    Source: ours.
    """
    text = str(where)
    if text.startswith(S3):
        return Bucket(text)
    if "://" in text:
        raise UsageError(f"{text}: unknown kind of storage; give a folder or s3://BUCKET/PREFIX")
    return Folder(Path(text))


def find_folder(where: str) -> Path:
    """The folder of a data set that is evaluated. Raises UsageError where it is on S3."""
    if "://" in where:
        raise UsageError(f"{where} is no local folder, and evaluation reads one; copy it and give the copy by --data")
    return Path(where)


class Folder:
    """A folder of this machine or of a shared file system. Final."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        return (self.root / name).open("rb")

    def size(self, name: str) -> int | None:
        try:
            with self.open(name) as file:  # NFS may remember an older state for `stat` and for listings
                return os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as file:
            file.write(data)

    def put(self, file: Path, name: str) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(file)
        os.replace(file, target)

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with drafted(target) as draft, draft.open("wb") as file:
            yield file

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        folder = self.root / f"{name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}"
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.parent.is_dir():
            raise RunError(
                f"{socket.gethostname()} has no folder {folder.parent}: workers on other hosts need an output that all "
                "of them see, or s3://BUCKET/PREFIX"
            )
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def list_files(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def list_top(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []

    def delete(self, name: str) -> None:
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():  # a read-only file system refuses even what is not there
            path.unlink(missing_ok=True)


class Bucket:
    """A prefix of an S3 bucket at S3_ENDPOINT_URL or AWS, with the credentials that AWS tools would take. Final."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.root = self.url.removeprefix(S3)
        if not self.root or self.root.startswith("/"):
            raise UsageError(f"{url}: no bucket in it; write it as s3://BUCKET/PREFIX")
        self.files = _connect(os.environ.get("S3_ENDPOINT_URL") or None)

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        return self.files.open_input_file(f"{self.root}/{name}")

    def size(self, name: str) -> int | None:
        info = self.files.get_file_info(f"{self.root}/{name}")
        return info.size if info.is_file else None

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as stream:
            stream.write(data)

    def put(self, file: Path, name: str) -> None:
        with file.open("rb") as source, self.create(name) as stream:
            shutil.copyfileobj(source, stream, 8 << 20)

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        # Under another name first: pyarrow knows no end of an upload but one that makes the object appear.
        draft = f"{self.root}/{name}.{os.urandom(4).hex()}{PARTIAL}"
        stream = self.files.open_output_stream(draft)
        try:
            yield stream
            stream.close()
            self.files.move(draft, f"{self.root}/{name}")
        except BaseException:
            with suppress(OSError):
                stream.close()
                self.files.delete_file(draft)
            raise

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"place-{Path(name).name}-") as folder:
            yield Path(folder)

    def list_files(self, prefix: str) -> list[str]:
        return sorted(item.base_name for item in self._select(f"{self.root}/{prefix}") if item.is_file)

    def list_top(self) -> list[str]:
        return sorted(item.base_name for item in self._select(self.root))

    def delete(self, name: str) -> None:
        path = f"{self.root}/{name}"
        info = self.files.get_file_info(path)
        if info.is_file:
            self.files.delete_file(path)
        elif self._select(path):
            self.files.delete_dir(path)

    def _select(self, path: str) -> list[Any]:
        from pyarrow.fs import FileSelector

        return self.files.get_file_info(FileSelector(path, allow_not_found=True))


@lru_cache(maxsize=4)
def _connect(endpoint: str | None) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    return S3FileSystem(endpoint_override=endpoint, retry_strategy=AwsStandardS3RetryStrategy(max_attempts=8))
