"""The data card: what is in a prepared data set, what was left out and why, as JSON and as a page to read."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import place
from place.config import PrepareConfig
from place.data.identity import SPLITS
from place.data.manifest import MANIFEST_FILE, read_batches, write_json, write_text
from place.data.rows import Table
from place.data.storage import Store
from place.data.task import PartResult

_LIBRARIES = ("pydicom", "pillow", "numpy", "pyarrow", "mosaicml-streaming")
_UNITS = ("images", "studies", "patients", "unique_reports")
_VALUES_A_TURN = 500_000


def build_card(
    config: PrepareConfig, table: Table, total: PartResult, shard_hashes: list[str], store: Store
) -> dict[str, Any]:
    """Everything the card says, computed from the sum of the finished parts and the manifest. Source: ours."""
    counts = count_splits(store, total.rows)
    kept = sum(counts[split]["images"] for split in SPLITS)
    mean, std = compute_intensity(total.pixels)
    none = [0, 0, 0, 0]
    signs = ("positive", "negative", "uncertain", "unknown")
    return {
        "source": config.source,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "counts": {"input": len(table.rows), "kept": kept, "rejected": len(table.rows) - kept, **counts},
        "drop_reasons": dict(sorted(total.reasons.items(), key=lambda item: (-item[1], item[0]))),
        "labels": table.labels,
        "label_counts": {name: dict(zip(signs, total.labels.get(name, none))) for name in table.labels},
        "split_rule": table.split_rule,
        "notes": table.notes,
        "fingerprint": compute_fingerprint(shard_hashes, store),
        "image": {"size_px": config.size_px, "quality": config.jpeg_quality, "mean": mean, "std": std},
        "columns": dict(config.columns),
        "versions": {"place": place.__version__, **{name: version(name) for name in _LIBRARIES}},
    }


def count_splits(store: Store, rows: int) -> dict[str, dict[str, int]]:
    """Images, studies, patients and unique reports of each split.

    The values are counted in turns, each those of another share of the hashes, so that the memory taken does not grow
    with the data set.
    Args:
        rows: about how many rows the manifest has.
    Source: ours.
    """
    turns = 1 + rows // _VALUES_A_TURN
    counts = {split: dict.fromkeys(_UNITS, 0) for split in SPLITS}
    for turn in range(turns):
        seen: dict[tuple[str, str], set[Any]] = {(split, unit): set() for split in SPLITS for unit in _UNITS[1:]}
        for batch in read_batches(store, MANIFEST_FILE, ["split", "study", "patient", "report_group"]):
            columns = batch.to_pydict()
            if not turn:
                for split, images in Counter(columns["split"]).items():
                    counts[split]["images"] += images
            for unit, column in zip(_UNITS[1:], ("study", "patient", "report_group")):
                for split, value in zip(columns["split"], columns[column]):
                    if _turn_of(value, turns) == turn:
                        seen[split, unit].add(value)
        patients = [seen[split, "patients"] for split in SPLITS]
        assert sum(map(len, patients)) == len(set().union(*patients)), "a patient is in two splits"
        for (split, unit), values in seen.items():
            counts[split][unit] += len(values)
    return counts


def _turn_of(value: str | int, turns: int) -> int:
    """Share of a hash, as digits or as a number."""
    return (value if isinstance(value, int) else int(value, 16)) % turns


def compute_intensity(pixels: tuple[int, int, int]) -> tuple[float, float]:
    """Mean and standard deviation as shares of full scale, of 8-bit pixels of so many, such a sum and sum of squares.

    The sums are whole numbers, so the result is the same in any order; 0.5 and 0.25 without any pixel.
    Source: ours.
    """
    number, total, squares = pixels
    if not number:
        return 0.5, 0.25
    variance = (squares * number - total * total) / number**2
    return total / number / 255, max(math.sqrt(variance), 1.0) / 255


def compute_fingerprint(shard_hashes: Iterable[str], store: Store) -> str:
    """SHA-256 over the sorted shard hashes and the manifest: another picture, report, split or order gives another.

    Source: ours.
    """
    digest = hashlib.sha256("\n".join(sorted(shard_hashes)).encode())
    with store.open(MANIFEST_FILE) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_card(store: Store, card: dict[str, Any]) -> None:
    """Write card.md, then card.json: its presence says that the data set is complete."""
    write_text(store, "card.md", format_card(card))
    write_json(store, "card.json", card)


def format_card(card: dict[str, Any]) -> str:
    """The card as Markdown. Source: ours."""
    counts, image = card["counts"], card["image"]
    rows = [[split, *(f"{counts[split][unit]:,}" for unit in _UNITS)] for split in SPLITS]
    dropped = [[reason, f"{count:,}"] for reason, count in card["drop_reasons"].items()]
    labels = [[name, *(f"{count:,}" for count in found.values())] for name, found in card["label_counts"].items()]
    parts = [
        "# Data card",
        f"Source `{card['source']}`, prepared {card['created']}: {counts['input']:,} rows in, {counts['kept']:,} kept, "
        f"{counts['rejected']:,} rejected.",
        "## Splits\n\n" + _format_table(["split", "images", "studies", "patients", "unique reports"], rows),
        f"Split {card['split_rule']}; no patient is in two splits."
        + "".join(f"\n\nNote: {note}." for note in card["notes"]),
        "## Rejected rows\n\n" + (_format_table(["reason", "rows"], dropped) if dropped else "None."),
        *(["`rejected.parquet` has the row number and the reason of each."] if dropped else []),
        *(
            ["## Labels\n\n" + _format_table(["label", "positive", "negative", "uncertain", "unknown"], labels)]
            if labels
            else []
        ),
        "## Images\n\n"
        + f"Grey JPEG, quality {image['quality']}, short side at most {image['size_px']} px. Training pixels: "
        f"mean {image['mean']:.4f}, standard deviation {image['std']:.4f} (of 1).",
        "## Identity\n\nPatients, studies and images carry keyed hashes in place of their ids, names and paths. "
        "Reports are stored as they came: what names they hold is still in them.",
        f"Fingerprint `{card['fingerprint']}`",
        "Made with " + ", ".join(f"{name} {number}" for name, number in card["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _format_table(head: list[str], rows: list[list[str]]) -> str:
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *safe])
