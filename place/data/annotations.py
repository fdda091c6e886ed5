"""Labels, boxes and masks out of the rows of a layout's tables, several rows an image or one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from place.config import RunError
from place.data.layout import PLACEHOLDER, BoxRule, LabelRule, MaskRule
from place.data.long_table import fill_pattern
from place.data.readers import merge_readers
from place.data.shapes import Shape, find_box, parse_runs, parse_shapes
from place.data.table import TEXT

Boxes = dict[str, tuple[dict[str, Any], ...]]
"""Boxes of each image, by identity, as `place.data.rows.Row` has them."""
Outlines = dict[str, dict[str, tuple[Shape, ...]]]
"""Outlines by finding and identity; an image without any was looked at."""
_WORTH = {"positive": 1.0, "negative": 0.0, "uncertain": -1.0, "unknown": np.nan}
_SIGNS = {1.0: "1", 0.0: "0", -1.0: "-1"}


def read_labels(rule: LabelRule, rows: pd.DataFrame) -> pd.DataFrame:
    """Sign of each label of the rule for each image, as text: 1, 0, -1 or empty.

    Args:
        rows: with `identity`, of an image's first row first.
    Returns:
        A column a label, a row an identity, in the order of their first rows.
    Raises:
        RunError: a cell that the rule does not know, or rows of one image that differ where they may not.
    Source: ours; design.md 7 for why no cell is guessed.
    """
    image = rows["identity"]
    first = ~image.duplicated()
    signs = {}
    for name in rule.names:
        worth = _settle(rule, name, _read_column(rule, name, rows))
        combined = worth[first].to_numpy() if first.all() else _combine(rule, name, worth, image)
        signs[name] = [_SIGNS.get(value, "") for value in combined.tolist()]
    return pd.DataFrame(signs, index=image[first], dtype=TEXT)


def _read_column(rule: LabelRule, name: str, rows: pd.DataFrame) -> pd.Series:
    """1 positive, 0 negative, -1 uncertain, NaN unknown, a row."""
    if rule.column is None:
        known = {cell: _WORTH[sign] for sign in _WORTH for cell in getattr(rule, sign)}
        return _map_cells(rows[rule.names[name]], known, rule.names[name])
    cells = rows[rule.column]
    if rule.empty:
        return (~cells.isin(rule.empty)).astype(float)
    return _map_cells(cells, _read_classes(rule, name, cells), rule.column)


def _read_classes(rule: LabelRule, name: str, cells: pd.Series) -> dict[str, float]:
    known = {*rule.names.values(), *rule.others}
    worth = {cell: np.nan for cell in rule.unknown if cell not in known}
    for cell in cells.unique().tolist():
        classes = {part.strip() for part in cell.split(rule.separator)} if rule.separator else {cell}
        if classes <= known:
            worth[cell] = float(rule.names[name] in classes)
    return worth


def _map_cells(cells: pd.Series, known: Mapping[str, float], column: str) -> pd.Series:
    strange = ~cells.isin(list(known))
    if strange.any():
        told = ", ".join(repr(cell) for cell in sorted(set(cells[strange]))[:3])
        raise RunError(
            f"column '{column}' holds {told}, which the protocol does not know; it is another release of the data set, "
            "or the protocol's `labels` must name it"
        )
    return cells.map(dict(known)).astype(float)


def _settle(rule: LabelRule, name: str, worth: pd.Series) -> pd.Series:
    if name in rule.uncertain_as:
        worth = worth.where(worth != -1, _WORTH[rule.uncertain_as[name]])
    return worth.where(~worth.isna(), _WORTH[rule.unknown_as])


def _combine(rule: LabelRule, name: str, worth: pd.Series, image: pd.Series) -> np.ndarray:
    if rule.combine == "same":
        groups = worth.fillna(-9).groupby(image, sort=False)
        if (groups.nunique() > 1).any():
            raise RunError(
                f"label '{name}': rows of one image say different things; `combine: any` or `majority` in the protocol "
                "would settle that"
            )
        return groups.first().replace(-9, np.nan).to_numpy()
    # Uncertain lies between negative and positive.
    votes = worth.replace(-1, 0.5).groupby(image, sort=False)
    if rule.combine == "any":
        return votes.max().replace(0.5, -1).to_numpy()
    share, doubted = votes.mean(), (worth == -1).groupby(image, sort=False).any()
    return (share >= 0.5).astype(float).where(share.notna()).mask((share == 0.5) & doubted, -1).to_numpy()


def read_boxes(rule: BoxRule, rows: pd.DataFrame, table: str) -> Boxes:
    """Boxes of a rule's rows.

    Args:
        rows: with `identity`, and the columns of the rule.
        table: name for the user.
    Raises:
        RunError: numbers that are no box.
    Source: ours.
    """
    finding = fill_pattern(rule.finding, rows).replace(rule.findings)
    phrase = fill_pattern(rule.phrase, rows) if rule.phrase else pd.Series("", index=rows.index)
    reader = rows[rule.reader] if rule.reader else pd.Series("", index=rows.index)
    found: dict[str, list[dict[str, Any]]] = {}
    cells = rows[list(rule.columns)] if rule.columns else rows[[rule.shapes]]
    wanted = ~finding.isin(rule.skip) & (cells != "").any(axis=1)
    for at in np.flatnonzero(wanted.to_numpy()):
        name, words, who = finding.iloc[at], phrase.iloc[at], reader.iloc[at]
        for box in _read_numbers(rule, cells.iloc[at].tolist(), f"{table}, row {rows['number'].iloc[at]}"):
            item = {"finding": name, "box_xyxy": list(box), "sentence": None} | ({"phrase": words} if words else {})
            found.setdefault(rows["identity"].iloc[at], []).append(item | ({"reader": who} if who else {}))
    if rule.reader:
        return {image: merge_readers(boxes, rule.agree, rule.agree_iou) for image, boxes in found.items()}
    return {image: tuple(boxes) for image, boxes in found.items()}


def _read_numbers(rule: BoxRule, cells: list[str], where: str) -> list[tuple[float, ...]]:
    try:
        if rule.shapes:
            return [find_box(shape) for shape in parse_shapes(cells[0])]
        a, b, c, d = (float(cell) for cell in cells)
    except ValueError as fault:
        raise RunError(f"{where}: {fault}; expected {'outlines' if rule.shapes else 'four numbers'}") from None
    x1, y1 = (a + c, b + d) if rule.form == "xywh" else (c, d)
    if not (x1 > a and y1 > b):
        raise RunError(f"{where}: {a:g}, {b:g}, {c:g}, {d:g} is no box; does the protocol's `form` fit?")
    return [(a, b, x1, y1)]


def read_outlines(rules: tuple[MaskRule, ...], rows: pd.DataFrame, boxes: Boxes) -> Outlines:
    """Outlines of the masks that are no files.

    Raises:
        RunError: a cell that does not read as outlines, or a row that has a finding or outlines without the other.
    Source: ours.
    """
    found: Outlines = {}
    for rule in rules:
        if rule.kind == "boxes":
            found[rule.finding] = {image: _fill_boxes(own, rule.finding) for image, own in boxes.items()}
        elif rule.column is not None:
            found |= _read_cells(rule, rule.column, rows)
    return found


def _fill_boxes(boxes: tuple[dict[str, Any], ...], finding: str) -> tuple[Shape, ...]:
    return tuple(Shape("rectangle", tuple(box["box_xyxy"])) for box in boxes if box["finding"] == finding)


def _read_cells(rule: MaskRule, column: str, rows: pd.DataFrame) -> Outlines:
    finding, empty = fill_pattern(rule.finding, rows), rows[column].isin(rule.empty)
    half = empty != (finding == "")
    if PLACEHOLDER.search(rule.finding) and half.any():
        has, lacks = ("a finding", "an outline") if empty[half.idxmax()] else ("an outline", "a finding")
        raise RunError(f"column '{column}', row {rows['number'][half.idxmax()]}: has {has} without {lacks}")
    found: Outlines = {name: {} for name in finding.unique() if name}
    taken = rows[~empty]
    for image, number, cell, name in zip(taken["identity"], taken["number"], taken[column], finding[~empty]):
        try:
            shapes = (parse_runs(cell),) if rule.kind == "runs" else parse_shapes(cell)
        except ValueError as fault:
            raise RunError(f"column '{column}', row {number}: {fault}; download the table again") from None
        found[name][image] = found[name].get(image, ()) + shapes
    return found
