"""How far the labeler agrees with the MeSH terms that librarians gave to real Open-i reports.

`python -m place.evaluation.labeler_agreement --reports DIR` prints a table. The labeler's rules were written with one
half of the reports in view, by a hash of the report's id; what counts is the other half.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from place.config import UsageError
from place.data.images import Rejected, read_file
from place.data.report import split_sentences
from place.data.report_files import MAX_REPORT_BYTES, parse_openi, parse_xml
from place.evaluation.labeler import OBSERVATIONS, POSITIVE, build_labeler, hash_rules

HALVES = ("written", "held_out")
MIN_COUNT = 20
_MAPPING = "openi_mesh.yaml"


class IndexedReport(NamedTuple):
    """A report as sentences, and its MeSH terms, each a heading with qualifiers."""

    name: str
    half: str
    sentences: list[str]
    terms: list[list[str]]


class Score(NamedTuple):
    """Agreement on one finding within one half: `num_true` reports have it by their MeSH terms."""

    num_true: int
    precision: float
    recall: float
    f1: float


def choose_half(name: str) -> str:
    """Half of a report: by the lowest bit of the first byte of SHA-256 of its `uId`. Source: ours."""
    return HALVES[hashlib.sha256(name.encode()).digest()[0] & 1]


def read_indexed_reports(folder: Path) -> list[IndexedReport]:
    """Read all *.xml of a folder. Raises UsageError where there are none; a file that is no report is refused too."""
    paths = sorted(folder.glob("*.xml"))
    if not paths:
        raise UsageError(f"{folder} holds no XML reports; give --reports the folder of NLMCXR_reports.tgz")
    return [_read_report(path) for path in paths]


def _read_report(path: Path) -> IndexedReport:
    try:
        data = read_file(str(path), MAX_REPORT_BYTES)
        tree, sections = parse_xml(data), parse_openi(data)
    except Rejected as fault:
        raise UsageError(f"{path}: {fault.detail or fault.reason}; remove it or download it again") from None
    name = next((node.get("id") or "" for node in tree.iter("uId")), path.stem)
    terms = [[part.strip().lower() for part in (node.text or "").split("/")] for node in tree.iter("major")]
    return IndexedReport(name, choose_half(name), [s for _, text in sections for s in split_sentences(text)], terms)


def read_mapping() -> dict[str, Any]:
    """The committed mapping of MeSH terms to findings."""
    return yaml.safe_load((resources.files("place.evaluation") / _MAPPING).read_text(encoding="utf-8"))


def find_truth(report: IndexedReport, finding: str, mapping: dict[str, Any]) -> bool | None:
    """Whether a report's MeSH terms have a finding; None where terms or text are missing or leave it open."""
    if not report.sentences or not report.terms or _has_term(report, mapping["not_indexed"]):
        return None
    if _has_term(report, mapping["findings"][finding]):
        return True
    return None if _has_term(report, mapping["open"].get(finding, [])) else False


def _has_term(report: IndexedReport, entries: Iterable[str]) -> bool:
    wanted = [entry.lower().split("/") for entry in entries]
    return any(term[0] == head and set(rest) <= set(term[1:]) for head, *rest in wanted for term in report.terms)


def compute_agreement(reports: Sequence[IndexedReport]) -> dict[str, dict[str, Score]]:
    """Score of each finding within each half; only a positive label counts, for what is merely possible is not indexed.

    Returns: finding to half to `Score`.
    Source: ours.
    """
    labeler, mapping = build_labeler(), read_mapping()
    labels = [labeler.label_report(report.sentences) for report in reports]
    scores: dict[str, dict[str, Score]] = {}
    for finding in OBSERVATIONS:
        truth = [find_truth(report, finding, mapping) for report in reports]
        scores[finding] = {
            half: _score([
                (known, label[finding] == POSITIVE)
                for report, known, label in zip(reports, truth, labels, strict=True)
                if report.half == half and known is not None
            ])
            for half in HALVES
        }  # fmt: skip
    return scores


def _score(pairs: Sequence[tuple[bool, bool]]) -> Score:
    count, said = sum(known for known, _ in pairs), sum(said for _, said in pairs)
    both = sum(known and said for known, said in pairs)
    return Score(count, both / max(said, 1), both / max(count, 1), 2 * both / max(count + said, 1))


def list_counted(scores: dict[str, dict[str, Score]]) -> list[str]:
    """Findings that occur at least `MIN_COUNT` times in both halves together."""
    return [name for name, halves in scores.items() if sum(score.num_true for score in halves.values()) >= MIN_COUNT]


def compute_macro_f1(scores: dict[str, dict[str, Score]], half: str) -> float:
    """Mean F1 over the findings that occur often enough."""
    names = list_counted(scores)
    return sum(scores[name][half].f1 for name in names) / max(len(names), 1)


def build_table(scores: dict[str, dict[str, Score]], halves: Sequence[str]) -> Table:
    """A row a finding; findings that are too rare for the mean are dim."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("finding", no_wrap=True)
    for half in halves:
        for column in (half, "precision", "recall", "F1"):
            table.add_column(column, justify="right")
    counted = list_counted(scores)
    for name in sorted(scores, key=lambda name: name not in counted):
        cells = [cell for half in halves for cell in _show(scores[name][half])]
        table.add_row(name, *cells, style="" if name in counted else "dim")
    means = [cell for half in halves for cell in ("", "", "", f"{compute_macro_f1(scores, half):.3f}")]
    table.add_row(f"mean of {len(counted)}", *means, style="bold")
    return table


def _show(score: Score) -> list[str]:
    return [str(score.num_true), *(f"{value:.3f}" for value in score[1:])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it as JSON where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m place.evaluation.labeler_agreement", description=__doc__)
    parser.add_argument("--reports", type=Path, required=True, help="folder with the XML reports of Open-i")
    parser.add_argument("--half", choices=("both", *HALVES), default="both", help="half that is shown")
    parser.add_argument("--output", type=Path, help="JSON file that the table is written to as well")
    given = parser.parse_args(arguments)
    console = Console(width=110)
    try:
        reports = read_indexed_reports(given.reports)
    except UsageError as fault:
        Console(stderr=True, soft_wrap=True).print(f"place: {fault}", markup=False, highlight=False)
        return 2
    scores = compute_agreement(reports)
    halves = HALVES if given.half == "both" else (given.half,)
    console.print(build_table(scores, halves))
    console.print(f"{len(reports)} reports; rules {hash_rules()}; dim: fewer than {MIN_COUNT} reports", style="dim")
    if given.output:
        tree = {name: {half: scores[name][half]._asdict() for half in halves} for name in scores}
        given.output.write_text(json.dumps({"rules": hash_rules(), "scores": tree}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
