"""The numbers that a protocol states of a data set, against those of what was prepared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from place.config import UsageError
from place.data.manifest import MANIFEST_FILE, REJECTED_FILE, read_batches
from place.data.masks import MASKS_FILE
from place.data.protocol import Protocol, list_counts, list_deviations, refuse_deviations
from place.data.storage import Store

_COLUMNS = ["split", "study", "patient", "labels", "boxes"]
_NOT_THERE = ("missing_image", "truncated_image")


def count_prepared(store: Store, stated: Collection[str]) -> dict[str, int]:
    """What a prepared data set has of that which is stated: 0 where there is nothing, such as of a label.

    Args:
        stated: names of counts, SPLIT.WHAT; others are left out.
    Source: ours.
    """
    found: Counter[str] = Counter()
    for batch in read_batches(store, REJECTED_FILE, ["reason", "split"]):
        for row in batch.to_pylist():
            found[f"{row.get('split')}.rows"] += 1
            found[f"{row.get('split')}.missing"] += row["reason"] in _NOT_THERE
    members: dict[str, set[str]] = {"studies": set(), "patients": set(), "masks": set()}
    for batch in read_batches(store, MANIFEST_FILE, _COLUMNS):
        for row in batch.to_pylist():
            for name, value in _measure(row):
                found[f"{row['split']}.{name}"] += value
            members["studies"].add(f"{row['split']}/{row['study']}")
            members["patients"].add(f"{row['split']}/{row['patient']}")
    for split, sample_id in _list_masked(store):
        members["masks"].add(f"{split}/{sample_id}")
    for name, there in members.items():
        found.update(f"{member.split('/')[0]}.{name}" for member in there)
    for key, value in list(found.items()):
        split, _, name = key.partition(".")
        found[f"all.{name}"] += value
        found[f"train+val.{name}"] += value if split != "test" else 0
    return {name: found[name] for name in stated if not name.startswith("pool.")}


def _measure(row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    yield "rows", 1
    yield "images", 1
    yield "boxes", len(json.loads(row["boxes"]))
    for label, sign in json.loads(row["labels"]).items():
        yield f"positive.{label}", int(sign == 1)


def _list_masked(store: Store) -> Iterator[tuple[str, int]]:
    """Split and sample_id of each mask that is not empty."""
    if MASKS_FILE in store.list_top():
        for batch in read_batches(store, MASKS_FILE, ["split", "sample_id", "mask"]):
            there = batch["mask"].is_valid()
            yield from zip(*(batch.filter(there)[name].to_pylist() for name in ("split", "sample_id")))


def check_counts(protocol: Protocol, store: Store, allowed: Collection[str]) -> dict[str, Any]:
    """Compare, and refuse what is not allowed by name.

    Returns:
        For the card: `name`, `title`, `url`, `licence`, `shares_images_with`, `findings`, `tasks`, `peers`, and
        `deviations` that were allowed.
    Raises:
        RunError: a deviation that is not allowed.
    Source: ours.
    """
    deviations = list_deviations(protocol, count_prepared(store, list_counts(protocol)))
    refuse_deviations(deviations, allowed)
    return {
        **protocol.model_dump(include={"name", "title", "url", "licence"}),
        "shares_images_with": list(protocol.shares_images_with),
        "findings": list(protocol.findings),
        "tasks": {task: list(metrics) for task, metrics in protocol.tasks.items()},
        "peers": [peer.model_dump() for peer in protocol.peers],
        "deviations": list(deviations.values()),
    }


def check_allowed(protocol: Protocol, allowed: Collection[str]) -> None:
    """Refuse names that no count has, before anything is prepared. Raises UsageError."""
    stated = list_counts(protocol)
    for name in allowed:
        if name not in stated:
            raise UsageError(
                f"--allow-counts {name}: protocol {protocol.name} states no such count; there are "
                f"{', '.join(stated) or 'none'}"
            )
