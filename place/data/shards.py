"""MDS shards: the stored columns, a part's shards, and how they become one split."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from place.config import RunError
from place.data.manifest import write_json
from place.data.storage import Store

COLUMNS = {
    "image": "bytes",
    "sentences": "json",
    "labels": "json",
    "view": "str",
    "sample_id": "int",
    "study_id": "int",
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


def publish_shards(folder: Path, split: str, number: int, samples: int, store: Store) -> list[dict[str, Any]]:
    """Hand a part's shards of a split over to the data set, under names that only this part uses.

    Args:
        folder: where `PartWriter` wrote.
        number: of the part.
        samples: how many were written.
    Returns:
        The entries for the split's index.
    Raises:
        RunError: not all that was written is there.
    Source: ours; index format version 2 of mosaicml-streaming, which takes any basename.
    """
    index = folder / split / "index.json"
    infos = json.loads(index.read_text())["shards"] if index.is_file() else []
    if (found := sum(info["samples"] for info in infos)) != samples:
        raise RunError(
            f"{folder} was emptied while it was written: {found} of {samples} images of {split} are left; keep other "
            "programs out of it and run the same command again, finished parts stay"
        )
    return [
        _publish_shard(folder / split, info, f"shard.{number:05}.{at:03}.mds", store) for at, info in enumerate(infos)
    ]


def _publish_shard(folder: Path, info: dict[str, Any], name: str, store: Store) -> dict[str, Any]:
    raw, packed = dict(info["raw_data"], basename=name), dict(info["zip_data"], basename=f"{name}.{COMPRESSION}")
    store.put(folder / info["zip_data"]["basename"], f"{folder.name}/{packed['basename']}")
    return {**info, "raw_data": raw, "zip_data": packed}


def write_index(store: Store, split: str, shards: list[dict[str, Any]]) -> None:
    """Write the index that makes the published shards of a split a data set; none where there are none."""
    if shards:
        write_json(store, f"{split}/index.json", {"version": 2, "shards": shards})
