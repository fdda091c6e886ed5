"""`place data inspect`: what a person should see of a prepared data set before training on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from place.data.card import count_in_turns
from place.data.identity import SPLITS
from place.data.manifest import MANIFEST_FILE, REJECTED_FILE, read_batches
from place.data.prepared import list_splits, read_card, read_shard, read_shard_list
from place.data.storage import Store, open_store

_COUNTED = ("view", "modality", "photometric", "laterality")
_MEASURED = ("num_words", "source_height_px", "source_width_px", "height_px", "width_px")
_EXAMPLES, _TOP_GROUPS = 4, 12
_SHARDS_READ = 8


class Groups(NamedTuple):
    """Reports that several images share."""

    groups: int
    images: int
    """In groups of two and more."""
    top: list[tuple[int, int]]
    """(images, hash) of the largest."""


class Findings(NamedTuple):
    """What the page shows, apart from the card."""

    counted: dict[str, Counter[str]]
    measured: dict[str, Counter[int]]
    sentences: Counter[int]
    warnings: Counter[str]
    spacing_mm: list[float]
    """5th, 50th and 95th percentile of the stored images' row spacing; empty if none is known."""
    same: Groups
    near: Groups
    same_text: dict[int, str]
    rejects: dict[str, list[str]]
    """Some of the rows that were dropped for each reason."""
    intensity: list[int]
    """256 counts of grey levels, over `images_read` images."""
    images_read: int
    samples: list[dict[str, Any]]
    """Stored columns of some images of each split, with `split`."""


def collect_findings(data_dir: str | Path, per_split: int = 8) -> Findings:
    """Read the manifest once through, and some shards of each split.

    Args:
        data_dir: folder or s3:// address of a prepared data set.
        per_split: images shown of each split.
    Raises:
        UsageError: no data set there.
        RunError: a damaged shard.
    Source: ours.
    """
    card, store = read_card(data_dir), open_store(data_dir)
    rows = card["counts"]["kept"]
    same, near = (find_groups(store, column, rows) for column in ("report_group", "near_group"))
    intensity, samples, images_read = np.zeros(256, np.int64), [], 0
    for split in sorted(list_splits(data_dir), key=SPLITS.index):
        shown, found, images = _read_some(store, split, read_shard_list(data_dir, split), per_split)
        samples += shown
        intensity += found
        images_read += images
    counted, measured, sentences, warnings, spacing = _read_manifest(store)
    return Findings(
        counted,
        measured,
        sentences,
        warnings,
        spacing,
        same,
        near,
        _read_texts(store, {group for _, group in same.top}),
        _read_rejects(store),
        intensity.tolist(),
        images_read,
        samples,
    )


def find_groups(store: Store, column: str, rows: int) -> Groups:
    """Groups of two images and more with one value in the column. Source: ours."""
    groups, images = 0, 0
    top: list[tuple[int, int]] = []
    for seen in count_in_turns(store, [column], rows):
        large = [(count, group) for (group,), count in seen.items() if count > 1]
        groups, images = groups + len(large), images + sum(count for count, _ in large)
        top = sorted([*top, *large], reverse=True)[:_TOP_GROUPS]
    return Groups(groups, images, top)


def _read_manifest(
    store: Store,
) -> tuple[dict[str, Counter[str]], dict[str, Counter[int]], Counter[int], Counter[str], list[float]]:
    counted: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
    measured: dict[str, Counter[int]] = {name: Counter() for name in _MEASURED}
    sentences: Counter[int] = Counter()
    warnings: Counter[str] = Counter()
    spacing: Counter[float] = Counter()
    columns = [*_COUNTED, *_MEASURED, "sentences", "warnings", "spacing_y_mm"]
    for batch in read_batches(store, MANIFEST_FILE, columns):
        for name in _COUNTED:
            counted[name].update(batch[name].to_pylist())
        for name in _MEASURED:
            measured[name].update(batch[name].to_pylist())
        sentences.update(map(len, batch["sentences"].to_pylist()))
        warnings.update(word for words in batch["warnings"].to_pylist() for word in words)
        spacing.update(round(value, 3) for value in batch["spacing_y_mm"].to_pylist() if value is not None)
    return counted, measured, sentences, warnings, _find_percentiles(spacing, (5, 50, 95))


def _find_percentiles(counts: Counter[float], wanted: tuple[int, ...]) -> list[float]:
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    return [values[int(np.searchsorted(ends, share / 100 * ends[-1]))] for share in wanted] if values else []


def _read_texts(store: Store, groups: set[int]) -> dict[int, str]:
    """The report of each group, as its first image has it."""
    texts: dict[int, str] = {}
    for batch in read_batches(store, MANIFEST_FILE, ["report_group", "sentences"]):
        for at, group in enumerate(batch["report_group"].to_pylist()):
            if group in groups and group not in texts:
                texts[group] = " ".join(item["text"] for item in batch["sentences"][at].as_py())
    return texts


def _read_rejects(store: Store) -> dict[str, list[str]]:
    examples: dict[str, list[str]] = {}
    for batch in read_batches(store, REJECTED_FILE, ["row", "reason", "detail"]):
        for row, reason, detail in zip(*(batch[name].to_pylist() for name in ("row", "reason", "detail"))):
            told = examples.setdefault(reason, [])
            if len(told) < _EXAMPLES:
                told.append(f"row {row}" + (f": {detail}" if detail else ""))
    return examples


def _read_some(
    store: Store, split: str, shards: list[dict[str, Any]], wanted: int
) -> tuple[list[dict[str, Any]], np.ndarray, int]:
    """Samples from shards all over a split: those to show, and the grey levels and number of all that were read."""
    from place.data.transforms import read_image

    shown: list[dict[str, Any]] = []
    levels, images = np.zeros(256, np.int64), 0
    chosen = _spread(shards, _SHARDS_READ)
    for nth, info in enumerate(chosen):
        samples = list(read_shard(store, split, info))
        share = (nth + 1) * wanted // len(chosen) - nth * wanted // len(chosen)
        shown += [{**sample, "split": split} for sample in _spread(samples, share)]
        for sample in _spread(samples, 64):
            levels += np.bincount(read_image(sample["image"]).ravel(), minlength=256)
            images += 1
    return shown, levels, images


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most so many of them, evenly over the list."""
    count = min(count, len(items))
    return [items[(2 * at + 1) * len(items) // (2 * count)] for at in range(count)]
