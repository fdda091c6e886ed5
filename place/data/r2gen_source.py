"""Source `r2gen-json`: the annotation.json of R2Gen, for IU X-ray and for MIMIC-CXR."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from place.config import PrepareConfig, RunError, UsageError
from place.data.frame_rows import FrameRows, mark_mixed_studies, mark_rejects
from place.data.identity import IdHasher, read_salt
from place.data.official_split import assign_splits
from place.data.rows import Table
from place.data.table import TEXT, hash_file

_SPLITS = ("train", "val", "test")
_CHUNK, _AHEAD = 1 << 20, 1 << 12
_MARK = re.compile(r"[\s,]*(?:\{?\s*\"(?P<split>\w+)\"\s*:\s*\[|(?P<close>\])|(?P<end>\}\s*\Z))?\s*")
_COLUMNS = ("identity", "study", "patient", "split", "image", "findings")
_ADVICE = "put all entries of a patient under one of train, val, test"


def open_r2gen(config: PrepareConfig) -> Table:
    """{"train": [{"id", "report", "image_path": [...], "split"}], "val": ..., "test": ...}; a row an image.

    The MIMIC variant has `study_id` and `subject_id`; without them the entry is the study, and its patient the
    CXR<number> that an id of IU X-ray begins with, else the entry itself. The report is R2Gen's: findings. Images are
    looked for in --image-root, or in `images/` beside the annotation.
    Raises:
        UsageError: no annotation, no image folder.
        RunError: unreadable annotation, a patient in two splits.
    Source: the layout is R2Gen's; ours.
    """
    path, root = _find_files(config)
    frame = _read_frame(path)
    frame["number"] = range(len(frame))
    mark_rejects(frame, (frame["image"] != "") & frame["identity"].duplicated(), "duplicate_id")
    frame["split"], rule = assign_splits(frame, config, _ADVICE)
    mark_mixed_studies(frame)
    ids = IdHasher(read_salt(config.salt_file))
    content = ids.digest("input", f"{hash_file(path)}:{root.resolve()}").hex()
    notes = ["the annotation tells no view: lateral images are among them"]
    return Table(FrameRows(frame, [], ids, str(root)), [], rule, notes, content)


def _find_files(config: PrepareConfig) -> tuple[Path, Path]:
    if not config.input:
        raise UsageError("source r2gen-json needs an annotation: say --input annotation.json, or its folder")
    path = Path(config.input)
    path = path / "annotation.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --input is R2Gen's annotation.json or the folder that holds it")
    root = Path(config.image_root) if config.image_root else path.parent / "images"
    if not root.is_dir():
        raise UsageError(f"image root {root}: no such folder; give --image-root the folder that image paths start from")
    return path, root


def _read_frame(path: Path) -> pd.DataFrame:
    """Blocks of rows, joined; the file of MIMIC has hundreds of megabytes and is never all Python objects."""
    blocks, rows = [], []
    try:
        for split, entry in iterate_annotation(path):
            rows += _build_rows(split, entry)
            if len(rows) >= 8192:
                blocks.append(pd.DataFrame(rows, columns=_COLUMNS, dtype=TEXT))
                rows = []
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        fault = f"entry without {error}" if isinstance(error, KeyError) else "it is not R2Gen's layout"
        raise RunError(f"{path.name}: cannot be read ({fault})") from None
    if not (blocks or rows):
        raise RunError(f"{path.name}: has no entries under {', '.join(_SPLITS)}")
    return pd.concat([*blocks, pd.DataFrame(rows, columns=_COLUMNS, dtype=TEXT)], ignore_index=True)


def _build_rows(split: str, entry: dict[str, Any]) -> list[tuple[str, ...]]:
    name, report = str(entry["id"]), str(entry["report"] or "")
    study = str(entry.get("study_id", name))
    number = re.match(r"CXR\d+(?=_)", name)
    patient = str(entry.get("subject_id") or (number[0] if number else study))
    images = entry["image_path"]
    paths = [images] if isinstance(images, str) else [str(image) for image in images]
    return [(image or f"entry {name}", study, patient, split, image, report) for image in paths or [""]]


def iterate_annotation(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, entry) pairs, holding one entry and a piece of the file at a time. Raises ValueError. Source: ours."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text, at, split = "", 0, ""
        while True:
            if len(text) - at < _AHEAD:
                text, at = text[at:] + file.read(_CHUNK), 0
            mark = _MARK.match(text, at)
            at = mark.end() if mark else at
            if mark and mark["end"]:
                return
            if mark and mark["split"]:
                split = mark["split"]
            elif not mark or not mark["close"]:
                try:
                    entry, at = decoder.raw_decode(text, at)
                except json.JSONDecodeError:  # perhaps only cut off
                    more = file.read(_CHUNK)
                    if not more:
                        raise
                    text += more
                    continue
                yield split, entry
