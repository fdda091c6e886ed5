"""MDS shards: the stored columns, a part's shards, and how finished parts become one split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from place.config import RunError
from place.data.manifest import write_json

COLUMNS = {
    "image": "bytes",
    "sentences": "json",
    "labels": "json",
    "view": "str",
    "sample_id": "int",
    "report_group": "int",
    "boxes": "json",
}
COMPRESSION, HASHES = "zstd", ["xxh64"]


class PartWriter:
    """Writes the samples of one part, a folder a split; a split without samples has no folder."""

    def __init__(self, folder: Path, shard_mib: int):
        self.folder, self.shard_mib = folder, shard_mib
        self.writers: dict[str, Any] = {}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers.values():
            if kind is None:
                writer.finish()
            else:
                writer.cancel_future_jobs()  # finish() would write an index over what is half done

    def write(self, split: str, sample: dict[str, Any]) -> None:
        """Add one sample with all of `COLUMNS`."""
        if split not in self.writers:
            self.writers[split] = self._open_writer(split)
        self.writers[split].write(sample)

    def _open_writer(self, split: str) -> Any:
        # Here, because the package takes seconds to import and only those who write need it.
        from place.compat import patch_torchvision

        patch_torchvision()
        from streaming import MDSWriter

        return MDSWriter(
            out=str(self.folder / split),
            columns=COLUMNS,
            compression=COMPRESSION,
            hashes=HASHES,
            size_limit=self.shard_mib << 20,
        )


def merge_split(parts: list[Path], folder: Path) -> list[str]:
    """Move the shards of all parts into one folder under a common index; may be repeated after a kill.

    Args:
        parts: the split's folders in the finished parts, in order; some may not exist.
        folder: the split's folder in the data set; not made where no part has samples.
    Returns:
        Hash of each shard's content.
    Raises:
        RunError: a part's shard is gone.
    Source: ours; index format version 2 of mosaicml-streaming.
    """
    shards: list[dict[str, Any]] = []
    for part in parts:
        if (part / "index.json").is_file():
            for info in json.loads((part / "index.json").read_text())["shards"]:
                folder.mkdir(exist_ok=True)
                shards.append(_move_shard(part, folder, info, len(shards)))
    if shards:
        write_json(folder / "index.json", {"version": 2, "shards": shards})
    return [info["raw_data"]["hashes"][HASHES[0]] for info in shards]


def _move_shard(part: Path, folder: Path, info: dict[str, Any], number: int) -> dict[str, Any]:
    name = f"shard.{number:05}.mds"
    source, target = part / info["zip_data"]["basename"], folder / f"{name}.{COMPRESSION}"
    if source.exists():
        os.replace(source, target)
    elif not target.exists():
        raise RunError(
            f"{source} is gone: the unfinished parts are damaged; delete the output folder and prepare again"
        )
    raw, packed = dict(info["raw_data"], basename=name), dict(info["zip_data"], basename=target.name)
    return {**info, "raw_data": raw, "zip_data": packed}
