"""The Parquet tables of a prepared data set: a row a kept image, and a row a rejected one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from place.config import RunError
from place.data.storage import Store, open_store

MANIFEST_FILE, REJECTED_FILE = "manifest.parquet", "rejected.parquet"
HASHES_FILE = "hashes.parquet"
"""Perceptual hashes, written when they are first asked for."""

MANIFEST = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("patient", pa.string(), nullable=False),
        pa.field("study", pa.string(), nullable=False),
        pa.field("study_id", pa.int64(), nullable=False),
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
        pa.field("near_group", pa.int64(), nullable=False),
        pa.field("sentences", pa.list_(pa.struct([("section", pa.string()), ("text", pa.string())])), nullable=False),
        pa.field("labels", pa.string(), nullable=False),
        pa.field("boxes", pa.string(), nullable=False),
        pa.field("warnings", pa.list_(pa.string()), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
    ]
)
"""Sizes and spacing are of the stored image, but for `source_*`; `row` counts the input's rows from 0; `labels` and
`boxes` are JSON, as in the shards; `study_id` is the number that shards give a study; rows of one `report_group`
have the same report, those of one `near_group` nearly the same."""

REJECTED = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("split", pa.string()),
    ]
)
"""`split` is none where an earlier version rejected the row."""


def pack_table(records: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Records as the bytes of one Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def concat_tables(store: Store, parts: Iterable[str], name: str, schema: pa.Schema) -> int:
    """Join Parquet files, a row group each, without holding more than one of them.

    Returns:
        How many rows they have.
    Raises:
        RunError: one is damaged.
    Source: ours.
    """
    rows = 0
    with store.create(name) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            table = _read_part(store, part, schema)
            rows += table.num_rows
            if table.num_rows:
                writer.write_table(table)
    return rows


def _read_part(store: Store, part: str, schema: pa.Schema) -> pa.Table:
    data = store.read(part)
    try:
        return pq.read_table(io.BytesIO(data), schema=schema)
    except pa.ArrowException:
        raise RunError(
            f"{store}/{part} is damaged: delete that file and run the same command again, finished parts stay"
        ) from None


def read_batches(store: Store, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table, at most a row group at a time. Raises RunError where it is missing or damaged."""
    with _open_whole(store, name) as file, pq.ParquetFile(file) as table:
        yield from table.iter_batches(columns=columns)


def read_manifest(data_dir: str | Path, columns: list[str], split: str | None = None) -> pa.Table:
    """Some columns of the manifest, of a split or of all. Raises RunError where it is missing or damaged."""
    return read_columns(data_dir, MANIFEST_FILE, columns, None if split is None else ("split", "==", split))


def read_columns(
    data_dir: str | Path, name: str, columns: list[str] | None = None, where: tuple[str, str, Any] | None = None
) -> pa.Table:
    """Columns of a table of a data set, or all, of the rows that fit. Raises RunError where it is missing or damaged.

    Args:
        where: column, comparison and value, as pyarrow filters; none takes all rows.
    """
    with _open_whole(open_store(data_dir), name) as file:
        return pq.read_table(file, columns=columns, filters=where and [where])


@contextmanager
def _open_whole(store: Store, name: str) -> Iterator[IO[bytes]]:
    """A table to read in, whose damage is told in one line."""
    try:
        with store.open(name) as file:
            yield file
    except FileNotFoundError:
        raise RunError(f"{store}/{name} is missing; prepare the data set again, into a new folder") from None
    except (OSError, pa.ArrowException) as error:
        told = (str(error).splitlines() or ["no reason given"])[0]
        raise RunError(
            f"{store}/{name} cannot be read ({told}); prepare the data set again, into a new folder"
        ) from None


def read_json(store: Store, name: str) -> Any:
    """A JSON file's content. Raises FileNotFoundError."""
    return json.loads(store.read(name))


def write_json(store: Store, name: str, tree: Any) -> None:
    """Write JSON with sorted keys."""
    write_text(store, name, json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(store: Store, name: str, text: str) -> None:
    """Write text."""
    store.write(name, text.encode())
