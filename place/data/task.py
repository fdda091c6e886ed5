"""One task of `place prepare`: some hundred rows become one finished part, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from place.config import PrepareConfig, RunError
from place.data.burned_in import has_burned_in_text
from place.data.consistency import find_contradiction
from place.data.identity import SPLITS
from place.data.images import (
    GreyImage,
    ImageInfo,
    Rejected,
    decode_image,
    encode_grey_jpeg,
    is_there,
    read_file,
    shrink_image,
)
from place.data.manifest import MANIFEST, REJECTED, pack_table, read_json, write_json
from place.data.masks import MASKS, store_mask
from place.data.ms_cxr import ASPECT_TOLERANCE
from place.data.privacy import has_name
from place.data.report import count_words, hash_near, hash_text, split_sentences
from place.data.report_files import read_report
from place.data.rows import Row
from place.data.sections import split_sections
from place.data.shards import PartWriter, publish_shards
from place.data.storage import Store, open_store
from place.data.views import check_view, resolve_views

MAX_REPORT_CHARS = 100_000
PARTS = ".parts"
"""Folder of what is not merged yet."""
_READERS = 16


class Task(NamedTuple):
    """What a worker gets: nothing in it is secret but image paths."""

    number: int
    rows: Iterable[Row]
    output: str
    config: PrepareConfig


class PartResult(NamedTuple):
    """What a finished part says of itself; sums are whole numbers, so that their order does not matter."""

    number: int
    rows: int
    reasons: dict[str, int]
    pixels: tuple[int, int, int]
    """Number, sum and sum of squares of the stored training pixels."""
    labels: dict[str, list[int]]
    """Positive, negative, uncertain, unknown of each label, over the kept images."""
    warnings: dict[str, int]
    """Kept images that have each warning."""


def add_results(left: PartResult, right: PartResult) -> PartResult:
    """What two parts, or sums of parts, say together; their order does not matter. Source: ours."""
    labels = {
        name: [a + b for a, b in zip(left.labels.get(name, [0] * 4), right.labels.get(name, [0] * 4))]
        for name in sorted({*left.labels, *right.labels})
    }
    a, b, c = (x + y for x, y in zip(left.pixels, right.pixels))
    reasons = dict(Counter(left.reasons) + Counter(right.reasons))
    warnings = dict(Counter(left.warnings) + Counter(right.warnings))
    return PartResult(-1, left.rows + right.rows, reasons, (a, b, c), labels, warnings)


NOTHING = PartResult(-1, 0, {}, (0, 0, 0), {}, {})
"""The sum of no parts."""


class Sample(NamedTuple):
    """A kept row: what goes into the shard, what into the manifest, the stored picture (Y, X) before encoding, and the
    rows of its masks."""

    stored: dict[str, Any]
    record: dict[str, Any]
    image_YX: GreyImage
    masks: list[dict[str, Any]]


class Part(NamedTuple):
    """A finished part: its result, the entries of its shards for each split's index, the size of each of its tables."""

    result: PartResult
    shards: dict[str, list[dict[str, Any]]]
    tables: dict[str, int]


class Tables(NamedTuple):
    """Rows of a part: of the manifest, of the rejected ones and of the masks."""

    kept: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    masks: list[dict[str, Any]]


def run_task(task: Task) -> PartResult:
    """Turn the rows of a task into a finished part; one that is there already is left alone.

    Shards and tables come first and the part's record last, each whole or not at all and with the same bytes every
    time: a part that was broken off is written again over its own remains.
    Source: ours.
    """
    store = open_store(task.output)
    if part := read_part(store, task.number):
        return part.result
    with store.stage(_name(task.number)) as folder:
        result, tables = _build_part(task, folder)
        samples = Counter(record["split"] for record in tables.kept)
        shards = {split: publish_shards(folder, split, task.number, samples[split], store) for split in SPLITS}
    packed = {"manifest": pack_table(tables.kept, MANIFEST), "rejected": pack_table(tables.rejected, REJECTED)}
    if tables.masks:
        packed["masks"] = pack_table(tables.masks, MASKS)
    for name, data in packed.items():
        store.write(name_table(task.number, name), data)
    sizes = {name: len(data) for name, data in packed.items()}
    write_json(store, f"{_name(task.number)}.json", {"result": result._asdict(), "shards": shards, "tables": sizes})
    return result


def _name(number: int) -> str:
    return f"{PARTS}/{number:05}"


def name_table(number: int, table: str) -> str:
    """Where a finished part keeps its rows of the manifest, its rejected ones, or its masks, if it has any."""
    return f"{_name(number)}.{table}.parquet"


