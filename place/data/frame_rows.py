"""Rows out of a table of images: the one way in which every source but the phantoms hands over its studies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from place.data.identity import IdHasher
from place.data.masks import SourceMask, list_mask_files
from place.data.rows import Row
from place.data.shapes import Shape
from place.data.table import Label

SECTIONS = ("findings", "impression", "text")
MIXED = "so one person may be in two splits"
"""How the notes of a source end that does not know all patients; `place evaluate` says then what it cannot check."""


# What `os` makes of bytes in a file name that are no UTF-8, and letters of private use that a table can hold.
_TO_PRIVATE = {0xDC00 + byte: 0x10DC00 + byte for byte in range(0x80, 0x100)}
_FROM_PRIVATE = {private: surrogate for surrogate, private in _TO_PRIVATE.items()}


def name_to_text(name: str) -> str:
    """A file name as the text of a table, whatever its bytes are. Source: ours."""
    return name.translate(_TO_PRIVATE)


def text_to_name(text: str) -> str:
    """The file name again, as `os` takes it. Source: ours."""
    return text.translate(_FROM_PRIVATE)


class FrameRows:
    """A table of images; ids are hashed when a slice is taken, so that no raw one reaches a task; a patient's rows
    are side by side.

    Columns: `number` (position in the input), `identity` (of the image), `patient`, `study`, `split`; and where the
    source has them: `image` and `report` (paths below their roots), `findings`, `impression`, `text`, `view`, `reject`
    (a reason, else empty), `label:NAME`. All but `number` are text. `boxes` are of images, by `identity`; `outlines`
    are of findings, then of images, and an image without any was looked at; `masks` are files.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        labels: list[Label],
        ids: IdHasher,
        image_root: str = "",
        report_root: str = "",
        masks: dict[str, str] | None = None,
        boxes: dict[str, tuple[dict[str, Any], ...]] | None = None,
        outlines: dict[str, dict[str, tuple[Shape, ...]]] | None = None,
    ):
        self.outlines = outlines or {}
        self.frame, self.labels, self.ids, self.masks, self.boxes = frame, labels, ids, masks or {}, boxes or {}
        self.image_root, self.report_root = image_root, report_root
        # Positions, and not the table in another order: its reports stay on the disk until their slice is taken.
        self.order = order_by_patient(frame)

    def __len__(self) -> int:
        return len(self.frame)

    def __iter__(self) -> Iterator[Row]:
        for begin in range(0, len(self), 1024):  # a table of hundreds of thousands is never all Python objects
            yield from self[begin : begin + 1024]

    def __getitem__(self, where: slice) -> list[Row]:
        # Runs of neighbours, not all positions at once: Arrow would join the whole column for that.
        positions = self.order[where]
        runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1) if len(positions) else []
        records = (cells for run in runs for cells in self.frame.iloc[run[0] : run[-1] + 1].to_dict("records"))
        return [self._build_row(cells) for cells in records]

    def _build_row(self, cells: dict[Any, Any]) -> Row:
        image, report = cells.get("image"), cells.get("report")
        return Row(
            number=int(cells["number"]),
            sample_id=self.ids.number("image", cells["identity"]),
            patient=self.ids.code("patient", cells["patient"]),
            study=self.ids.code("study", cells["study"]),
            split=cells["split"],
            image=os.path.join(self.image_root, text_to_name(image)) if image else "",
            report_path=os.path.join(self.report_root, text_to_name(report)) if report else "",
            sections=tuple((name, cells[name]) for name in SECTIONS if cells.get(name)),
            view=" ".join(cells.get("view", "").upper().split()),
            labels={label.name: label.read(cells[f"label:{label.column}"]) for label in self.labels},
            boxes=self.boxes.get(cells["identity"], ()),
            masks=(*self._list_outlines(cells["identity"]), *self._list_files(image)),
            reject=cells.get("reject", ""),
        )

    def _list_outlines(self, identity: str) -> list[SourceMask]:
        return [SourceMask(name, shapes=drawn.get(identity, ())) for name, drawn in self.outlines.items()]

    def _list_files(self, image: str | None) -> tuple[SourceMask, ...]:
        return list_mask_files(image, self.image_root, self.masks) if image else ()


def fill_field(frame: pd.DataFrame, field: str, fallback: pd.Series, meaning: str) -> list[str]:
    """Put the fallback where a row has nothing in the field. Returns a note for the card, if there was such a row."""
    if field not in frame:
        frame[field] = fallback
        return [f"no {field} column: {meaning}"]
    missing = frame[field] == ""
    frame[field] = frame[field].where(~missing, fallback)
    return [f"{int(missing.sum())} rows without a {field}: {meaning}"] if missing.any() else []


def share_patients(frame: pd.DataFrame) -> list[str]:
    """Give rows without a patient the one that their study's other rows name. Returns notes for the card.

    Source: ours.
    """
    if "patient" not in frame:
        return []
    named = frame["patient"].where(frame["patient"] != "").groupby(frame["study"])
    missing, count = frame["patient"] == "", named.transform("nunique")
    # Studies that are numbered within a patient: nobody can say which one's this is.
    mark_rejects(frame, missing & (count > 1), "patient_mismatch")
    found = missing & (count == 1)
    frame["patient"] = frame["patient"].where(~found, named.transform("first"))
    return [f"{int(found.sum())} rows without a patient: that of their study's other rows"] if found.any() else []


def order_by_patient(frame: pd.DataFrame) -> NDArray[np.int64]:
    """Positions of the rows: a patient's studies side by side, and a study's images; each where its first one is.

    Source: ours.
    """
    patient = frame.groupby("patient", sort=False).ngroup().to_numpy()
    study = frame.groupby("study", sort=False).ngroup().to_numpy()
    return np.lexsort((np.arange(len(frame)), study, patient))


def mark_rejects(frame: pd.DataFrame, rows: Any, reason: str) -> None:
    """Give `rows` (a mask) the reason, where they have none yet."""
    if "reject" not in frame:
        frame["reject"] = ""
    frame["reject"] = frame["reject"].mask(np.asarray(rows, dtype=bool) & (frame["reject"] == ""), reason)


def mark_mixed_studies(frame: pd.DataFrame) -> None:
    """Reject the studies whose images are of several patients: one of them is filed wrongly, and nobody can say which.

    Source: ours.
    """
    patients = frame["patient"].groupby(frame["study"]).transform("nunique")
    mark_rejects(frame, patients > 1, "patient_mismatch")
