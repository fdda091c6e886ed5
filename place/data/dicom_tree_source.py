"""Source `dicom-tree`: any folder of DICOM files, joined with a table of reports by accession number or study."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pandas as pd

from place.config import PrepareConfig, RunError, UsageError
from place.data.dicom import Identity, read_identity
from place.data.frame_rows import (
    MIXED,
    FrameRows,
    fill_field,
    mark_mixed_studies,
    mark_rejects,
    name_to_text,
    share_patients,
)
from place.data.identity import IdHasher, read_salt
from place.data.images import judge_error
from place.data.official_split import assign_splits
from place.data.pool import count_cores, map_in_processes
from place.data.rows import Table
from place.data.table import TEXT, build_labels, check_report_fields, find_column, hash_file, read_header, read_table
from place.data.walk import walk_files

_GUESSES = {
    "accession": ("AccessionNumber",),
    "study": ("StudyInstanceUID",),
    "findings": ("findings",),
    "impression": ("impression",),
    "text": ("report", "text", "report_text"),
    "patient": ("PatientID",),
    "split": ("split",),
}
_TABLES = ("reports.csv", "reports.csv.gz", "reports.tsv", "reports.tsv.gz", "reports.parquet")
_FILES_PER_SCAN = 512
_ADVICE = "put each patient into one split, or leave out the split column"
_ALONE = f"each study is a patient of its own, {MIXED}"


def open_dicom_tree(config: PrepareConfig) -> Table:
    """A row for each file below the input folder; its header names its study, the table the study's report.

    Reports are in `reports.csv` (tsv, parquet) in the input folder or in --reports; columns are mapped with --column
    (accession or study, text or findings and impression, split), or found by their names (AccessionNumber,
    StudyInstanceUID, report, findings, impression, split). Rejected: `not_dicom`; `no_report`; `duplicate_id`, the
    second file of an image; `patient_mismatch`, the images of a study, or its report, are of another patient;
    `report_mismatch`, a study has two different reports. An image without a patient has that of its study's others.
    Raises:
        UsageError: no folder, no table, no usable column.
        RunError: unreadable table, no file, a patient in two splits.
    Source: ours.
    """
    if not config.input or not Path(config.input).is_dir():
        raise UsageError(
            f"source dicom-tree needs a folder: --input {config.input or 'DIR'} is the root of DICOM files"
        )
    root = Path(config.input)
    table = _find_table(root, config)
    reports, keys = _read_reports(table, config)
    frame = _scan(root, table, config)
    notes = _join(frame, reports, keys)
    labels = build_labels(frame, config.label_columns)
    mark_rejects(frame, frame["identity"].duplicated(), "duplicate_id")
    notes += fill_field(frame, "study", "image " + frame["identity"], "each image is a study of its own")
    notes += share_patients(frame)
    mark_mixed_studies(frame)
    notes += fill_field(frame, "patient", "study " + frame["study"], _ALONE)
    frame["split"], rule = assign_splits(frame, config, _ADVICE)
    ids = IdHasher(read_salt(config.salt_file))
    files = hashlib.sha256("\n".join(frame["image"] + " " + frame["identity"]).encode()).hexdigest()
    content = ids.digest("input", f"{files}:{hash_file(table)}:{root.resolve()}").hex()
    rows = FrameRows(frame, labels, ids, str(root))
    return Table(rows, [label.name for label in labels], rule, notes, content)


def _find_table(root: Path, config: PrepareConfig) -> Path:
    if config.reports:
        return Path(config.reports)
    found = next((root / name for name in _TABLES if (root / name).is_file()), None)
    if found is None:
        raise UsageError(f"no reports: say --reports TABLE, or put one of {', '.join(_TABLES)} into {root}")
    return found


def _read_reports(path: Path, config: PrepareConfig) -> tuple[pd.DataFrame, list[str]]:
    """The reports and the columns that tell their study, the surer one first."""
    columns = dict(config.columns)
    if path.is_file():
        present = read_header(path)
        columns = {
            **{field: found for field, names in _GUESSES.items() if (found := find_column(names, present))},
            **columns,
        }
        if {"findings", "impression"} & columns.keys() and "text" not in config.columns:
            columns.pop("text", None)
    check_report_fields(columns)
    keys: list[str] = [key for key in ("study", "accession") if key in columns]
    if not keys:
        raise UsageError(
            "no column tells which study a report is of: say --column accession=NAME or study=NAME "
            "(the AccessionNumber or StudyInstanceUID of the DICOM files)"
        )
    return read_table(
        path, {name: column for name, column in columns.items() if name != "view"}, config.label_columns
    ), keys


def _scan(root: Path, table: Path, config: PrepareConfig) -> pd.DataFrame:
    """The identity of every file, read from its header alone, in the order of the paths."""
    names = _walk(root, table)
    jobs = enumerate(iter(lambda: list(islice(names, _FILES_PER_SCAN)), []))
    scan = partial(_scan_files, root)
    blocks = dict(map(scan, islice(jobs, 4)))  # a small folder is not worth the start of processes
    if len(blocks) == 4:
        blocks |= dict(map_in_processes(scan, jobs, config.num_workers or count_cores()))
    if not blocks:
        raise RunError(f"{root} holds no files")
    frame = pd.concat([blocks[number] for number in sorted(blocks)], ignore_index=True)
    frame["number"] = range(len(frame))
    return frame


def _walk(root: Path, table: Path) -> Iterator[str]:
    """Files below the root but the table, as paths below the root, in a fixed order."""
    for name in walk_files(root):
        if os.path.basename(name) != table.name or not (root / name).samefile(table):
            yield name


def _scan_files(root: Path, job: tuple[int, list[str]]) -> tuple[int, pd.DataFrame]:
    number, names = job
    rows = [_read_row(root, name) for name in names]
    return number, pd.DataFrame(rows, columns=["image", "reject", *Identity._fields], dtype=TEXT)


def _read_row(root: Path, name: str) -> tuple[str, ...]:
    text = name_to_text(name)
    alone = f"file {text}"
    try:
        found, reject = read_identity(root / name), "not_dicom"
    except OSError as error:
        found, reject = None, judge_error(error).reason
    if found is None:
        return (text, reject, *Identity(alone, alone, alone, "", ""))
    return (text, "", *(found if found.identity else found._replace(identity=alone)))


def _join(frame: pd.DataFrame, reports: pd.DataFrame, keys: list[str]) -> list[str]:
    """Put each study's report beside its images. Returns notes for the card."""
    row = pd.Series(-1, index=frame.index)
    torn = pd.Series(False, index=frame.index)
    told = [name for name in reports.columns if name not in keys]
    for key in keys:
        unique = reports[reports[key] != ""].drop_duplicates([key, *told])
        position = pd.Series(unique.index, index=unique[key])
        twice = position.index[position.index.duplicated()]
        torn |= (row < 0) & frame[key].isin(twice)
        row = row.where(row >= 0, frame[key].map(position[~position.index.duplicated()]).fillna(-1).astype(int))
    missing = row < 0
    mark_rejects(frame, missing, "no_report")
    mark_rejects(frame, torn, "report_mismatch")
    joined = reports[told].reindex(row).fillna("").set_axis(frame.index)
    if "patient" in joined:
        theirs = joined.pop("patient")
        mark_rejects(
            frame, (theirs != "") & (frame["patient"] != "") & (theirs != frame["patient"]), "patient_mismatch"
        )
        frame["patient"] = frame["patient"].where(frame["patient"] != "", theirs)
    frame[list(joined.columns)] = joined
    used = pd.concat([reports[key].isin(frame[key]) & (reports[key] != "") for key in keys], axis=1).any(axis=1)
    unused = int((~used).sum())
    return [f"{unused} rows of the reports table belong to no image"] if unused else []
