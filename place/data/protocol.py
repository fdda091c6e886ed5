"""Protocol files, `configs/eval/NAME.yaml`: one data set's source, licence, layout, splits, counts, metrics, peers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from place.config import PrepareConfig, RunError, Section, UsageError, read_tree
from place.data.layout import Layout

Evidence = Literal["measured", "reported", "memory"]
SHIPPED = (
    *("chestx_det10", "chexpert", "chexpert_5x200", "covid_cxr", "covidx", "mimic_5x200", "mimic_cxr", "ms_cxr", "nih"),
    *("object_cxr", "openi", "phantom", "rsna", "siim", "vindr"),
)
"""Names of the protocols in `configs/eval`, which a protocol in another folder may also name."""
_OWN = {"source", "input", "output", "protocol", "allow_counts", "launcher", "address", "num_workers", "salt_file"}
"""What `prepare` may not set: the source has a key of its own, the rest belongs to the user."""
_PATHS = ("image_root", "reports", "boxes", "only")
"""Options that are paths; a protocol's start from the folder of the data set."""


class Counts(Section):
    """Numbers that a split must have once it is prepared; what nobody knows is left out."""

    rows: int | None = Field(None, ge=0)
    """Rows of the input, rejected ones included."""
    missing: int | None = Field(None, ge=0)
    """Rows whose image file is not there or ends too early: 0 where half a download must not pass."""
    images: int | None = Field(None, ge=0)
    """Images that are kept."""
    studies: int | None = Field(None, ge=0)
    """Studies of these images."""
    patients: int | None = Field(None, ge=0)
    """Patients of these images."""
    boxes: int | None = Field(None, ge=0)
    """Boxes on these images."""
    masks: int | None = Field(None, ge=0)
    """Images with a mask that is not empty."""
    positive: dict[str, int] = {}
    """Images that are positive, by label."""

    def flatten(self) -> dict[str, int]:
        """Every number that is stated, by its name: images, positive.LABEL."""
        plain = {name: value for name, value in self if isinstance(value, int)}
        return plain | {f"positive.{name}": value for name, value in self.positive.items()}


class Peer(Section):
    """A score of another project, to stand beside ours."""

    name: str
    """The method."""
    task: str
    """The task of ours that it is comparable with."""
    metric: str
    """What was measured, in the words of the source."""
    values: dict[str, float]
    """Score by share of training labels in %, threshold or finding."""
    source: str
    """Where the number stands."""
    evidence: Evidence
    """measured: read in that source. reported: from an aggregator or tracker. memory: to be checked before use."""


class Protocol(Section):
    """What a data set is, and how it is judged."""

    name: str
    """Short name, that of the file."""
    title: str
    """Name of the data set."""
    url: str
    """Page of the data set."""
    licence: str
    """Terms of use, as that page has them."""
    download: str
    """What to get, and what to lay where."""
    files: dict[str, str]
    """Files below the folder of the data set, and what stands in them."""
    source: str
    """Source of `place prepare`."""
    prepare: dict[str, Any] = {}
    """Options of `place prepare`; what is given on the command line comes first."""
    layout: Layout | None = None
    """Tables and columns, for source table."""
    split: str
    """Rule of the splits, in words."""
    uncertain: str
    """What becomes of uncertain labels, in words."""
    counts: dict[Literal["all", "train", "val", "test", "train+val"], Counts] = {}
    """What must be met once the data set is prepared; train+val where their division is not the source's."""
    counts_from: str = ""
    """Where the counts stand."""
    tasks: dict[str, tuple[str, ...]]
    """Tasks of `place evaluate`, each with the metrics that are reported, the headline first."""
    findings: tuple[str, ...] = ()
    """Labels that are judged, as `evaluation.findings` names them; empty leaves it to the run."""
    peers: tuple[Peer, ...] = ()
    """Scores of others."""
    shares_images_with: tuple[str, ...] = ()
    """Protocols of data sets that hold some of the same images: what it was taken from, or what was taken from it."""
    notes: tuple[str, ...] = ()
    """What a user must know before comparing."""

    @field_validator("url")
    @classmethod
    def _is_a_page(cls, url: str) -> str:
        if not url.startswith("https://"):
            raise ValueError("expected the https:// page of the data set")
        return url

    @model_validator(mode="after")
    def _fits_together(self) -> Protocol:
        if (self.source == "table") != (self.layout is not None):
            raise ValueError("`layout` goes with source table")
        known = {*PrepareConfig.model_fields} - _OWN
        if strange := sorted({*self.prepare} - known):
            raise ValueError(f"prepare.{strange[0]} is no option of a protocol; there are {', '.join(sorted(known))}")
        if self.counts and not self.counts_from:
            raise ValueError("counts need `counts_from`, where they stand")
        self._check_labels()
        return self

    def _check_labels(self) -> None:
        labels = self.layout.list_labels() if self.layout else []
        if twice := [name for name in labels if labels.count(name) > 1]:
            raise ValueError(f"label '{twice[0]}' has two rules")
        if self.layout and (strange := sorted({*self.findings} - {*labels})):
            raise ValueError(f"findings.{strange[0]} is no label of the layout")
        for split, counts in self.counts.items():
            if self.layout and (strange := sorted({*counts.positive} - {*labels})):
                raise ValueError(f"counts.{split}.positive.{strange[0]} is no label of the layout")


