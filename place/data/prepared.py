"""Reads a prepared data set, in a folder or on S3: its card, its indexes, and its samples with every shard checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from place.config import PassingError, RunError, UsageError
from place.data.identity import SPLITS
from place.data.storage import Store, open_store

HASH = "xxh64"


def read_card(data_dir: str | Path) -> dict[str, Any]:
    """The data card of a prepared data set. Raises UsageError where there is none."""
    try:
        return json.loads(open_store(data_dir).read("card.json"))
    except FileNotFoundError:
        raise UsageError(
            f"{data_dir} is no prepared data set (no card.json); run `place prepare --output {data_dir}`"
        ) from None
    except ValueError as error:
        raise RunError(
            f"{data_dir}/card.json is damaged ({error}); run `place prepare` again into a new folder"
        ) from None
    except OSError as error:
        raise UsageError(f"{data_dir} cannot be read: {error.strerror or error}") from None


def count_samples(data_dir: str | Path, split: str) -> int:
    """Image-report pairs in a split. Raises UsageError where the split is missing or empty."""
    return sum(shard["samples"] for shard in read_shard_list(data_dir, split))


def read_samples(data_dir: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """The stored columns of each pair, in order, every shard's hash checked. Raises RunError for a damaged shard."""
    store = open_store(data_dir)
    for info in read_shard_list(data_dir, split):
        yield from read_shard(store, split, info)


def read_shard(store: Store, split: str, info: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of one shard of a split's index. Raises RunError if it is damaged."""
    # Here, because the package takes seconds to import and only those who read samples need it.
    from place.compat import patch_torchvision

    patch_torchvision()
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    fault, packed = _check_shard(store, split, info)
    if fault:
        raise RunError(f"{fault}; run `place prepare` again into a new folder, or copy the shard anew")
    shard = reader_from_json("", None, info)
    shard.validate(allow_unsafe_types=False)
    raw = decompress(info["compression"], packed) if info["zip_data"] else packed
    offsets = np.frombuffer(raw, np.uint32, count=info["samples"] + 1, offset=4)
    yield from (shard.decode_sample(raw[begin:end]) for begin, end in zip(offsets, offsets[1:]))


def find_shard_fault(store: Store, split: str, info: dict[str, Any]) -> str:
    """What is wrong with a shard's stored file: missing, or not the bytes its index names; empty when it is whole."""
    return _check_shard(store, split, info)[0]


def _check_shard(store: Store, split: str, info: dict[str, Any]) -> tuple[str, bytes]:
    stored = info["zip_data"] or info["raw_data"]
    name = f"{split}/{stored['basename']}"
    try:
        packed = store.read(name)
    except FileNotFoundError:
        return f"shard {store}/{name} is missing", b""
    if xxhash.xxh64(packed).hexdigest() != stored["hashes"][HASH]:
        return f"shard {store}/{name} is damaged (its {HASH} differs from index.json)", b""
    return "", packed


def read_shard_list(data_dir: str | Path, split: str) -> list[dict[str, Any]]:
    """The shards of a split, as its index.json has them.

    Raises:
        UsageError: the split is missing or empty.
        RunError: the file is damaged. PassingError: it cannot be read now.
    """
    try:
        return json.loads(open_store(data_dir).read(f"{split}/index.json"))["shards"]
    except FileNotFoundError:
        read_card(data_dir)
        raise UsageError(
            f"{data_dir} has no samples in split '{split}'; splits there are {list_splits(data_dir)}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{data_dir}/{split}/index.json is damaged ({type(error).__name__} {error}); "
            "run `place prepare` again into a new folder"
        ) from None
    except OSError as error:
        raise PassingError(f"{data_dir} cannot be read: {error.strerror or error}; try again") from None


def list_splits(data_dir: str | Path) -> list[str]:
    """Names of the splits that have samples."""
    store = open_store(data_dir)
    return [split for split in sorted(SPLITS) if "index.json" in store.list_files(split)]
