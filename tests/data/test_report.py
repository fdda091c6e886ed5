"""Sections, sentences and hashes of reports."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from place.data.report import hash_text, normalize_text, split_sentences
from place.data.sections import split_sections


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("The heart is 2.5 cm wide. No effusion.", ["The heart is 2.5 cm wide.", "No effusion."]),
        ("Discussed with Dr. Smith at 3 p.m. No change.", ["Discussed with Dr. Smith at 3 p.m.", "No change."]),
        ("Dr. J. Smith came. Ok then.", ["Dr. J. Smith came.", "Ok then."]),
        ("1. No pneumonia. 2. Small nodule, 1.5 cm.", ["1. No pneumonia.", "2. Small nodule, 1.5 cm."]),
        ("1. Cardiomegaly 2. Effusion", ["1. Cardiomegaly", "2. Effusion"]),
        ("1. Cardiomegaly.\n2. Effusion\n3. Edema", ["1. Cardiomegaly.", "2. Effusion", "3. Edema"]),
        ("Seen on image 2. The heart is fine.", ["Seen on image 2.", "The heart is fine."]),
        ("XXXX. Compared to XXXX XXXX. Clear.", ["XXXX.", "Compared to XXXX XXXX.", "Clear."]),
        ("Compared to ___. Dr. ___ was called.", ["Compared to ___.", "Dr. ___ was called."]),
        ("effusion.No pneumothorax.Heart normal", ["effusion.", "No pneumothorax.", "Heart normal"]),
        ("line wraps\nin the middle. Next one", ["line wraps in the middle.", "Next one"]),
        ("First part\n\nsecond part", ["First part", "second part"]),
        ("the heart is normal . no effusion .", ["the heart is normal .", "no effusion ."]),
        ("Fracture of rib no. 5 is old. (Figs. 1a and b).", ["Fracture of rib no. 5 is old.", "(Figs. 1a and b)."]),
        ("Stable, approx. 3 cm. Is it? Yes!", ["Stable, approx. 3 cm.", "Is it?", "Yes!"]),
        ("Lines.. Regression . . Fine", ["Lines..", "Regression .", "Fine"]),
        ("", []),
        (" . \n ", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text, sentences):
    assert split_sentences(text) == sentences


def test_findings_and_impression_are_cut_out_of_free_text():
    text = (
        "EXAMINATION: CHEST\n\n INDICATION: cough // pneumonia?\n\n FINDINGS: \n\n No focal\n lesion.\n\n"
        " IMPRESSION: Clear.\n"
    )
    assert split_sections(text) == [("findings", "No focal\n lesion."), ("impression", "Clear.")]
    assert split_sections("Findings: heart normal. Impression: no disease.") == [
        ("findings", "heart normal."),
        ("impression", "no disease."),
    ]


def test_text_without_headings_is_one_report():
    text = "The impression is good: clear lungs. Presentation: cough."
    assert split_sections(text) == [("report", text)]


def test_the_same_words_have_the_same_hash():
    assert hash_text("1. No  acute\n disease.") == hash_text("no acute disease")
    assert hash_text("No acute disease") != hash_text("No acute diseases")
    assert normalize_text("2.5 cm nodule.") == "2.5 cm nodule"


def test_hashes_are_positive_and_stay_the_same_for_ever():
    assert hash_text("No acute disease.") == 818270800391519784
    assert all(0 < hash_text(str(number)) < 2**63 for number in range(1000))


def test_no_character_of_the_real_reports_is_lost(real_data):
    for path in sorted((real_data / "openi-reports").glob("*.xml")):
        for node in ElementTree.parse(path).iter("AbstractText"):
            text = node.text or ""
            kept = "".join(split_sentences(text))
            assert re.sub(r"\W", "", kept) == re.sub(r"\W", "", text) or not re.search(r"[A-Za-z]", text), path.name
