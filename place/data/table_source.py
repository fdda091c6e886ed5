"""Source `table`: a data set as downloaded, whose protocol file says what stands in which table, column and folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import numpy as np
import pandas as pd

from place.config import PrepareConfig, RunError, UsageError
from place.data.annotations import Boxes, read_boxes, read_labels, read_outlines
from place.data.balanced import take_sample
from place.data.frame_rows import MIXED, FrameRows, fill_field
from place.data.identity import IdHasher, compute_split, read_salt
from place.data.layout import BoxRule, Layout, PatientRule
from place.data.long_table import fill_pattern, list_columns, read_long
from place.data.official_split import assign_splits
from place.data.protocol import hash_layout, list_deviations, read_protocol, refuse_deviations
from place.data.rows import Table
from place.data.table import TEXT, Label, hash_file

_ADVICE = "this is not the official split; download the tables and lists again"
_FIELDS = ("patient", "study", "view", "text")


def open_table(config: PrepareConfig) -> Table:
    """The images of a protocol's layout, with labels, boxes and masks.

    An image is known by its path, or by its file name where the protocol looks for it in several folders.
    Raises:
        UsageError: no protocol, folder, table or column.
        RunError: unreadable table, cells that the protocol does not know, a patient in two official splits.
    Source: ours.
    """
    if not config.protocol:
        raise UsageError("source table needs a protocol: say --protocol configs/eval/NAME.yaml")
    if not config.input or not Path(config.input).is_dir():
        raise UsageError(f"source table needs a folder: --input {config.input or 'DIR'} is the data set as downloaded")
    protocol = read_protocol(config.protocol)
    layout, root = protocol.layout, Path(config.input)
    if layout is None:
        raise UsageError(f"protocol {protocol.name} has no layout; leave --source out, and it says {protocol.source}")
    rows = _read_rows(layout, root)
    frame = _build_images(layout, rows, root)
    ids = IdHasher(read_salt(config.salt_file))
    notes = _fill_identities(layout, frame, root, protocol.name)
    if layout.sample:
        frame, pool = take_sample(layout.sample, frame, config.seed)
        frame["split"] = "test"
        found = {f"pool.{name}": size for name, size in pool.items()}
        refuse_deviations(list_deviations(protocol, found), config.allow_counts)
    rule = _assign_splits(layout, frame, root, config)
    boxes, more = _read_boxes(layout, rows, root)
    files = {mask.finding: mask.file for mask in layout.masks if mask.file}
    labels = [Label(name, name, None) for name in layout.list_labels()]
    content = ids.digest("input", ":".join([*_hash_files(layout, root), str(root.resolve())])).hex()
    outlines = read_outlines(layout.masks, rows, boxes)
    built = FrameRows(frame, labels, ids, str(root), masks=files, boxes=boxes, outlines=outlines)
    return Table(built, layout.list_labels(), rule, notes + more, f"{content}:{hash_layout(protocol)}")


def _read_rows(layout: Layout, root: Path) -> pd.DataFrame:
    """All lines of the tables of images, with `number` and `identity`, those that `where` leaves out dropped."""
    columns = list_columns(layout.image, layout.split, *(getattr(layout, name) for name in _FIELDS)) | {*layout.where}
    columns |= {column for rule in layout.labels for column in ([rule.column] if rule.column else rule.names.values())}
    columns |= {column for rule in layout.masks if rule.column for column in (rule.column, *list_columns(rule.finding))}
    optional: set[str] = set()
    for box in layout.boxes:
        if not box.tables:
            columns |= _list_box_columns(layout, box)
            optional |= {box.reader} if box.reader else set()
    rows = read_long(root, layout.tables, columns, optional)
    rows["number"] = np.arange(len(rows))
    for column, cells in layout.where.items():
        rows = rows[rows[column].isin(cells)]
    if rows.empty:
        raise RunError(f"no row of {layout.tables[0].file} has what the protocol's `where` asks for")
    return _identify(layout, rows.reset_index(drop=True))


def _list_box_columns(layout: Layout, rule: BoxRule) -> set[str]:
    named = {*(rule.columns or (rule.shapes,))}
    return named | list_columns(layout.image, rule.finding, rule.phrase)


def _identify(layout: Layout, rows: pd.DataFrame) -> pd.DataFrame:
    path = _take(fill_pattern(layout.image, rows), layout.image_match, "image")
    return rows.assign(path=path, identity=path.map(os.path.basename) if "*" in layout.image else path)


def _take(cells: pd.Series, match: str | None, field: str) -> pd.Series:
    """The first group of a regular expression, where there is one. Raises RunError for a cell that does not match."""
    if match is None:
        return cells
    taken = cells.str.extract(match, expand=False).astype(TEXT)
    if taken.isna().any():
        raise RunError(
            f"{field}: {int(taken.isna().sum())} rows do not match {match!r}; the protocol is of another release"
        )
    return taken


def _build_images(layout: Layout, rows: pd.DataFrame, root: Path) -> pd.DataFrame:
    """A row an image, in the order of the tables."""
    first = ~rows["identity"].duplicated()
    frame = rows.loc[first, ["number", "identity", "split"]].copy()
    if layout.split:
        frame["split"] = fill_pattern(layout.split, rows[first])
    frame["image"] = _find_files(layout.image, rows.loc[first, "path"], root)
    for name in _FIELDS:
        pattern = getattr(layout, name)
        if pattern:
            cells = fill_pattern(pattern, rows[first])
            frame[name] = _take(cells, getattr(layout, f"{name}_match", None), name)
    frame = frame.reset_index(drop=True)
    for rule in layout.labels:
        signs = read_labels(rule, rows)
        for name in rule.names:
            frame[f"label:{name}"] = signs[name].to_numpy()
    return frame


def _find_files(pattern: str, paths: pd.Series, root: Path) -> pd.Series:
    """Paths whose `*` are replaced by the folder in which the file is; those that are nowhere stay as they are."""
    folder = os.path.dirname(pattern)
    if "*" not in folder:
        return paths
    found: dict[str, str] = {}
    for place in sorted(glob.glob(folder, root_dir=root)):
        for name in os.listdir(root / place):
            if name in found:
                raise RunError(f"{name} lies in {found[name]} and in {place}; expected it in one folder")
            found[name] = place
    names = paths.map(os.path.basename)
    return names.map(lambda name: os.path.join(found.get(name, folder), name)).astype(TEXT)


def _fill_identities(layout: Layout, frame: pd.DataFrame, root: Path, name: str) -> list[str]:
    """Give every image a patient and a study, apart from those of other data sets; say where they had to be made up."""
    notes = fill_field(frame, "study", "image " + frame["identity"], "each image is a study of its own")
    alone = f"each image is a patient of its own, {MIXED}"
    if layout.patients and (root / layout.patients.table.file).is_file():
        frame["patient"] = _read_patients(layout, layout.patients, frame["identity"], root)
    elif layout.patients:
        alone = f"{layout.patients.table.file}, which would tell, is not there: {alone}"
    notes += fill_field(frame, "patient", "image " + frame["identity"], alone)
    frame["patient"] = f"{layout.cohort or name}/" + frame["patient"]
    frame["study"] = frame["patient"] + "/" + frame["study"]
    return notes


def _read_patients(layout: Layout, rule: PatientRule, identity: pd.Series, root: Path) -> pd.Series:
    """Patient of each image; empty where the table does not name it. Raises RunError for an image of two patients."""
    columns = list_columns(layout.image, rule.patient)
    rows = _identify(layout, read_long(root, (rule.table,), columns, ()))
    rows = rows.assign(patient=_take(fill_pattern(rule.patient, rows), rule.patient_match, "patient"))
    rows = rows.drop_duplicates(["identity", "patient"])
    if (twice := rows["identity"].duplicated()).any():
        raise RunError(f"{rule.table.file}: {int(twice.sum())} images are of two patients; download it again")
    patient = identity.map(rows.set_index("identity")["patient"]).fillna("").astype(TEXT)
    if (patient == "").all():
        raise RunError(f"{rule.table.file}: names none of the images of {layout.tables[0].file}; is it the right one?")
    return patient


def _assign_splits(layout: Layout, frame: pd.DataFrame, root: Path, config: PrepareConfig) -> str:
    """Put the split of each image into the frame. Returns the rule in words."""
    if layout.lists:
        frame["split"] = _look_up(layout, frame, root)
    elif (frame["split"] == "").all():
        del frame["split"]
    frame["split"], rule = assign_splits(frame, config, _ADVICE)
    if layout.lists or not layout.split:
        said = ", ".join(layout.lists.values()) or "the tables of the data set"
        rule = rule.replace("the split column says", f"{said} say")
    if layout.val_share:
        shares = (1 - layout.val_share, layout.val_share, 0.0)
        held = frame["patient"].map(lambda patient: compute_split(patient, config.seed, shares))
        frame["split"] = frame["split"].where(frame["split"] != "train", held)
        rule += f"; {layout.val_share:g} of the training patients validate, by hash of the patient, seed {config.seed}"
    return rule


def _look_up(layout: Layout, frame: pd.DataFrame, root: Path) -> pd.Series:
    listed: dict[str, str] = {}
    for split, name in layout.lists.items():
        if not (root / name).is_file():
            raise UsageError(f"{root} holds no {name}, the list of the official {split} images; put it there")
        for image in (root / name).read_text().split():
            if listed.setdefault(image, split) != split:
                raise RunError(f"{name}: an image is also listed for {listed[image]}; {_ADVICE}")
    split = frame["image"].map(os.path.basename).map(listed)
    if split.isna().any():
        row = frame["number"][split.isna().idxmax()]
        raise RunError(
            f"row {row} and {int(split.isna().sum()) - 1} others stand in no list ({', '.join(layout.lists.values())})"
        )
    return split.astype(TEXT)


def _read_boxes(layout: Layout, rows: pd.DataFrame, root: Path) -> tuple[Boxes, list[str]]:
    boxes: Boxes = {}
    notes = []
    known = {*rows["identity"]}
    for rule in layout.boxes:
        table, own = layout.tables[0].file, rows
        if rule.tables:
            table = rule.tables[0].file
            columns = _list_box_columns(layout, rule)
            own = read_long(root, rule.tables, columns, {rule.reader} if rule.reader else set())
            own = _identify(layout, own.assign(number=np.arange(len(own))))
        found = read_boxes(rule, own, table)
        there = {image: drawn for image, drawn in found.items() if image in known}
        if found and not there:
            raise RunError(
                f"{table}: none of its {len(found)} images with boxes is among those of {layout.tables[0].file}"
            )
        if len(there) < len(found):
            notes.append(f"{len(found) - len(there)} of {len(found)} images with boxes in {table} are not listed")
        for image, drawn in there.items():
            boxes[image] = boxes.get(image, ()) + drawn
    return boxes, notes


def _hash_files(layout: Layout, root: Path) -> list[str]:
    tables = [*layout.tables, *(table for rule in layout.boxes for table in rule.tables)]
    if layout.patients and (root / layout.patients.table.file).is_file():
        tables.append(layout.patients.table)
    names = [table.file for table in tables] + list(layout.lists.values())
    return [hash_file(root / name) for name in dict.fromkeys(names)]
