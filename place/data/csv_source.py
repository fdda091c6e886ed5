"""Source `csv`: any table with a column mapping, one row an image."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from place.config import PrepareConfig, UsageError
from place.data.frame_rows import MIXED, FrameRows, fill_field, mark_rejects, share_patients
from place.data.identity import IdHasher, read_salt
from place.data.official_split import assign_splits
from place.data.rows import Table
from place.data.table import build_labels, check_fields, hash_file, read_table

_MAX_VIEWS = 64
_ADVICE = "put each patient into one split, or leave out --column split"


def open_csv(config: PrepareConfig) -> Table:
    """A table with a column mapping, one row an image.

    An image is known by its path: the second row of the same one is rejected as `duplicate_id`. A row without a study
    is a study of its own. One without a patient has that of its study's other rows; where they name several it is
    rejected as `patient_mismatch`, where they name none its study is its patient.
    Raises:
        UsageError: unknown column or field, no such image root.
        RunError: unreadable table, a patient in two official splits.
    Source: ours.
    """
    if not config.input:
        raise UsageError("source csv needs a table: say --input FILE")
    table = Path(config.input)
    check_fields(config.columns, config.min_words > 0)
    frame = read_table(table, config.columns, config.label_columns)
    labels = build_labels(frame, config.label_columns)
    root = Path(config.image_root) if config.image_root else table.parent
    if not root.is_dir():
        raise UsageError(f"image root {root}: no such folder; give --image-root the folder that image paths start from")
    ids = IdHasher(read_salt(config.salt_file))
    notes = _fill_identities(frame)
    frame["split"], rule = assign_splits(frame, config, _ADVICE)
    _check_views(frame)
    content = ids.digest("input", f"{hash_file(table)}:{root.resolve()}").hex()
    rows = FrameRows(frame, labels, ids, str(root), masks=_check_masks(config))
    return Table(rows, [label.name for label in labels], rule, notes, content)


def _check_masks(config: PrepareConfig) -> dict[str, str] | None:
    for name, pattern in (config.masks or {}).items():
        if "{stem}" not in pattern:
            raise UsageError(f"--masks {name}={pattern}: expected {{stem}} in it, the image's path without suffix")
    return config.masks


def _fill_identities(frame: pd.DataFrame) -> list[str]:
    """Give every row an identity, a patient and a study; say where they had to be made up."""
    frame["number"] = range(len(frame))
    paths = frame["image"].map(lambda path: os.path.normpath(path) if path else "")
    frame["identity"] = paths.where(paths != "", "row " + frame["number"].astype(str))
    mark_rejects(frame, frame["identity"].duplicated(), "duplicate_id")
    notes = fill_field(frame, "study", "image " + frame["identity"], "each image is a study of its own")
    notes += share_patients(frame)
    alone = f"each study is a patient of its own, {MIXED}"
    notes += fill_field(frame, "patient", "study " + frame["study"], alone)
    # Studies are often numbered within a patient.
    frame["study"] = frame["patient"] + "/" + frame["study"]
    return notes


def _check_views(frame: pd.DataFrame) -> None:
    views = frame["view"].nunique() if "view" in frame else 0
    if views > _MAX_VIEWS:
        raise UsageError(f"the view column has {views} different values; expected a few such as AP, PA, LATERAL")
