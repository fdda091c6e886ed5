"""Reads a csv, tsv or parquet table as text, and checks what a user says of its columns."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import compute, csv
from pyarrow import parquet as pq

from place.config import RunError, UsageError
from place.data.spill import map_from_disk

FIELDS = ("image", "text", "findings", "impression", "patient", "study", "view", "split")
REPORT_FIELDS = ("accession", "study", "text", "findings", "impression", "patient", "split")
TEXT = pd.StringDtype("pyarrow", na_value=np.nan)
_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_MAX_CLASSES = 64
_BLOCK_BYTES = 2 << 20
"""Read at once; no line may be longer."""
_SIGNS = {
    "1": 1,
    "0": 0,
    "-1": -1,
    "1.0": 1,
    "0.0": 0,
    "-1.0": -1,
    "True": 1,
    "False": 0,
    "true": 1,
    "false": 0,
    "TRUE": 1,
    "FALSE": 0,
    "": None,
}


class Label(NamedTuple):
    """A label of the data set: a column of signs, or one text class of a column."""

    name: str
    column: str
    value: str | None

    def read(self, cell: str) -> int | None:
        """1 positive, 0 negative, -1 uncertain, None unknown."""
        if self.value is None:
            return _SIGNS[cell]
        return None if not cell else int(cell == self.value)


def read_table(
    path: Path, columns: dict[str, str], label_columns: Iterable[str], separator: str | None = None
) -> pd.DataFrame:
    """The mapped columns under our field names, and the label columns under `label:NAME`, all as stripped text.

    Args:
        path: csv, tsv (also .gz) or parquet.
        columns: our field to the table's column.
        label_columns: columns with labels.
        separator: between cells; none takes a tab in .tsv, else a comma.
    Returns:
        A table whose text is held by Arrow, not as Python objects.
    Raises:
        UsageError: no such file, unknown kind or column.
        RunError: the file is not what its name says, or has no rows.
    Source: ours.
    """
    if not path.is_file():
        raise UsageError(f"table {path}: no such file; give the path of a csv, tsv or parquet table")
    if not path.name.endswith(_SUFFIXES):
        raise UsageError(f"table {path.name}: unknown kind; expected a name that ends in {', '.join(_SUFFIXES)}")
    wanted = {**columns, **{f"label:{name}": name for name in label_columns}}
    present = read_header(path, separator)
    for column in wanted.values():
        check_column(column, present)
    with _reading(path):
        frame = _read_cells(path, sorted(set(wanted.values())), separator)
    if frame.empty:
        raise RunError(f"table {path.name}: has a header but no rows")
    return pd.DataFrame({field: frame[column] for field, column in wanted.items()})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"table {path.name}: cannot be read ({_describe_fault(error)}); write or download it again"
        ) from None


def _describe_fault(error: Exception) -> str:
    """The first words of an error, without the cells that pyarrow quotes in it."""
    lines = str(error).splitlines() or ["no reason given"]
    return re.split(r"(?<=got \d)|(?<=got \d\d)", lines[0])[0]


def check_fields(columns: dict[str, str], with_reports: bool = True) -> None:
    """Refuse a mapping of a table of images that names unknown fields, or lacks one. Raises UsageError."""
    _check_known(columns, FIELDS)
    if "image" not in columns:
        raise UsageError("no column for the image: say --column image=NAME")
    if with_reports or {"text", "findings", "impression"} & columns.keys():
        _check_report(columns)


def check_report_fields(columns: dict[str, str]) -> None:
    """Refuse a mapping of a table of reports that names unknown fields, or lacks one. Raises UsageError."""
    _check_known(columns, REPORT_FIELDS)
    _check_report(columns)


def _check_known(columns: dict[str, str], fields: tuple[str, ...]) -> None:
    for field in columns:
        if field not in fields:
            raise UsageError(
                f"unknown field '{field}' in --column{_nearest(field, fields)}; fields are {', '.join(fields)}"
            )


def _check_report(columns: dict[str, str]) -> None:
    sections = {"findings", "impression"} & columns.keys()
    if not sections and "text" not in columns:
        raise UsageError(
            "no column for the report: say --column text=NAME, or findings=NAME and impression=NAME; "
            "or --min-words 0 for images without reports"
        )
    if sections and "text" in columns:
        raise UsageError(
            f"both text and {' and '.join(sorted(sections))} are mapped: a report is one text or its sections"
        )


def find_column(names: Iterable[str], present: list[str]) -> str | None:
    """The first column that is called so, whatever its case, spaces and underscores."""
    return next((column for name in names for column in present if _squeeze(column) == _squeeze(name)), None)


def _squeeze(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def check_column(column: str, present: list[str], table: str = "the table") -> None:
    """Refuse a column that a table does not have. Raises UsageError, with the nearest name."""
    if column not in present:
        raise UsageError(f"unknown column '{column}'{_nearest(column, present)}; {table} has {', '.join(present)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), [item.lower() for item in known], n=1, cutoff=0.4)
    spelled = [item for item in known if near and item.lower() == near[0]]
    return f" (did you mean '{spelled[0]}'?)" if spelled else ""


def read_header(path: Path, separator: str | None = None) -> list[str]:
    """Names of a table's columns. Raises RunError for a file that is not what its name says."""
    with _reading(path):
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        return list(csv.open_csv(path, parse_options=_parse_options(path, separator)).schema.names)


