"""How a data set lies on the disk, as a section of its protocol file: tables, columns, labels, boxes, masks, lists."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from place.config import Section

SplitName = Literal["train", "val", "test"]
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
"""A column in a pattern: `{Image Index}`; `{folder}` and `{split}` are the table's, unless it has such columns."""


def _check_group(pattern: str | None) -> str | None:
    try:
        groups = 1 if pattern is None else re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from None
    if groups < 1:
        raise ValueError("expected a regular expression with a group")
    return pattern


class TableFile(Section):
    """A table: csv or tsv (also .gz), text without a header, a JSON list of records, or COCO JSON.

    COCO gives a row an annotation with the columns file_name, width, height, category, x, y, w, h, polygons (RLE too),
    and one with empty cells for an image without any.
    """

    file: str
    """Path below the folder of the data set."""
    split: SplitName | None = None
    """Split of all its images; none where lists, or the hash of the patient, give it."""
    folder: str = ""
    """What `{folder}` in a pattern stands for."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a file without a header."""
    separator: str | None = None
    """What stands between cells; none takes a tab in .tsv, else a comma."""
    rename: dict[str, str] = {}
    """Columns that other tables of the data set spell otherwise: name here to name there."""
    unfold: tuple[str, ...] = ()
    """JSON: lists of equal length in a record, each element of which makes a row; a list in it gives NAME.0, NAME.1."""


class LabelRule(Section):
    """Labels that are read alike."""

    names: dict[str, str]
    """Label to its column, or with `column` to the class that stands for it there; a list names both alike."""
    column: str | None = None
    """Column with classes; none where each label has a column of its own."""
    separator: str | None = None
    """Stands between the classes of a cell; none where there is one class a cell."""
    others: tuple[str, ...] = ()
    """Classes of `column` that are no label, such as `No Finding`; any class that nobody names stops the command."""
    empty: tuple[str, ...] = ()
    """Where given, any cell of the column but these is positive for the one label, such as a mask's runs."""
    positive: tuple[str, ...] = ("1", "1.0")
    """Cells of a label's own column."""
    negative: tuple[str, ...] = ("0", "0.0")
    """As `positive`."""
    uncertain: tuple[str, ...] = ("-1", "-1.0")
    """As `positive`."""
    unknown: tuple[str, ...] = ("",)
    """Cells that say nothing, also of a column with classes unless `others` has them."""
    uncertain_as: dict[str, Literal["positive", "negative", "unknown"]] = {}
    """What an uncertain label counts as; labels that are not named stay uncertain, and are then no label for a task."""
    unknown_as: Literal["unknown", "negative"] = "unknown"
    """What an empty cell counts as."""
    combine: Literal["same", "any", "majority"] = "same"
    """Rows of one image: all must say the same, one positive is enough, or at least half of those that know must be
    positive; there uncertain is half a vote, and the label is uncertain where that leaves it at exactly half."""

    @field_validator("names", mode="before")
    @classmethod
    def _name_alike(cls, names: Any) -> Any:
        return {name: name for name in names} if isinstance(names, list | tuple) else names

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> LabelRule:
        if self.empty and (self.column is None or len(self.names) != 1):
            raise ValueError("`empty` goes with a column and one label")
        if strange := sorted({*self.uncertain_as} - {*self.names}):
            raise ValueError(f"uncertain_as names '{strange[0]}', which is no label of this rule")
        return self


class BoxRule(Section):
    """Boxes, one a row."""

    tables: tuple[TableFile, ...] = ()
    """Tables of their own, which name an image as those of images do; none: the rows of these."""
    columns: tuple[str, str, str, str] | None = None
    """The four numbers, in pixels of the source image; a row where all are empty has no box."""
    form: Literal["xywh", "xyxy"] = "xywh"
    """Corner and size, or two corners."""
    shapes: str | None = None
    """Instead of `columns`: the column with outlines as Object-CXR writes them; their boxes are taken."""
    finding: str
    """Pattern or text: what the box shows."""
    findings: dict[str, str] = {}
    """Findings that the labels spell otherwise: name here to name there."""
    skip: tuple[str, ...] = ()
    """Findings whose rows are no boxes, such as `No finding`."""
    phrase: str | None = None
    """Pattern: the words that the box belongs to, for grounding."""
    reader: str | None = None
    """Column with the reader, where several drew boxes on one image."""
    agree: int = Field(1, ge=1)
    """Readers whose boxes of one finding must overlap; the mean box of those stands for them."""
    agree_iou: float = Field(0.4, gt=0, le=1)
    """Intersection over union from which on two readers' boxes show the same."""

    @model_validator(mode="after")
    def _has_numbers(self) -> BoxRule:
        if (self.columns is None) == (self.shapes is None):
            raise ValueError("give either `columns` or `shapes`")
        if self.agree > 1 and self.reader is None:
            raise ValueError("`agree` needs the column of the `reader`")
        return self


