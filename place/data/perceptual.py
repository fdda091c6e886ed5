"""Perceptual hashes of stored images, kept beside the data, and the pixel error that confirms what they suspect."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.fft import dctn

from place.config import RunError
from place.data.manifest import HASHES_FILE, read_columns
from place.data.prepared import count_samples, list_splits, read_card, read_samples
from place.data.storage import open_store
from place.data.transforms import Grey, read_image

SIDE_PX, LOW = 64, 16
MAX_BITS, MAX_ERROR = 40, 0.25
"""Two images are one where at most so many of 256 bits differ, and then at most so large a pixel error.

Copies (JPEG quality 20, half or 1.5 times the size, brightness +40, contrast x 1.4, gamma 0.7 and 1.5) differ in at
most 26 bits, once 46. Source: ours.
"""
_ROWS = 4096
"""Hashes of a tile, on both sides: 64 MiB of comparisons at once."""


class ImageHashes(NamedTuple):
    """sample_id and hash of each stored image, bits (N,256) bool, in stored order."""

    sample_id_N: NDArray[np.int64]
    bits_NH: NDArray[np.bool_]


def shrink_to_thumbnail(image_YX: Grey) -> NDArray[np.float32]:
    """An image as 64 x 64 px, whatever its shape."""
    return cv2.resize(image_YX, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)


def hash_image(image_YX: Grey) -> bytes:
    """256 bits: which of the 16 x 16 lowest cosine frequencies at 64 px are above their median.

    Source: inferred (imagehash, phash, with 8 x 8 frequencies: phantoms are too much alike for these).
    """
    low = dctn(shrink_to_thumbnail(image_YX), norm="ortho")[:LOW, :LOW]
    return np.packbits(low > np.median(low)).tobytes()


def measure_error(a_YX: NDArray[np.float32], b_YX: NDArray[np.float32]) -> float:
    """Root mean square difference of two thumbnails, each at mean 0 and deviation 1; of a negative, as if turned back.

    Returns: 0 (equal up to brightness and contrast) to 1.41 (nothing in common).
    Source: ours.
    """
    a, b = ((x - x.mean()) / max(float(x.std()), 1e-6) for x in (a_YX, b_YX))
    return float(np.sqrt(max(0.0, 2 - 2 * abs(float((a * b).mean())))))


def read_hashes(data_dir: str | Path, on_progress: Callable[[int, int], None] | None = None) -> ImageHashes:
    """Hashes of all images of a prepared data set; computed once, then read from `hashes.parquet` in it.

    A file of other images, or one that is damaged, is written anew.

    Raises:
        UsageError: no data set there. RunError: a damaged shard.
    Source: ours.
    """
    card = read_card(data_dir)
    if (known := _read_known(data_dir, card["fingerprint"])) is not None:
        return known
    table = _compute_hashes(data_dir, on_progress)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"fingerprint": card["fingerprint"]}), buffer, compression="zstd")
    try:
        open_store(data_dir).write(HASHES_FILE, buffer.getvalue())
    except OSError:
        return _unpack(table)  # a data set that nobody may write to: its hashes are computed each time
    return _unpack(table)


def _read_known(data_dir: str | Path, fingerprint: str) -> ImageHashes | None:
    try:
        table = read_columns(data_dir, HASHES_FILE)
    except RunError:
        return None
    return _unpack(table) if (table.schema.metadata or {}).get(b"fingerprint") == fingerprint.encode() else None


def _compute_hashes(data_dir: str | Path, on_progress: Callable[[int, int], None] | None) -> pa.Table:
    ids, hashes = [], []
    splits = list_splits(data_dir)
    total = sum(count_samples(data_dir, split) for split in splits)
    for split in splits:
        for sample in read_samples(data_dir, split):
            ids.append(sample["sample_id"])
            hashes.append(hash_image(read_image(sample["image"])))
            if on_progress and len(ids) % 500 == 0:
                on_progress(len(ids), total)
    return pa.table({"sample_id": pa.array(ids, pa.int64()), "hash": pa.array(hashes, pa.binary())})


def _unpack(table: pa.Table) -> ImageHashes:
    packed = np.frombuffer(b"".join(table["hash"].to_pylist()), np.uint8).reshape(-1, LOW * LOW // 8)
    return ImageHashes(np.array(table["sample_id"].to_pylist(), np.int64), np.unpackbits(packed, axis=1).astype(bool))


def find_similar(a_NH: NDArray[np.bool_], b_MH: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Rows of a and of b that differ in at most `MAX_BITS` bits, or in all but so many: a negative. Source: ours."""
    pairs: list[tuple[int, int]] = []
    for first in range(0, len(a_NH), _ROWS):
        a_PH = _sign(a_NH[first : first + _ROWS])
        for other in range(0, len(b_MH), _ROWS):
            product_PQ = a_PH @ _sign(b_MH[other : other + _ROWS]).T
            rows, columns = np.nonzero(np.abs(product_PQ) >= LOW * LOW - 2 * MAX_BITS)
            pairs += list(zip((rows + first).tolist(), (columns + other).tolist(), strict=True))
    return sorted(pairs)


def _sign(bits_NH: NDArray[np.bool_]) -> NDArray[np.float32]:
    return bits_NH.astype(np.float32) * 2 - 1


def read_thumbnails(data_dir: str | Path, wanted: Collection[int]) -> dict[int, Any]:
    """Thumbnails of some images by sample_id. Raises RunError for a damaged shard."""
    return {
        sample["sample_id"]: shrink_to_thumbnail(read_image(sample["image"]))
        for split in (list_splits(data_dir) if wanted else [])
        for sample in read_samples(data_dir, split)
        if sample["sample_id"] in wanted
    }