def _read_cells(path: Path, columns: list[str], separator: str | None) -> pd.DataFrame:
    schema = pa.schema([(name, pa.large_string()) for name in columns])
    cells = _read_parquet(path, columns) if path.suffix == ".parquet" else _read_csv(path, columns, separator)
    table = map_from_disk((pa.record_batch(arrays, schema=schema) for arrays in cells), schema)
    return table.to_pandas(types_mapper={pa.large_string(): TEXT}.get)


def _read_csv(path: Path, columns: list[str], separator: str | None) -> Iterator[list[pa.Array]]:
    # pyarrow refuses a line with too many or too few fields, where pandas would cut or fill it without a word.
    convert = csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.large_string()), include_columns=columns)
    read = csv.ReadOptions(block_size=_BLOCK_BYTES)
    with csv.open_csv(path, read, _parse_options(path, separator), convert) as batches:
        for batch in batches:
            yield [compute.utf8_trim_whitespace(batch[name]) for name in columns]


def _read_parquet(path: Path, columns: list[str]) -> Iterator[list[pa.Array]]:
    with pq.ParquetFile(path) as file:
        for name in columns:
            _check_kind(path, name, file.schema_arrow.field(name).type)
        for batch in file.iter_batches(columns=columns):
            frame = batch.to_pandas(integer_object_nulls=True)
            yield [pa.array(frame[name].map(_to_text), pa.large_string()) for name in columns]


def _check_kind(path: Path, column: str, kind: pa.DataType) -> None:
    if pa.types.is_nested(kind):
        raise UsageError(
            f"table {path.name}: column '{column}' holds a {str(kind).split('<')[0]} in each cell; "
            "expected text, make it a column of strings"
        )


def _parse_options(path: Path, separator: str | None) -> csv.ParseOptions:
    delimiter = separator or ("\t" if ".tsv" in path.suffixes else ",")
    return csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


def _to_text(cell: object) -> str:
    if cell is None or cell is pd.NaT or cell is pd.NA or cell != cell:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # a whole number that a gap in its column made a float
    if isinstance(cell, bytes):
        return cell.decode().strip()
    return str(cell).strip()


def build_labels(frame: pd.DataFrame, label_columns: Iterable[str]) -> list[Label]:
    """Find out what each label column holds.

    Returns:
        One label for a column of 1, 0, -1 and empty cells; one `column=value` for each class of a column of text.
    Raises:
        UsageError: numbers that are no signs, or so many classes that the column must be something else.
    Source: ours.
    """
    labels: list[Label] = []
    for column in label_columns:
        values = sorted(set(frame[f"label:{column}"]) - {""})
        if all(value in _SIGNS for value in values):
            labels.append(Label(column, column, None))
        elif len(values) > _MAX_CLASSES:
            raise UsageError(
                f"label column '{column}' has {len(values)} classes, at most {_MAX_CLASSES} are taken: "
                "is it an identifier or free text?"
            )
        elif any(_is_number(value) for value in values):
            raise UsageError(
                f"label column '{column}' has numbers other than 1, 0 and -1; expected those, or text classes"
            )
        else:
            labels += [Label(f"{column}={value}", column, value) for value in values]
    return labels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
