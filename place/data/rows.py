"""What a source hands over: a sliceable list of rows with hashed ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from place.data.identity import IdHasher
from place.data.masks import SourceMask


class Row(NamedTuple):
    """One image with its report, as a task takes it; no identifier but the path of its image is left in it."""

    number: int
    """0-based position in the input."""
    sample_id: int
    patient: str
    study: str
    split: str
    image: str | bytes
    """Path of the image file, or its bytes."""
    sections: tuple[tuple[str, str], ...]
    """(section, text); the section `text` is free text, still to be cut at its headings."""
    view: str
    """Upper case; empty if the source does not know it, and the file is asked."""
    labels: dict[str, int | None]
    boxes: tuple[dict[str, Any], ...] = ()
    masks: tuple[SourceMask, ...] = ()
    """True masks, in the pixels of the source image; they go into a table of their own."""
    reject: str = ""
    """Reason for which the row is dropped already."""
    report_path: str = ""
    """File with the report, read in the task: free text, or XML as of Open-i; its sections come after `sections`."""


class Rows(Protocol):
    """What a task iterates over and `run_prepare` slices; made so that a slice is small to send to another process."""

    ids: IdHasher
    """What hashes the ids of the rows."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def __getitem__(self, where: slice) -> Rows | list[Row]: ...


class Table(NamedTuple):
    """An opened source."""

    rows: Rows
    labels: list[str]
    split_rule: str
    notes: list[str]
    content: str
    """Keyed hash of the input: tells another table, other images or another salt; it names none of them."""