def read_part(store: Store, number: int) -> Part | None:
    """What a finished part wrote of itself; None where it has not, or where not all of its files are whole."""
    try:
        record = read_json(store, f"{_name(number)}.json")
        part = Part(PartResult(**record["result"]), record["shards"], record["tables"])
    except (FileNotFoundError, ValueError, KeyError):  # emptied by a power loss, or of an earlier version
        return None
    sizes = {name_table(number, name): size for name, size in part.tables.items()}
    for split, infos in part.shards.items():
        sizes |= {f"{split}/{info['zip_data']['basename']}": info["zip_data"]["bytes"] for info in infos}
    return part if all(store.size(name) == size for name, size in sizes.items()) else None


def read_parts(store: Store, numbers: Iterable[int]) -> dict[int, Part]:
    """Those of the parts that are finished and whole, in order."""
    numbers = sorted(numbers)
    with ThreadPoolExecutor(_READERS) as pool:  # each waits for some answers of the storage
        parts = pool.map(partial(read_part, store), numbers)
        return {number: part for number, part in zip(numbers, parts) if part}


def list_parts(store: Store) -> list[int]:
    """Numbers of the parts that seem to be finished; a shared file system may not list the last ones yet."""
    stems = (name.removesuffix(".json") for name in store.list_files(PARTS) if name.endswith(".json"))
    return [int(stem) for stem in stems if stem.isdigit()]


def _build_part(task: Task, folder: Path) -> tuple[PartResult, Tables]:
    """Write the shards of a part, and return what else it is."""
    kept: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    pixels = [0, 0, 0]
    labels: dict[str, list[int]] = {}
    with PartWriter(folder, task.config.shard_mib) as writer:
        for row in task.rows:
            try:
                sample = read_sample(row, task.config)
            except Rejected as drop:
                rejected.append(
                    dict(zip(REJECTED.names, (row.number, row.sample_id, drop.reason, drop.detail, row.split)))
                )
                continue
            except OSError as error:
                raise RunError(
                    f"row {row.number} of the input cannot be read now ({error.strerror or error}): put that right and "
                    "run the same command again, finished parts stay"
                ) from None
            writer.write(row.split, sample.stored)
            kept.append(sample.record)
            masks += sample.masks
            _count_labels(labels, row.labels)
            if row.split == "train":
                pixels = [total + more for total, more in zip(pixels, _sum_pixels(sample.image_YX))]
    reasons = dict(Counter(item["reason"] for item in rejected))
    warnings = dict(Counter(warning for record in kept for warning in record["warnings"]))
    rows = len(kept) + len(rejected)
    result = PartResult(task.number, rows, reasons, (pixels[0], pixels[1], pixels[2]), labels, warnings)
    return result, Tables(kept, rejected, masks)


def read_sample(row: Row, config: PrepareConfig) -> Sample:
    """Read, check and shrink what a row names. Raises Rejected, with the reason. Source: ours."""
    if row.reject:
        raise Rejected(row.reject)
    kept_views = resolve_views(config)
    if row.view:
        check_view(row.view, kept_views)
    written, is_left_out = _read_written(row, config.min_words)
    sentences = lower_sentences(written) if config.case == "lower" else written
    data = row.image if isinstance(row.image, bytes) else read_file(row.image)
    source_YX, info = decode_image(data)
    view = row.view or info.view
    check_view(view, kept_views)
    image_YX = shrink_image(source_YX, config.size_px)
    scale = image_YX.shape[0] / source_YX.shape[0], image_YX.shape[1] / source_YX.shape[1]
    stored = {
        "image": encode_grey_jpeg(image_YX, config.jpeg_quality),
        "sentences": sentences,
        "labels": row.labels,
        "view": view,
        "sample_id": row.sample_id,
        "study_id": int(row.study, 16) >> 1 or 1,
        "report_group": hash_text(" ".join(item["text"] for item in sentences)),
        "boxes": [_scale_box(box, source_YX.shape, scale) for box in row.boxes],
    }
    record = _build_record(row, stored, info, source_YX.shape, image_YX.shape)
    record["warnings"] = ["report_left_out"] * is_left_out + list(_find_warnings(written, info, source_YX))
    masks = [
        {
            "sample_id": row.sample_id,
            "split": row.split,
            "finding": mask.finding,
            "box": mask.box,
            "mask": store_mask(mask, source_YX.shape, image_YX.shape),
        }
        for mask in row.masks
        if not isinstance(mask.png, str) or is_there(mask.png)
    ]
    return Sample(stored, {**record, "source_sha256": hashlib.sha256(data).hexdigest()}, image_YX, masks)


