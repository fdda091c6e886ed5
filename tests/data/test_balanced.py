"""Balanced test sets take images of one finding alone; patients of two data sets are never taken for one another."""

from __future__ import annotations

import pandas as pd
import pytest
import yaml
from miniatures import PROTOCOLS, parse_prepare, prepare_words, write_nih, write_protocol

from place.config import RunError
from place.data.balanced import take_sample
from place.data.layout import SampleRule
from place.data.table_source import open_table

RULE = SampleRule(one_of=("edema", "mass"), none_of=("hernia",), per_label=1)


def build_frame(*signs: str) -> pd.DataFrame:
    """Images a, b, c, ... with signs of edema, mass and hernia."""
    rows = [dict(zip(("label:edema", "label:mass", "label:hernia"), cells.split(","), strict=True)) for cells in signs]
    return pd.DataFrame(rows).assign(identity=[chr(97 + place) for place in range(len(rows))])


def test_an_image_with_two_findings_or_a_doubtful_one_is_not_in_the_pool():
    frame = build_frame("1,,0", "1,1,0", "1,-1,0", "0,1,", "0,1,1", "0,1,-1", "1,0,")
    taken, pool = take_sample(RULE, frame, 0)
    assert pool == {"edema": 2, "mass": 1}
    assert "d" in set(taken["identity"])
    assert set(taken["identity"]) < {"a", "d", "g"}
    assert len({tuple(take_sample(RULE, frame, seed)[0]["identity"]) for seed in range(20)}) == 2


def test_too_few_images_of_a_finding_are_an_error():
    with pytest.raises(RunError, match="0 images have mass alone, 1 are wanted"):
        take_sample(RULE, build_frame("1,,0", "1,1,0"), 0)


def test_patients_of_one_number_are_the_same_in_one_cohort_and_others_in_another(tmp_path):
    folder = tmp_path / "nih"
    folder.mkdir()
    write_nih(folder)
    layout = yaml.safe_load((PROTOCOLS / "nih.yaml").read_text())["layout"]
    names = []
    for cohort in ("nih", "other"):
        protocol = write_protocol("nih", folder, layout=layout | {"cohort": cohort}, counts={})
        names.append({row.patient for row in open_table(parse_prepare(*prepare_words(protocol, folder))).rows})
    plain = open_table(parse_prepare(*prepare_words(PROTOCOLS / "nih.yaml", folder)))
    assert not names[0] & names[1]
    assert {row.patient for row in plain.rows} == names[0]
