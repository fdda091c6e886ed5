"""Agreement with MeSH terms, on miniatures laid out as Open-i does and on the real reports where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from place.config import UsageError
from place.evaluation import labeler_agreement
from place.evaluation.labeler import OBSERVATIONS
from place.evaluation.labeler_agreement import (
    HALVES,
    MIN_COUNT,
    choose_half,
    compute_agreement,
    compute_macro_f1,
    find_truth,
    list_counted,
    main,
    read_indexed_reports,
    read_mapping,
)

REPORT = """<eCitation><uId id="{name}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">Old cardiomegaly.</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION"/></Abstract></Article></MedlineCitation>
<MeSH>{majors}<automatic>pneumothorax</automatic></MeSH></eCitation>"""


def write_report(folder: Path, name: str, findings: str, *terms: str) -> None:
    majors = "".join(f"<major>{term}</major>" for term in terms)
    (folder / f"{name}.xml").write_text(REPORT.format(name=name, findings=findings, majors=majors))


def read_one(folder: Path, findings: str, *terms: str):
    write_report(folder, "CXR1", findings, *terms)
    return read_indexed_reports(folder)[0]


def test_a_report_is_read_with_its_sentences_and_major_terms(tmp_path):
    report = read_one(tmp_path, "No effusion. Clear lungs.", "Opacity/lung/base/left", "Cardiomegaly/mild")
    assert report.sentences == ["No effusion.", "Clear lungs."]
    assert report.terms == [["opacity", "lung", "base", "left"], ["cardiomegaly", "mild"]]


@pytest.mark.parametrize(
    ("finding", "terms", "truth"),
    [
        ("Lung Opacity", ["Opacity/lung/base/left"], True),
        ("Lung Opacity", ["Markings/lung/interstitial/chronic"], True),
        ("Lung Opacity", ["Markings/bronchovascular"], False),
        ("Lung Lesion", ["Opacity/lung/upper lobe/round"], True),
        ("Lung Lesion", ["Opacity/lung/upper lobe"], False),
        ("No Finding", ["normal"], True),
        ("No Finding", ["Spine/degenerative"], False),
        ("No Finding", ["No Indexing"], None),
        ("Cardiomegaly", [], None),
        ("Pleural Effusion", ["Costophrenic Angle/left/blunted"], None),
        ("Pleural Effusion", ["Costophrenic Angle/left/blunted", "Pleural Effusion/left"], True),
        ("Cardiomegaly", ["Costophrenic Angle/left/blunted"], False),
        ("Fracture", ["Fractures, Bone/ribs/left"], True),
    ],
)
def test_terms_stand_for_findings_by_heading_and_qualifiers(tmp_path, finding, terms, truth):
    assert find_truth(read_one(tmp_path, "Text.", *terms), finding, read_mapping()) is truth


def test_a_report_without_text_is_not_judged(tmp_path):
    assert find_truth(read_one(tmp_path, "", "normal"), "No Finding", read_mapping()) is None


def test_the_mapping_names_every_finding_once():
    assert set(read_mapping()["findings"]) == set(OBSERVATIONS)


def test_halves_are_of_like_size_and_fixed():
    halves = [choose_half(f"CXR{number}") for number in range(1000)]
    assert abs(halves.count("written") - 500) < 50
    # The rules were written under this split: it must never move.
    assert [choose_half(name) for name in ("CXR100", "CXR1", "CXR3999")] == ["written", "written", "held_out"]


@pytest.fixture
def folder(tmp_path):
    """Ten reports with an effusion, of which two are missed, one false alarm, nine without."""
    for number in range(20):
        said = "Left pleural effusion." if number < 8 or number == 10 else "No pleural effusion."
        write_report(tmp_path, f"CXR{number}", said, "Pleural Effusion/left" if number < 10 else "normal")
    return tmp_path


def test_scores_are_counts_of_hits_and_misses(folder, monkeypatch):
    monkeypatch.setattr(labeler_agreement, "choose_half", lambda name: "written")
    score = compute_agreement(read_indexed_reports(folder))["Pleural Effusion"]["written"]
    assert score == pytest.approx((10, 8 / 9, 8 / 10, 16 / 19))


def test_what_is_merely_possible_does_not_count_as_said(tmp_path, monkeypatch):
    monkeypatch.setattr(labeler_agreement, "choose_half", lambda name: "written")
    write_report(tmp_path, "CXR1", "Possible effusion.", "Pleural Effusion/left")
    assert compute_agreement(read_indexed_reports(tmp_path))["Pleural Effusion"]["written"].recall == 0


def test_rare_findings_do_not_count_towards_the_mean(folder):
    scores = compute_agreement(read_indexed_reports(folder))
    assert list_counted(scores) == []
    twice = {"a": {half: scores["Pleural Effusion"][half]._replace(num_true=MIN_COUNT) for half in HALVES}} | scores
    assert list_counted(twice) == ["a"]
    assert compute_macro_f1(twice, "written") == scores["Pleural Effusion"]["written"].f1


def test_the_command_prints_a_table_and_writes_it(folder, tmp_path, capsys):
    assert main(["--reports", str(folder), "--output", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "held_out" in shown
    assert "Enlarged Cardiomediastinum" in shown
    cells = next(line.split() for line in shown.splitlines() if line.startswith("Pleural Effusion"))[2:]
    assert len(cells) == 8
    assert int(cells[0]) + int(cells[4]) == 10
    assert max(map(len, shown.splitlines())) <= 110
    tree = json.loads((tmp_path / "out.json").read_text())
    assert sum(tree["scores"]["Pleural Effusion"][half]["num_true"] for half in HALVES) == 10


def test_a_folder_without_reports_is_one_line_and_wrong_use(tmp_path, capsys):
    assert main(["--reports", str(tmp_path)]) == 2
    assert "holds no XML reports" in capsys.readouterr().err


def test_a_file_that_is_no_report_is_named(tmp_path):
    (tmp_path / "x.xml").write_text("<broken")
    with pytest.raises(UsageError, match=r"x\.xml: no well-formed XML"):
        read_indexed_reports(tmp_path)


def test_the_labeler_agrees_with_the_terms_of_the_real_reports_of_the_held_out_half(real_data):
    scores = compute_agreement(read_indexed_reports(real_data / "openi-reports"))
    assert len(list_counted(scores)) >= 8
    assert compute_macro_f1(scores, "held_out") >= 0.8


def test_the_page_has_the_figures_of_the_held_out_half(real_data):
    scores = compute_agreement(read_indexed_reports(real_data / "openi-reports"))
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.count("|") == 6)
    told = {name: cells for name, *cells in rows}
    counted = list_counted(scores)
    assert [told[name][0] for name in counted] == [str(scores[name]["held_out"].num_true) for name in counted]
    shown = {name: float(told[name][-1]) for name in counted}
    assert shown == pytest.approx({name: scores[name]["held_out"].f1 for name in counted}, abs=0.005)
    mean = float(told[f"mean of {len(counted)}"][-1])
    assert mean == pytest.approx(compute_macro_f1(scores, "held_out"), abs=0.005)
