"""`place data verify`: every byte of a prepared data set against the hashes it was written with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from place.data.card import compute_digest, format_card, hash_file
from place.data.prepared import find_shard_fault, read_card, read_shard_list
from place.data.storage import Store, open_store

_AHEAD = 8
"""Shards read at once."""


def find_faults(data_dir: str | Path, on_progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """Name each damaged or missing file of a prepared data set, in a folder or on S3.

    Args:
        on_progress: takes the shards checked and all shards.
    Raises:
        UsageError: no data set there.
        RunError: a card that cannot be read at all.
    Source: ours.
    """
    card, store = read_card(data_dir), open_store(data_dir)
    if compute_digest(card) != card.get("digest"):
        yield f"card {store}/card.json is damaged (it differs from the digest in it)"
        return  # what it says of the other files is worth nothing
    damaged = set()
    for name, digest in card["files"].items():
        if fault := _find_file_fault(store, name, digest):
            damaged.add(name)
            yield fault + ("; its shards cannot be checked" if name.endswith("index.json") else "")
    if fault := _find_page_fault(store, card):
        yield fault
    indexes = [name for name in card["files"] if name.endswith("/index.json") and name not in damaged]
    splits = [name.removesuffix("/index.json") for name in indexes]
    shards = [(split, info) for split in splits for info in read_shard_list(data_dir, split)]
    with ThreadPoolExecutor(_AHEAD) as pool:
        for done in range(0, len(shards), _AHEAD):
            part = shards[done : done + _AHEAD]
            yield from filter(None, pool.map(lambda pair: find_shard_fault(store, *pair), part))
            if on_progress:
                on_progress(done + len(part), len(shards))


def _find_file_fault(store: Store, name: str, digest: str) -> str:
    try:
        whole = hash_file(store, name) == digest
    except FileNotFoundError:
        return f"{store}/{name} is missing"
    return "" if whole else f"{store}/{name} is damaged (its SHA-256 differs from card.json)"


def _find_page_fault(store: Store, card: dict[str, Any]) -> str:
    try:
        whole = store.read("card.md") == format_card(card).encode()
        return "" if whole else f"{store}/card.md is damaged (it differs from card.json)"
    except FileNotFoundError:
        return f"{store}/card.md is missing"