def _read_written(row: Row, min_words: int) -> tuple[list[dict[str, str]], bool]:
    """Sentences of a row's report, and whether a faulty one is left out.

    Phrases that come with their boxes do without a report: where none is asked for, its faults do not cost them.
    """
    try:
        sections = (*row.sections, *(read_report(row.report_path) if row.report_path else ()))
        return read_sentences(sections, min_words), False
    except Rejected:
        if min_words or not any(box.get("phrase") for box in row.boxes):
            raise
        return [], True


def _build_record(
    row: Row, stored: dict[str, Any], info: ImageInfo, source: tuple[int, ...], shape: tuple[int, ...]
) -> dict[str, Any]:
    spacing = info.spacing_mm or (None, None)
    return {
        **{name: stored[name] for name in ("sample_id", "study_id", "view", "report_group", "sentences")},
        "row": row.number,
        "patient": row.patient,
        "study": row.study,
        "split": row.split,
        "laterality": info.laterality,
        "modality": info.modality,
        "photometric": info.photometric,
        "height_px": shape[0],
        "width_px": shape[1],
        "source_height_px": source[0],
        "source_width_px": source[1],
        "spacing_y_mm": spacing[0] and spacing[0] * source[0] / shape[0],
        "spacing_x_mm": spacing[1] and spacing[1] * source[1] / shape[1],
        "near_group": hash_near(item["text"] for item in stored["sentences"]),
        "num_words": sum(count_words(item["text"]) for item in stored["sentences"]),
        "labels": json.dumps(stored["labels"], ensure_ascii=False),
        "boxes": json.dumps(stored["boxes"]),
    }


def read_sentences(sections: Iterable[tuple[str, str]], min_words: int) -> list[dict[str, str]]:
    """Sentences of a report with their section.

    Raises Rejected: `long_report`, `empty_report`, `short_report`, `contradictory_report`. Source: ours.
    """
    sections = list(sections)
    if sum(len(text) for _, text in sections) > MAX_REPORT_CHARS:
        raise Rejected("long_report", f"more than {MAX_REPORT_CHARS} characters: no report of one study")
    cut = [pair for name, text in sections for pair in (split_sections(text) if name == "text" else [(name, text)])]
    sentences = [{"section": name, "text": sentence} for name, text in cut for sentence in split_sentences(text)]
    words = sum(count_words(item["text"]) for item in sentences)
    if not words and min_words:
        raise Rejected("empty_report")
    if words < min_words:
        raise Rejected("short_report", f"{words} words, at least {min_words} wanted")
    torn = find_contradiction((item["section"], item["text"]) for item in sentences)
    if torn:
        raise Rejected("contradictory_report", f"one of findings and impression has {torn}, the other has none")
    return sentences


def lower_sentences(sentences: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same in small letters."""
    return [{**item, "text": item["text"].lower()} for item in sentences]


def _find_warnings(sentences: list[dict[str, str]], info: ImageInfo, image_YX: GreyImage) -> Iterator[str]:
    if info.is_annotated:
        yield "burned_in_annotation"
    if has_burned_in_text(image_YX):
        yield "text_in_picture"
    if any(has_name(item["text"]) for item in sentences):
        yield "name_in_report"


def _scale_box(box: dict[str, Any], source: tuple[int, ...], scale: tuple[float, float]) -> dict[str, Any]:
    """A box in the pixels of the stored image; `drawn_on` (width, height) says what it was drawn on, else the source.

    Raises Rejected: `box_frame`, it was drawn on an image of another shape.
    """
    x0, y0, x1, y1 = box["box_xyxy"]
    height, width = source
    drawn_width, drawn_height = box.get("drawn_on", (width, height))
    if abs(drawn_width * height / (drawn_height * width) - 1) > ASPECT_TOLERANCE:
        raise Rejected(
            "box_frame", f"boxes are of {drawn_width:g} x {drawn_height:g} px, the image has {width} x {height}"
        )
    scale_x, scale_y = scale[1] * width / drawn_width, scale[0] * height / drawn_height
    kept = {name: value for name, value in box.items() if name != "drawn_on"}
    return {**kept, "box_xyxy": [x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y]}


def _count_labels(counts: dict[str, list[int]], labels: dict[str, int | None]) -> None:
    for name, value in labels.items():
        counts.setdefault(name, [0, 0, 0, 0])[{1: 0, 0: 1, -1: 2, None: 3}[value]] += 1


def _sum_pixels(image_YX: GreyImage) -> tuple[int, int, int]:
    values = image_YX.astype(np.int64)
    return values.size, int(values.sum()), int((values * values).sum())
