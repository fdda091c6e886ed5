"""The Parquet tables of a prepared data set: a row a kept image, and a row a rejected one."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("patient", pa.string(), nullable=False),
        pa.field("study", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("view", pa.string(), nullable=False),
        pa.field("laterality", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("photometric", pa.string(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("source_height_px", pa.int32(), nullable=False),
        pa.field("source_width_px", pa.int32(), nullable=False),
        pa.field("spacing_y_mm", pa.float64()),
        pa.field("spacing_x_mm", pa.float64()),
        pa.field("num_words", pa.int32(), nullable=False),
        pa.field("report_group", pa.int64(), nullable=False),
        pa.field("sentences", pa.list_(pa.struct([("section", pa.string()), ("text", pa.string())])), nullable=False),
        pa.field("labels", pa.string(), nullable=False),
        pa.field("boxes", pa.string(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
    ]
)
"""Sizes and spacing are of the stored image, but for `source_*`; `row` counts the input's rows from 0; `labels` and
`boxes` are JSON, as in the shards."""

REJECTED = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def write_table(path: Path, records: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write records as one Parquet file, in one go, so that a full disk shows as a plain OSError."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), buffer, compression="zstd")
    path.write_bytes(buffer.getbuffer())


def concat_tables(parts: Iterable[Path], path: Path, schema: pa.Schema) -> None:
    """Join Parquet files, a row group each, without holding more than one of them; the result appears by rename.

    Source: ours.
    """
    draft = path.with_name(path.name + ".partial")
    with draft.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            table = pq.read_table(part, schema=schema)
            if table.num_rows:
                writer.write_table(table)
    os.replace(draft, path)


def read_batches(path: Path, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Some columns of a table, a row group at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            yield batch.to_pydict()


def write_json(path: Path, tree: Any) -> None:
    """Write JSON with sorted keys; it appears by rename."""
    write_text(path, json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text; it appears by rename."""
    draft = path.with_name(path.name + ".partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
