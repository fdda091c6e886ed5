"""The data card: what is in a prepared data set, what was left out and why, as JSON and as a page to read."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import place
from place.config import PrepareConfig
from place.data.identity import SPLITS
from place.data.manifest import read_batches, write_json, write_text
from place.data.rows import Table
from place.data.task import PartResult

_LIBRARIES = ("pydicom", "pillow", "numpy", "pyarrow", "mosaicml-streaming")
_UNITS = ("images", "studies", "patients", "unique_reports")


def build_card(
    config: PrepareConfig, table: Table, results: list[PartResult], shard_hashes: list[str], manifest: Path
) -> dict[str, Any]:
    """Everything the card says, computed from the finished parts and the manifest. Source: ours."""
    counts = count_splits(manifest)
    kept = sum(counts[split]["images"] for split in SPLITS)
    mean, std = compute_intensity(results)
    return {
        "source": config.source,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "counts": {"input": len(table.rows), "kept": kept, "rejected": len(table.rows) - kept, **counts},
        "drop_reasons": _sum_counts(result.reasons for result in results),
        "labels": table.labels,
        "label_counts": _sum_labels(table.labels, results),
        "split_rule": table.split_rule,
        "notes": table.notes,
        "fingerprint": compute_fingerprint(shard_hashes, manifest),
        "image": {"size_px": config.size_px, "quality": config.jpeg_quality, "mean": mean, "std": std},
        "columns": dict(config.columns),
        "versions": {"place": place.__version__, **{name: version(name) for name in _LIBRARIES}},
    }


def count_splits(manifest: Path) -> dict[str, dict[str, int]]:
    """Images, studies, patients and unique reports of each split. Source: ours."""
    images: Counter[str] = Counter()
    unique: dict[str, dict[str, set[Any]]] = {split: {unit: set() for unit in _UNITS[1:]} for split in SPLITS}
    for batch in read_batches(manifest, ["split", "study", "patient", "report_group"]):
        images.update(batch["split"])
        for split, *values in zip(batch["split"], batch["study"], batch["patient"], batch["report_group"]):
            for unit, value in zip(_UNITS[1:], values):
                unique[split][unit].add(value)
    patients = [unique[split]["patients"] for split in SPLITS]
    assert sum(map(len, patients)) == len(set().union(*patients)), "a patient is in two splits"
    return {
        split: {"images": images[split], **{unit: len(found) for unit, found in unique[split].items()}}
        for split in SPLITS
    }


def compute_intensity(results: Iterable[PartResult]) -> tuple[float, float]:
    """Mean and standard deviation of the stored training pixels, as shares of full scale; 0.5 and 0.25 without any.

    The parts give whole-number sums, so the result is the same in any order.
    Source: ours.
    """
    number, total, squares = (sum(column) for column in zip(*(result.pixels for result in results)))
    if not number:
        return 0.5, 0.25
    variance = (squares * number - total * total) / number**2
    return total / number / 255, max(math.sqrt(variance), 1.0) / 255


def compute_fingerprint(shard_hashes: Iterable[str], manifest: Path) -> str:
    """SHA-256 over the sorted shard hashes and the manifest: another picture, report, split or order gives another.

    Source: ours.
    """
    digest = hashlib.sha256("\n".join(sorted(shard_hashes)).encode())
    with manifest.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _sum_labels(names: list[str], results: Iterable[PartResult]) -> dict[str, dict[str, int]]:
    total = {name: [0, 0, 0, 0] for name in names}
    for result in results:
        for name, more in result.labels.items():
            total[name] = [left + right for left, right in zip(total[name], more)]
    return {name: dict(zip(("positive", "negative", "uncertain", "unknown"), counts)) for name, counts in total.items()}


def write_card(output: Path, card: dict[str, Any]) -> None:
    """Write card.md, then card.json: its presence says that the data set is complete."""
    write_text(output / "card.md", format_card(card))
    write_json(output / "card.json", card)


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
