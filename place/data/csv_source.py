"""Source `csv`: any table with a column mapping, one row an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from place.config import PrepareConfig, RunError, UsageError
from place.data.identity import IdHasher, compute_split, describe_hash_split, read_salt
from place.data.rows import Row, Table
from place.data.table import Label, build_labels, hash_file, read_table

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_MAX_VIEWS = 64


def open_csv(config: PrepareConfig) -> Table:
    """A table with a column mapping, one row an image.

    An image is known by its path: the second row of the same one is rejected as `duplicate_id`. A row without a study
    is a study of its own, and one without a patient has its study for a patient.
    Raises:
        UsageError: unknown column or field, no such image root.
        RunError: unreadable table, a patient in two official splits.
    Source: ours.
    """
    if not config.input:
        raise UsageError("source csv needs a table: say --input FILE")
    table = Path(config.input)
    frame = read_table(table, config.columns, config.label_columns)
    labels = build_labels(frame, config.label_columns)
    root = Path(config.image_root) if config.image_root else table.parent
    if not root.is_dir():
        raise UsageError(f"image root {root}: no such folder; give --image-root the folder that image paths start from")
    ids = IdHasher(read_salt(config.salt_file))
    notes = _fill_identities(frame)
    frame["split"], rule = _assign_splits(frame, config)
    _check_views(frame)
    content = ids.digest("input", f"{hash_file(table)}:{root.resolve()}").hex()
    return Table(CsvRows(frame, str(root), labels, ids), [label.name for label in labels], rule, notes, content)


class CsvRows:
    """Rows of a table; ids are hashed when a slice is taken, so that no raw one reaches a task."""

    def __init__(self, frame: pd.DataFrame, root: str, labels: list[Label], ids: IdHasher):
        self.frame, self.root, self.labels, self.ids = frame, root, labels, ids

    def __len__(self) -> int:
        return len(self.frame)

    def __iter__(self) -> Iterator[Row]:
        return iter(self[:])

    def __getitem__(self, where: slice) -> list[Row]:
        begin = where.indices(len(self))[0]
        records = self.frame.iloc[where].to_dict("records")
        return [self._build_row(begin + at, record) for at, record in enumerate(records)]

    def _build_row(self, number: int, cells: dict[Any, Any]) -> Row:
        sections = tuple((name, cells[name]) for name in ("findings", "impression", "text") if cells.get(name))
        return Row(
            number=number,
            sample_id=self.ids.number("image", cells["identity"]),
            patient=self.ids.code("patient", cells["patient"]),
            study=self.ids.code("study", cells["study"]),
            split=cells["split"],
            image=os.path.join(self.root, cells["image"]) if cells["image"] else "",
            sections=sections,
            view=" ".join(cells.get("view", "").upper().split()),
            labels={label.name: label.read(cells[f"label:{label.column}"]) for label in self.labels},
            reject="duplicate_id" if cells["duplicate"] else "",
        )


def _fill_identities(frame: pd.DataFrame) -> list[str]:
    """Give every row an identity, a patient and a study; say where they had to be made up."""
    paths = frame["image"].map(lambda path: os.path.normpath(path) if path else "")
    rows = pd.Series([f"row {number}" for number in range(len(frame))], index=frame.index)
    frame["identity"] = paths.where(paths != "", rows)
    frame["duplicate"] = frame["identity"].duplicated()
    notes = _fill_field(frame, "study", "image " + frame["identity"], "each image is a study of its own")
    alone = "each study is a patient of its own, so one person may be in two splits"
    notes += _fill_field(frame, "patient", "study " + frame["study"], alone)
    # Studies are often numbered within a patient.
    frame["study"] = frame["patient"] + "/" + frame["study"]
    return notes


def _fill_field(frame: pd.DataFrame, field: str, fallback: pd.Series, meaning: str) -> list[str]:
    if field not in frame:
        frame[field] = fallback
        return [f"no {field} column: {meaning}"]
    missing = frame[field] == ""
    frame[field] = frame[field].where(~missing, fallback)
    return [f"{int(missing.sum())} rows without a {field}: {meaning}"] if missing.any() else []


def _assign_splits(frame: pd.DataFrame, config: PrepareConfig) -> tuple[pd.Series, str]:
    """Official split where the patient has one, else by the hash of the patient."""
    hashed = describe_hash_split(config.seed, config.split)
    by_hash = {patient: compute_split(patient, config.seed, config.split) for patient in frame["patient"].unique()}
    if "split" not in frame:
        return frame["patient"].map(by_hash), hashed
    official = frame["split"].str.lower().map(lambda name: _SPLIT_NAMES.get(name) if name else "")
    if official.isna().any():
        unknown = sorted(set(frame["split"][official.isna()]))[:5]
        raise UsageError(
            f"split column holds {', '.join(map(repr, unknown))}; expected train, val (valid, validate) or test"
        )
    given = official[official != ""]
    by_patient = dict(zip(frame["patient"][given.index], given))
    _check_one_split(frame, given)
    rule = "as the split column says" + (f", patients without a split {hashed}" if (official == "").any() else "")
    return frame["patient"].map(lambda patient: by_patient.get(patient) or by_hash[patient]), rule


def _check_one_split(frame: pd.DataFrame, given: pd.Series) -> None:
    first = given.groupby(frame["patient"][given.index]).transform("first")
    if (first != given).any():
        row = int((first != given).idxmax())
        other = int((frame["patient"][given.index] == frame["patient"][row]).idxmax())
        raise RunError(
            f"rows {other} and {row} are of one patient, but one is in {given[other]} and one in {given[row]}: "
            "put each patient into one split, or leave out --column split"
        )


def _check_views(frame: pd.DataFrame) -> None:
    views = frame["view"].nunique() if "view" in frame else 0
    if views > _MAX_VIEWS:
        raise UsageError(f"the view column has {views} different values; expected a few such as AP, PA, LATERAL")
