"""The data card: what is in a prepared data set, what was left out and why, as JSON and as a page to read."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import place
from place.config import PrepareConfig
from place.data.identity import SPLITS
from place.data.manifest import MANIFEST_FILE, REJECTED_FILE, read_batches, write_json, write_text
from place.data.masks import MASKS_FILE
from place.data.rows import Table
from place.data.storage import Store
from place.data.task import PartResult

_LIBRARIES = ("pydicom", "pillow", "numpy", "pyarrow", "mosaicml-streaming")
_UNITS = ("images", "studies", "patients", "unique_reports")
SIGNS = ("positive", "negative", "uncertain", "unknown")
_VALUES_A_TURN = 500_000
WARNINGS = {
    "report_left_out": "its report is missing, cannot be read or contradicts itself: its phrases are kept without it",
    "burned_in_annotation": "the DICOM header says that text is burned into the picture: look for names",
    "text_in_picture": "a line of bright text was found in the picture: look for names",
    "name_in_report": "the report holds what looks like a name, a number of a person or an address: de-identify it",
}
"""What an image may be warned of; the manifest lists the warnings of each."""


def build_card(
    config: PrepareConfig, table: Table, total: PartResult, shard_hashes: list[str], store: Store
) -> dict[str, Any]:
    """Everything the card says, computed from the sum of the finished parts and the manifest. Source: ours."""
    counts = count_splits(store, total.rows)
    kept = sum(counts[split]["images"] for split in SPLITS)
    mean, std = compute_intensity(total.pixels)
    none = [0, 0, 0, 0]
    wordless, boxes = _count_wordless_and_boxes(store)
    return {
        "source": config.source,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": {"input": len(table.rows), "kept": kept, "rejected": len(table.rows) - kept, **counts},
        "without_report": wordless,
        "boxes": boxes,
        "drop_reasons": total.reasons,
        "warnings": total.warnings,
        "labels": table.labels,
        "label_counts": {name: dict(zip(SIGNS, total.labels.get(name, none))) for name in table.labels},
        "split_rule": table.split_rule,
        "notes": table.notes,
        "fingerprint": compute_fingerprint(shard_hashes, store),
        # Tells another salt, and so patients that cannot be compared; it tells nothing of the salt itself.
        "salt_check": table.rows.ids.code("salt", "check"),
        "image": {"size_px": config.size_px, "quality": config.jpeg_quality, "mean": mean, "std": std},
        "columns": dict(config.columns),
        "versions": {"place": place.__version__, **{name: version(name) for name in _LIBRARIES}},
    }


def _count_wordless_and_boxes(store: Store) -> tuple[int, int]:
    """Kept images that have no report, and boxes on the kept images."""
    wordless = boxes = 0
    for batch in read_batches(store, MANIFEST_FILE, ["num_words", "boxes"]):
        wordless += batch["num_words"].to_pylist().count(0)
        boxes += sum(len(json.loads(cell)) for cell in batch["boxes"].to_pylist())
    return wordless, boxes


def count_splits(store: Store, rows: int) -> dict[str, dict[str, int]]:
    """Images, studies, patients and unique reports of each split.

    Args:
        rows: at least how many rows the manifest has.
    Source: ours.
    """
    counts = {split: dict.fromkeys(_UNITS, 0) for split in SPLITS}
    for batch in read_batches(store, MANIFEST_FILE, ["split"]):
        for split, images in Counter(batch["split"].to_pylist()).items():
            counts[split]["images"] += images
    for unit, column in zip(_UNITS[1:], ("study", "patient", "report_group")):
        for seen in count_in_turns(store, ["split", column], rows):
            for split, images in Counter(split for split, _ in seen).items():
                counts[split][unit] += images
            assert unit != "patients" or len({patient for _, patient in seen}) == len(seen), (
                "a patient is in two splits"
            )
    return counts


def count_in_turns(store: Store, columns: list[str], rows: int) -> Iterator[Counter[tuple[Any, ...]]]:
    """How often each combination of values is in the manifest, told in turns, each with those of another share.

    So the memory taken does not grow with the data set.
    Args:
        columns: the last one holds hashes, as numbers or hexadecimal digits; it deals the combinations out to turns.
        rows: at least how many rows the manifest has.
    Source: ours.
    """
    turns = 1 + rows // _VALUES_A_TURN
    for turn in range(turns):
        seen: Counter[tuple[Any, ...]] = Counter()
        for batch in read_batches(store, MANIFEST_FILE, columns):
            values = zip(*(batch[column].to_pylist() for column in columns))
            seen.update(value for value in values if turns == 1 or _turn_of(value[-1], turns) == turn)
        yield seen


def _turn_of(value: str | int, turns: int) -> int:
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
    _feed(digest, store, MANIFEST_FILE)
    return digest.hexdigest()


def write_card(store: Store, card: dict[str, Any]) -> dict[str, Any]:
    """Write card.md, then card.json: its presence says that the data set is complete.

    Returns:
        The card with `files`, the SHA-256 of each file that is neither a shard nor the card, and `digest`, its own.
    Source: ours.
    """
    names = [
        MANIFEST_FILE,
        REJECTED_FILE,
        *(f"{split}/index.json" for split in SPLITS if card["counts"][split]["images"]),
        *({MASKS_FILE} & {*store.list_top()}),
    ]
    card = {**card, "files": {name: hash_file(store, name) for name in names}}
    card["digest"] = compute_digest(card)
    write_text(store, "card.md", format_card(card))
    write_json(store, "card.json", card)
    return card


def compute_digest(card: dict[str, Any]) -> str:
    """SHA-256 over all that a card says, but the time it was made at. Source: ours."""
    said = {name: value for name, value in card.items() if name not in ("created", "digest")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def hash_file(store: Store, name: str) -> str:
    """SHA-256 of a file, hexadecimal. Raises FileNotFoundError."""
    digest = hashlib.sha256()
    _feed(digest, store, name)
    return digest.hexdigest()


def _feed(digest: Any, store: Store, name: str) -> None:
    with store.open(name) as file:
        while block := file.read(1 << 20):
            digest.update(block)


def format_card(card: dict[str, Any]) -> str:
    """The card as Markdown. Source: ours."""
    counts, image = card["counts"], card["image"]
    rows = [[split, *(f"{counts[split][unit]:,}" for unit in _UNITS)] for split in SPLITS]
    reasons = sorted(card["drop_reasons"].items(), key=lambda item: (-item[1], item[0]))
    dropped = [[reason, f"{count:,}"] for reason, count in reasons]
    found = card["label_counts"]
    labels = [[name, *(f"{found[name][sign]:,}" for sign in SIGNS)] for name in card["labels"]]
    warned = [[name, f"{count:,}", WARNINGS[name]] for name, count in sorted(card["warnings"].items())]
    parts = [
        "# Data card",
        f"Source `{card['source']}`, prepared {card['created']}: {counts['input']:,} rows in, {counts['kept']:,} kept, "
        f"{counts['rejected']:,} rejected.",
        "## Splits\n\n" + _format_table(["split", "images", "studies", "patients", "unique reports"], rows),
        f"Split {card['split_rule']}; no patient is in two splits."
        + "".join(f"\n\nNote: {note}." for note in card["notes"]),
        *([f"{card['boxes']:,} boxes are on the kept images."] if card.get("boxes") else []),
        "## Rejected rows\n\n" + (_format_table(["reason", "rows"], dropped) if dropped else "None."),
        *(["`rejected.parquet` has the row number and the reason of each."] if dropped else []),
        *(["## Warnings\n\n" + _format_table(["warning", "images", "what to do"], warned)] if warned else []),
        *(["## Labels\n\n" + _format_table(["label", *SIGNS], labels)] if labels else []),
        "## Images\n\n"
        + f"Grey JPEG, quality {image['quality']}, short side at most {image['size_px']} px. Training pixels: "
        f"mean {image['mean']:.4f}, standard deviation {image['std']:.4f} (of 1).",
        "## Identity\n\nPatients, studies and images carry keyed hashes in place of their ids, names and paths. "
        "Reports are stored as they came: what names they hold is still in them.",
        f"Fingerprint `{card['fingerprint']}`",
        "Made with " + ", ".join(f"{name} {number}" for name, number in sorted(card["versions"].items())) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _format_table(head: list[str], rows: list[list[str]]) -> str:
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *safe])