class MaskRule(Section):
    """Masks: images without any of a finding count as looked at, and the finding as absent."""

    finding: str
    """Text, or with `column` a pattern: what the mask of a row shows."""
    kind: Literal["boxes", "shapes", "runs", "file"]
    """The filled boxes of the finding; outlines as Object-CXR writes them; runs of pixels as SIIM; a picture."""
    column: str | None = None
    """Column with shapes or runs; rows of one image are joined."""
    empty: tuple[str, ...] = ("", "-1")
    """Cells without a mask."""
    file: str | None = None
    """The picture's path; `{stem}` is the image's path without suffix, `{name}` the last part of it. An image without
    one was not looked at."""

    @model_validator(mode="after")
    def _has_its_column(self) -> MaskRule:
        if (self.kind in ("shapes", "runs")) != (self.column is not None):
            raise ValueError("`column` goes with kind shapes or runs")
        if (self.kind == "file") != (self.file is not None):
            raise ValueError("`file` goes with kind file")
        if self.column is None and PLACEHOLDER.search(self.finding):
            raise ValueError("a pattern as `finding` goes with kind shapes or runs")
        return self


class SampleRule(Section):
    """A balanced test set, 5x200 as it is called: images with one label of some, and none of others."""

    one_of: tuple[str, ...] = Field(min_length=2)
    """Labels of which exactly one is positive and no other is uncertain."""
    none_of: tuple[str, ...] = ()
    """Labels that are neither positive nor uncertain."""
    per_label: int = Field(ge=1)
    """Images taken of each label: the first by the hash of their path."""
    pool: dict[str, int] = {}
    """Images that there are to take from, by label; another number stops the command."""


class PatientRule(Section):
    """Who is on which image, told by a table apart, which not everybody has."""

    table: TableFile
    """Names an image as the tables of images do; where it is not there, each image is a patient of its own."""
    patient: str
    """Pattern."""
    patient_match: str | None = None
    """Regular expression whose first group is taken of it."""

    @field_validator("patient_match")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        return _check_group(pattern)


class Layout(Section):
    """Tables with a row an image, or several."""

    tables: tuple[TableFile, ...] = Field(min_length=1)
    """Read one after another, as one."""
    image: str
    """Pattern of the image's path; `*` in it stands for any folder, and the file is then found by its name."""
    image_match: str | None = None
    """Regular expression whose first group is taken of the path."""
    patient: str | None = None
    """Pattern; none where nobody knows, or `patients` tell: else each image is a patient of its own."""
    patient_match: str | None = None
    """As `image_match`."""
    patients: PatientRule | None = None
    """Instead of `patient`: a table that joins patients to images."""
    cohort: str | None = None
    """Whose patients these are: data sets of one cohort share them, and their names mean nothing to another; none takes
    the name of the protocol."""
    study: str | None = None
    """Pattern; none where each image is a study of its own."""
    study_match: str | None = None
    """As `image_match`."""
    view: str | None = None
    """Pattern of the view; none asks the file."""
    split: str | None = None
    """Pattern of the official split, of any usual name; none where tables or lists tell it, or the patient's hash."""
    text: str | None = None
    """Pattern of the report; none where there are no reports (`min_words: 0`)."""
    labels: tuple[LabelRule, ...] = ()
    """What is known of an image."""
    boxes: tuple[BoxRule, ...] = ()
    """Boxes on images."""
    masks: tuple[MaskRule, ...] = ()
    """Masks of images."""
    lists: dict[SplitName, str] = {}
    """Official lists, a file a split, an image's file name a line; each image must stand in one."""
    val_share: float = Field(0, ge=0, lt=1)
    """Share of the patients in train that are taken for validation, by hash."""
    where: dict[str, tuple[str, ...]] = {}
    """Cells that an image's row must have to belong to the protocol; others are not listed at all."""
    sample: SampleRule | None = None
    """Takes some images only, all for the test split."""

    @field_validator("image")
    @classmethod
    def _finds_by_name(cls, image: str) -> str:
        folder, _, name = image.rpartition("/")
        if "*" in name or ("*" in folder and PLACEHOLDER.search(folder)):
            raise ValueError("`*` stands for folders, and then columns name the file alone")
        return image

    @field_validator("image_match", "patient_match", "study_match")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        return _check_group(pattern)

    @model_validator(mode="after")
    def _asks_once_for_patients(self) -> Layout:
        if self.patient and self.patients:
            raise ValueError("give either `patient` or `patients`")
        return self

    @model_validator(mode="after")
    def _samples_by_its_labels(self) -> Layout:
        named = {*self.sample.one_of, *self.sample.none_of, *self.sample.pool} if self.sample else set()
        if strange := sorted(named - {*self.list_labels()}):
            raise ValueError(f"sample names '{strange[0]}', which is no label of the layout")
        return self

    def list_labels(self) -> list[str]:
        """Names of the labels, in order."""
        return [name for rule in self.labels for name in rule.names]
