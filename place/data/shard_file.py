"""An unpacked MDS shard in memory: what training reads of a sample, and nothing else opened or parsed."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class MappedShard:
    """Reads wanted columns of single samples of a raw shard. Final.

    Source: format of mosaicml-streaming (MDS, version 2): the number of samples and the offset of each, then samples,
    each the sizes of its columns of variable length, and its columns; numbers are little-endian.
    """

    def __init__(self, path: Path, names: list[str], encodings: list[str], sizes: list[int | None]):
        """Raises FileNotFoundError where the shard is not in the cache (any more)."""
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.columns = list(zip(names, encodings, sizes))
        self.sizes = struct.Struct(f"<{sum(not size for size in sizes)}I")

    def read(self, at: int, wanted: Iterable[str]) -> dict[str, Any]:
        """The wanted columns of sample `at`."""
        (begin,) = struct.unpack_from("<I", self.bytes, 4 + 4 * at)
        sizes = iter(self.sizes.unpack_from(self.bytes, begin))
        place = begin + self.sizes.size
        sample = {}
        for name, encoding, fixed in self.columns:
            size = fixed or next(sizes)
            if name in wanted:
                sample[name] = _DECODE[encoding](self.bytes[place : place + size])
            place += size
        return sample


_DECODE: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "str": lambda data: str(data, "utf-8"),
    "json": json.loads,
    "int": lambda data: int.from_bytes(data, "little", signed=True),
}
