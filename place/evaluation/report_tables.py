"""Metric names to tables that can be read: a row a finding or measure, a column a kind, value and interval in a cell.

A name is `[VARIANT.]KIND.FINDING` or `[VARIANT.]mean_KIND` where a task judges findings, else `[PREFIX.]MEASURE`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

MEAN, CHANCE = "mean", "chance"
WORDS = {
    "auroc": "AUROC", "auprc": "AUPRC", "map": "mAP", "ap": "AP", "iou": "IoU", "miou": "mIoU", "cnr": "CNR",
    "bleu": "BLEU", "meteor": "METEOR", "rouge": "ROUGE", "cider": "CIDEr", "f1": "F1", "ece": "ECE", "l": "L",
    "dice": "Dice", "mrr": "MRR", "chexbert": "CheXbert", "radgraph": "RadGraph",
}  # fmt: skip


class Cell(NamedTuple):
    """A figure and its interval, as shown; empty where there is none."""

    value: str = ""
    interval: str = ""


class Matrix(NamedTuple):
    """A table: what it shows, its columns, and its rows, each a name and a cell a column."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


class Bar(NamedTuple):
    """A bar of a length 0 to 1, its interval on the same scale (or none), and the figure as shown."""

    label: str
    length: float
    low: float | None
    high: float | None
    cell: Cell


class Bars(NamedTuple):
    """Bars of one kind of figure, a bar a finding, and where chance lies, if that is known."""

    title: str
    bars: list[Bar]
    chance: float | None


class _Place(NamedTuple):
    """Where a metric stands: its table, row and column; `finding`: whether the row is one."""

    table: str
    row: str
    column: str
    finding: bool = False


def build_tables(result: dict[str, Any]) -> list[Matrix]:
    """All metrics of a TASK.json, the headline's table first. Source: ours."""
    findings, chances = _list_findings(result), _flatten(result["protocol"].get(CHANCE, {}))
    tables: dict[str, dict[tuple[str, str], Cell]] = {}
    for name, metric in result["metrics"].items():
        table, row, column, _ = _find_place(name, findings)
        cells = tables.setdefault(table, {})
        cells[row, column] = build_cell(metric)
        if name in chances:
            key = (CHANCE, column) if findings else (row, f"{column} {CHANCE}")
            cells[key] = Cell(_show(chances[name]))
    return [_build_matrix(title, cells) for title, cells in tables.items()]


def build_bars(result: dict[str, Any]) -> Bars | None:
    """A bar a finding, of the kind of figure that comes first; none where a task judges no findings."""
    findings = _list_findings(result)
    places = {name: _find_place(name, findings) for name in result["metrics"]}
    kind = next((place.column for place in places.values() if place.finding and not place.table), None)
    if kind is None:
        return None
    chosen = {
        place.row: result["metrics"][name]
        for name, place in places.items()
        if place.finding and (place.table, place.column) == ("", kind)
    }
    longest = max(1.0, *(metric["value"] for metric in chosen.values()))
    bars = [
        Bar(
            name,
            _scale(metric["value"], longest) or 0.0,
            _scale(metric["low"], longest),
            _scale(metric["high"], longest),
            build_cell(metric),
        )
        for name, metric in chosen.items()
    ]
    chance = _flatten(result["protocol"].get(CHANCE, {})).get(f"{MEAN}_{kind}")
    return Bars(f"{show_name(result['task'])}: {show_name(kind)}", bars, _scale(chance, longest))


def build_chance(result: dict[str, Any], name: str) -> Cell:
    """What chance would give for a metric, where the protocol says so."""
    chance = _flatten(result["protocol"].get(CHANCE, {})).get(name)
    return Cell() if chance is None else Cell(_show(chance))


def build_cell(metric: dict[str, Any]) -> Cell:
    """A figure and its 95 % interval as text."""
    low, high = metric["low"], metric["high"]
    return Cell(_show(metric["value"]), "" if low is None or high is None else f"{_show(low)} to {_show(high)}")


def show_name(name: str) -> str:
    """A name of the files in words: `image_to_text.r_at_5` is 'image to text R@5'."""
    name = re.sub(r"\b([rp])_at_(\d+)", lambda match: f"{match[1].upper()}@{match[2]}", name)
    return " ".join(WORDS.get(word, word) for word in re.split(r"[_. ]+", name) if word)


def _find_place(name: str, findings: list[str]) -> _Place:
    finding = next((item for item in findings if name.endswith(f".{item}")), "")
    before, _, last = name.removesuffix(f".{finding}").rpartition(".") if finding else name.rpartition(".")
    if finding:
        return _Place(before, finding, last, True)
    if findings and last.startswith(f"{MEAN}_"):
        return _Place(before, MEAN, last.removeprefix(f"{MEAN}_"))
    return _Place("others" if findings else "", last, before or "value")


def _list_findings(result: dict[str, Any]) -> list[str]:
    """The longest name first, so that of two that end alike the right one is taken."""
    findings = result["protocol"].get("findings", {})
    return sorted(findings, key=len, reverse=True) if isinstance(findings, dict) else []


def _build_matrix(title: str, cells: dict[tuple[str, str], Cell]) -> Matrix:
    """Rows and columns in the order of the file; chance is the second row, or beside its column."""
    rows, seen = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    rows.sort(key=lambda row: {MEAN: 0, CHANCE: 1}.get(row, 2))
    columns = sorted(seen, key=lambda column: seen.index(column.removesuffix(f" {CHANCE}")))
    filled = [(show_name(row), [cells.get((row, column), Cell()) for column in columns]) for row in rows]
    return Matrix(show_name(title), [show_name(column) for column in columns], filled)


def _flatten(tree: dict[str, Any], before: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat


def _scale(value: float | None, longest: float) -> float | None:
    return None if value is None else min(max(value / longest, 0.0), 1.0)


def _show(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