def read_protocol(path: str | Path) -> Protocol:
    """A protocol file, every key checked. Raises UsageError, in one line. Source: ours."""
    path = Path(path)
    try:
        protocol = Protocol.model_validate(read_tree(path))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        told = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        raise UsageError(f"protocol {path}: {where + ': ' if where else ''}{told}") from None
    others = {*SHIPPED, *(file.stem for file in path.parent.glob("*.yaml"))} - {protocol.name}
    if strange := sorted({*protocol.shares_images_with} - others):
        told = f"no other protocol is called '{strange[0]}', only {', '.join(sorted(others))}"
        raise UsageError(f"protocol {path}: shares_images_with: {told}")
    return protocol


def hash_layout(protocol: Protocol) -> str:
    """SHA-256 over what decides how a prepared data set looks, hexadecimal."""
    # Without a key that was added later, where it is not used: what was prepared before stays as asked for.
    unused = {"patients"} if protocol.layout and protocol.layout.patients is None else None
    layout = protocol.layout.model_dump_json(exclude=unused) if protocol.layout else ""
    return hashlib.sha256(f"{protocol.name}:{layout}".encode()).hexdigest()


def fill_options(given: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """Options of a command with those of the protocol, which come second.

    Args:
        given: what the user said, defaults left out. Paths of the protocol start from its `input`.
    Raises:
        UsageError: another source.
    Source: ours.
    """
    if given.get("source") not in (None, protocol.source):
        raise UsageError(
            f"--source {given['source']}: protocol {protocol.name} is prepared with --source {protocol.source}; "
            "leave --source out"
        )
    below = {
        name: os.path.join(given.get("input", ""), value) if name in _PATHS else value
        for name, value in protocol.prepare.items()
    }
    return {"source": protocol.source, **below, **given}


def list_counts(protocol: Protocol) -> dict[str, int]:
    """Every count that the protocol states, by the name that allows it to differ, such as test.images or pool.Edema."""
    stated = {
        f"{split}.{name}": value
        for split, counts in protocol.counts.items()
        for name, value in counts.flatten().items()
    }
    pool = protocol.layout.sample.pool if protocol.layout and protocol.layout.sample else {}
    return stated | {f"pool.{name}": value for name, value in pool.items()}


def list_deviations(protocol: Protocol, found: dict[str, int]) -> dict[str, str]:
    """A line for each count that was looked at and is not what the protocol states, by the count's name."""
    return {
        name: f"{name}: {found[name]:,} found, protocol {protocol.name} says {stated:,}"
        for name, stated in list_counts(protocol).items()
        if name in found and found[name] != stated
    }


def refuse_deviations(deviations: dict[str, str], allowed: Collection[str]) -> None:
    """Raises RunError for what is not allowed by name."""
    faults = [line for name, line in deviations.items() if name not in allowed]
    if faults:
        raise RunError(
            f"{'; '.join(faults)}; rejected.parquet may say why, else it is another release of the data set: prepare "
            f"the one of the protocol, or allow it by name with --allow-counts {' '.join(deviations)}"
        )
