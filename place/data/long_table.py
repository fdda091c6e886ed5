"""Reads the tables that a layout names, of any format, into one table of text: a row a line, or an annotation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pycocotools import mask as coco

from place.config import RunError, UsageError
from place.data.layout import PLACEHOLDER, TableFile
from place.data.shapes import write_runs
from place.data.table import TEXT, check_column, read_header, read_table

_COCO = ("file_name", "width", "height", "category", "x", "y", "w", "h", "polygons")


def read_long(root: Path, tables: Iterable[TableFile], columns: Iterable[str], optional: Iterable[str]) -> pd.DataFrame:
    """Columns of all tables, one below the other, as stripped text; and `folder` and `split` where they are no columns.

    Args:
        root: folder of the data set.
        columns: must be in every table.
        optional: empty text where a table has none.
    Raises:
        UsageError: a missing file or column.
        RunError: a file that is not what its name says, or has no rows.
    Source: ours.
    """
    frames = [_read_one(root, table, sorted({*columns}), sorted({*optional})) for table in tables]
    return pd.concat(frames, ignore_index=True)


def _read_one(root: Path, table: TableFile, columns: list[str], optional: list[str]) -> pd.DataFrame:
    path = root / table.file
    if not path.is_file():
        raise UsageError(f"{root} holds no {table.file}; --input is the folder of the data set, as its protocol says")
    given = {"folder": table.folder, "split": table.split or ""}
    if path.suffix == ".json":
        frame = _read_json(path, table)
    elif table.columns:
        frame = _read_bare(path, table)
    else:
        frame = _read_headed(path, table, {*columns, *optional})
    frame = frame.rename(columns=table.rename)
    for name in columns:
        if name not in given:
            check_column(name, list(frame.columns), path.name)
    filled = {name: frame[name] if name in frame else given.get(name, "") for name in (*columns, *optional)}
    place = {name: text for name, text in given.items() if text or name not in frame}
    return pd.DataFrame({**filled, **place}, index=frame.index, dtype=TEXT)


def _read_headed(path: Path, table: TableFile, wanted: set[str]) -> pd.DataFrame:
    present = read_header(path, table.separator)
    spelled = {name.strip(): name for name in present if table.rename.get(name.strip(), name.strip()) in wanted}
    if not spelled:
        check_column(sorted(wanted)[0], present, path.name)
    return read_table(path, spelled, (), table.separator)


def _read_bare(path: Path, table: TableFile) -> pd.DataFrame:
    separator = table.separator or ","
    try:
        rows = [line.split(separator) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise RunError(f"table {path.name}: cannot be read; download it again") from None
    for number, row in enumerate(rows):
        if len(row) != len(table.columns):
            expected = f"{len(table.columns)}: {', '.join(table.columns)}"
            raise RunError(f"table {path.name}, row {number}: {len(row)} cells, expected {expected}")
    return _build_frame(path, [dict(zip(table.columns, row)) for row in rows])


def _read_json(path: Path, table: TableFile) -> pd.DataFrame:
    try:
        tree = json.loads(path.read_text())
        records = list(_list_annotations(tree) if isinstance(tree, dict) else _unfold(tree, table.unfold))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"table {path.name}: neither a list of records nor COCO ({type(error).__name__} {error}); download it again"
        ) from None
    return _build_frame(path, records)


def _build_frame(path: Path, records: list[dict[str, Any]]) -> pd.DataFrame:
    if not records:
        raise RunError(f"table {path.name}: has no rows")
    names = list(dict.fromkeys(name for record in records for name in record))
    return pd.DataFrame({name: [_to_text(record.get(name)) for record in records] for name in names}, dtype=TEXT)


def _to_text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _list_annotations(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record an annotation of COCO, and one for an image without any."""
    categories = {item["id"]: item["name"] for item in tree["categories"]}
    found: dict[Any, list[dict[str, Any]]] = {}
    for item in tree["annotations"]:
        found.setdefault(item["image_id"], []).append(item)
    for image in tree["images"]:
        known = {"file_name": image["file_name"], "width": image.get("width"), "height": image.get("height")}
        if image["id"] not in found:
            yield dict.fromkeys(_COCO, "") | known
        for item in found.get(image["id"], []):
            x, y, w, h = item["bbox"]
            found_here = {"category": categories[item["category_id"]], "x": x, "y": y, "w": w, "h": h}
            yield known | found_here | {"polygons": _write_outlines(item)}


def _write_outlines(item: dict[str, Any]) -> str:
    """The segmentation of an annotation of COCO, as `parse_shapes` reads it."""
    drawn = item.get("segmentation")
    try:
        if isinstance(drawn, dict):
            return write_runs(_decode_rle(drawn))
        return ";".join("2 " + " ".join(str(float(number)) for number in corners) for corners in drawn or [])
    except (OverflowError, ValueError, KeyError, TypeError) as fault:
        told = f"segmentation of annotation {item.get('id')}: {type(fault).__name__} {fault}"
        raise ValueError(f"{told}; expected polygons, or RLE with counts and size") from None


def _decode_rle(rle: dict[str, Any]) -> NDArray[np.uint8]:
    counts, (height, width) = rle["counts"], rle["size"]
    short = f"counts of another size than {height} x {width} pixels"
    if isinstance(counts, list) and (min(counts, default=0) < 0 or sum(counts) != height * width):
        raise ValueError(short)
    packed = coco.frPyObjects(rle, height, width) if isinstance(counts, list) else rle
    mask_YX: NDArray[np.uint8] = coco.decode(packed)
    # Where compressed counts end too early, pycocotools leaves the rest of the mask as the memory was.
    if not counts or coco.area(packed) != mask_YX.sum():
        raise ValueError(short)
    return mask_YX


def _unfold(records: list[dict[str, Any]], lists: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A record for each place of the lists; one with empty cells where they are empty."""
    for record in records:
        if len({len(record[name]) for name in lists}) > 1:
            raise ValueError(f"lists {', '.join(lists)} of one record have different lengths")
        plain = {name: value for name, value in record.items() if name not in lists}
        places = list(zip(*(record[name] for name in lists), strict=True)) if lists else [()]
        yield from (plain | dict(_spread(zip(lists, place))) for place in places or [("",) * len(lists)])


def _spread(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, value in pairs:
        if isinstance(value, list):
            yield from ((f"{name}.{place}", part) for place, part in enumerate(value))
        else:
            yield name, value


def list_columns(*patterns: str | None) -> set[str]:
    """Columns that patterns name; `{stem}` is none."""
    return {name for pattern in patterns if pattern for name in PLACEHOLDER.findall(pattern)} - {"stem"}


def fill_pattern(pattern: str, frame: pd.DataFrame) -> pd.Series:
    """A pattern with each row's cells in place of the columns."""
    first, *parts = PLACEHOLDER.split(pattern)
    filled = pd.Series(first, index=frame.index, dtype=TEXT)
    for column, literal in zip(parts[::2], parts[1::2]):
        filled = filled + frame[column] + literal
    return filled
