"""Prompts: built in, from a file, from templates, and what a bad file says."""

from __future__ import annotations

import pytest

from place.config import UsageError
from place.evaluation.prompts import build_prompts

NAMES = [
    "cardiomegaly", "effusion", "pneumothorax", "consolidation", "nodule", "edema", "atelectasis", "fracture",
    "Pleural Effusion", "Enlarged Cardiomediastinum", "Lung Opacity", "Lung Lesion", "Support Devices", "No Finding",
    "Pleural_Thickening", "Infiltration", "Mass", "Emphysema", "Fibrosis", "Hernia", "Pneumonia", "Pleural Other",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_phantom_chexpert_and_nih_findings_have_prompts_of_their_own(name):
    prompts = build_prompts([name])[name]
    assert prompts.origin == "built in"
    assert not set(prompts.positive) & set(prompts.negative)


def test_an_unknown_finding_gets_templates_and_says_so():
    prompts = build_prompts(["Aortic_Ectasia"])["Aortic_Ectasia"]
    assert prompts.origin == "template"
    assert "There is no aortic ectasia." in prompts.negative


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ILD", "There is ILD."),
        ("Enlarged PA", "There is enlarged PA."),
        ("COVID-19_sequelae", "There is COVID-19 sequelae."),
        ("Nodule/Mass", "There is nodule/mass."),
        ("Air-Space Disease", "There is air-space disease."),
        ("PLEURAL PLAQUE", "There is pleural plaque."),
    ],
)
def test_templates_keep_hyphens_and_abbreviations(name, sentence):
    assert build_prompts([name])[name].positive[0] == sentence


def test_covid_19_has_prompts_of_its_own():
    assert build_prompts(["COVID-19"])["COVID-19"].positive[0] == "There is COVID-19 pneumonia."
    assert build_prompts(["covid_19"])["covid_19"].origin == "built in"


def test_a_file_comes_first(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("Edema: {positive: [Wet lungs.], negative: [Dry lungs.]}")
    prompts = build_prompts(["edema", "nodule"], path)
    assert prompts["edema"] == (["Wet lungs."], ["Dry lungs."], "file")
    assert prompts["nodule"].origin == "built in"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edema: {positive: [a]}", "'edema' needs `positive` and `negative`"),
        ("edema: {positive: [], negative: [b]}", "'edema' needs"),
        ("- a", "expected `finding:"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_expected(tmp_path, text, message):
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        build_prompts(["edema"], path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="none.yaml: No such file"):
        build_prompts(["edema"], tmp_path / "none.yaml")
