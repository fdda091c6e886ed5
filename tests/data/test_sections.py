"""Free-text reports of MIMIC-CXR's kinds to their sections; contradictions, near-duplicates and names in them."""

from __future__ import annotations

import pytest

from place.data.consistency import find_contradiction
from place.data.images import Rejected
from place.data.privacy import has_name
from place.data.report import hash_near, split_sentences
from place.data.report_files import decode_text, parse_openi, read_report
from place.data.sections import parse_report, split_sections
from place.data.task import MAX_REPORT_CHARS, lower_sentences, read_sentences

WET_READ = """ WET READ: ___ ___ ___ 9:33 PM
  Low lung volumes. Possible pneumonia.
 ______________________________________________________________________________
                                 FINAL REPORT
 HISTORY:  ___-year-old female with chest pain.
 
 COMPARISON:  Comparison is made with chest radiographs from ___.
 
 FINDINGS:  The lungs are well expanded.
 
 LINES AND TUBES: None.
 
 IMPRESSION:  No pneumonia.
 
 NOTIFICATION:  The findings were discussed with Dr. ___ by phone.
"""


def test_every_section_of_a_report_is_named():
    assert [name for name, _ in parse_report(WET_READ)] == [
        "wet_read",
        "history",
        "comparison",
        "findings",
        "impression",
        "notification",
    ]


def test_a_subheading_stays_in_its_section_and_a_wet_read_is_void_beside_the_final_report():
    assert split_sections(WET_READ) == [
        ("findings", "The lungs are well expanded.\n \n LINES AND TUBES: None."),
        ("impression", "No pneumonia."),
    ]


def test_a_wet_read_alone_is_the_report():
    text = " WET READ VERSION #1 ___ ___ ___ 3:00 AM\n  Low lung volumes. No pneumonia.\n"
    assert split_sections(text) == [("report", "Low lung volumes. No pneumonia.")]


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        (
            "    FINAL REPORT\n HISTORY:  Cough.\n\n FINDINGS AND IMPRESSION: Clear lungs.\n",
            [("findings", "Clear lungs.")],
        ),
        ("CONCLUSION: Clear lungs.", [("impression", "Clear lungs.")]),
        ("IMPRESSION AND RECOMMENDATION:\n Clear lungs.", [("impression", "Clear lungs.")]),
        ("IMPRESSION\n\nClear lungs.\n", [("impression", "Clear lungs.")]),
        (
            "HISTORY: Cough.\n\n PA AND LATERAL VIEWS OF THE CHEST:  Clear lungs.\n\n IMPRESSION:  Normal.",
            [("findings", "Clear lungs."), ("impression", "Normal.")],
        ),
        # No heading for what was found: it follows the last other one, or stands first.
        (
            "    FINAL REPORT\n HISTORY: Cough.\n \n COMPARISON: ___.\n \n The lungs are clear.\n",
            [("report", "The lungs are clear.")],
        ),
        (
            "    FINAL REPORT\n AP CHEST, 5:24 A.M. ___\n \n HISTORY: Cough.\n \n IMPRESSION:  Clear.",
            [("impression", "Clear.")],
        ),
        (
            "    FINAL REPORT\n As compared to the previous radiograph, no change.\n",
            [("report", "As compared to the previous radiograph, no change.")],
        ),
        ("    FINAL REPORT\n CHEST\n\n HISTORY: Cough.\n", []),
        ("ADDENDUM  Read by Dr. ___.\n FINDINGS: Clear.", [("findings", "Clear.")]),
        (
            "    FINAL ADDENDUM\n The date was wrong.\n\n    FINAL REPORT\n IMPRESSION: Clear.\n",
            [("impression", "Clear.")],
        ),
        ("TECHNIQUE: AP. FINDINGS: Clear. IMPRESSION: Normal.", [("findings", "Clear."), ("impression", "Normal.")]),
        ("FINDINGS (preliminary): Clear.", [("findings", "Clear.")]),
        ("IMPRESSION: One.\n\nIMPRESSION: Two.", [("impression", "One.\n\nTwo.")]),
        ("", []),
    ],
)
def test_odd_and_missing_headings_are_understood(text, sections):
    assert split_sections(text) == sections


def test_letters_are_kept_unless_small_ones_are_wanted():
    sections = [("findings", "Heart is NORMAL. XXXX Ümlaut stays.")]
    sentences = read_sentences(sections, 1)
    assert [item["text"] for item in sentences] == ["Heart is NORMAL.", "XXXX Ümlaut stays."]
    assert [item["text"] for item in lower_sentences(sentences)] == ["heart is normal.", "xxxx ümlaut stays."]


@pytest.mark.parametrize(
    ("findings", "impression", "finding"),
    [
        ("There is a small left effusion.", "No effusion or pneumothorax.", "effusion"),
        ("No focal consolidation, pleural effusion, or pneumothoraces.", "Bilateral pleural effusions.", "effusion"),
        ("The lungs are free of pulmonary edema.", "Moderate edema.", "edema"),
        ("There is a small left effusion.", "No large effusion.", ""),
        ("There is a small left effusion.", "No change in the effusion.", ""),
        ("Possible small effusion.", "No effusion.", ""),
        ("XXXX pleural effusion on the left.", "No effusion.", ""),
        ("The left effusion has resolved.", "No effusion.", ""),
        ("There is cardiomegaly.", "No effusion.", ""),
        ("There is cardiomegaly. No cardiomegaly.", "Normal.", ""),
    ],
)
def test_only_a_plain_contradiction_of_findings_and_impression_counts(findings, impression, finding):
    sentences = [("findings", text) for text in split_sentences(findings)] + [("impression", impression)]
    assert find_contradiction(sentences) == finding
    if finding:
        with pytest.raises(Rejected, match="contradictory_report"):
            read_sentences([("findings", findings), ("impression", impression)], 1)


def test_of_the_real_reports_the_one_that_contradicts_itself_is_found(real_data):
    torn = []
    for path in (real_data / "openi-reports").glob("*.xml"):
        sections = parse_openi(path.read_bytes())
        pairs = [(name, sentence) for name, text in sections for sentence in split_sentences(text)]
        torn += [(path.stem, finding)] if (finding := find_contradiction(pairs)) else []
    # Read by hand: findings "no ... pleural effusion", impression "... bilateral pleural effusions".
    assert torn == [("227", "effusion")]


def test_reports_that_say_nearly_the_same_share_a_group():
    group = hash_near(["The lungs are clear.", "No pleural effusions, 2.5 cm."])
    assert group == hash_near(["1. There is no pleural effusion 3 cm", "Lungs XXXX clear"])
    assert group != hash_near(["The lungs are clear.", "Pleural effusions, 2.5 cm."])
    assert group != hash_near(["The left lung is clear.", "No pleural effusions."])
    assert 0 < group < 2**63


def test_near_duplicates_of_the_real_reports_are_those_that_share_their_words(real_data):
    sentences = [
        [sentence for _, text in parse_openi(path.read_bytes()) for sentence in split_sentences(text)]
        for path in sorted((real_data / "openi-reports").glob("*.xml"))[::3]
    ]
    kept = [cut for cut in sentences if cut]
    words = [set(" ".join(cut).lower().replace(".", " ").replace(",", " ").split()) for cut in kept]
    groups = [hash_near(cut) for cut in kept]
    alike = together = right = 0
    for left in range(len(kept)):
        for other in range(left):
            share = len(words[left] & words[other]) / len(words[left] | words[other])
            alike += share >= 0.95
            together += groups[left] == groups[other]
            right += groups[left] == groups[other] and share >= 0.7
    assert right / together > 0.97
    assert together / alike > 0.9


@pytest.mark.parametrize(
    "text",
    [
        "Discussed with Dr. Smith at 3 p.m.",
        "seen by mrs J. Doe",
        "Jane A. Doe, M.D.",
        "Electronically signed by: Jane Doe",
        "MRN: 4711",
        "call 555-123-4567",
        "DICTATED BY: JOHN SMITH, M.D.",
        "DICTATED BY: JOHN SMITH",
        "READ BY: JOHN SMITH",
        "DR. SMITH WAS NOTIFIED.",
        "DR PATEL WAS NOTIFIED",
        "Dr. SMITH was notified",
        "MRS. SMITH TOLERATED THIS WELL",
        "Electronically signed by JOHN SMITH",
        "JOHN A. SMITH, MD",
        "JOHN SMITH M.D.",
        "Seán O'Brien, MD",
        "Dr. McDonald",
        "Dr O'Brien",
        "Dr. Müller",
        "Dr. Mu\u0308ller",
        "Dr. Øster",
        "Dr. Li",
        "Dr Wu",
        "Dr. van der Berg",
        "DR. VAN DER BERG",
        "Dr. al-Hassan",
        "Dr. d'Angelo",
        "Dr.Smith",
        "Dr. J.Smith",
        "MRN 1234567",
        "Patient: John Smith",
        "PATIENT: SMITH, JOHN",
        "Call (617)555-1234",
        "Call (617) 555-1234",
        "jane@example.org",
    ],
)
def test_what_looks_like_a_name_or_number_is_warned_of(text):
    assert has_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "Dr. ___ was paged.",
        "Discussed with Dr. XXXX.",
        "MRN: ___",
        "Dr. who",
        "Signed by XXXX XXXX",
        "2.5 cm nodule",
        "DR. XXXX WAS NOTIFIED.",
        "Dr.XXXX",
        "Dr. J. XXXX",
        "SIGNED BY: XXXX XXXX, M.D.",
        "DICTATED BY ___ ___",
        "Patient: XXXX XXXX",
        "MRN XXXX",
        "MRN 12",
        "DR CHEST PA AND LATERAL",
        "MR IMAGING OF THE BRAIN",
        "MS CHANGES, NURSE NOTIFIED",
        "REPORTED BY PATIENT FAMILY",
        "DICTATED BY THE RESIDENT",
        "THE LUNG BASES DO NOT SHOW EDEMA",
        "REFERRING MD NOTIFIED",
        "PATIENT: MALE ADULT",
        "Best seen with MR. No effusion.",
    ],
)
def test_marks_of_deidentification_are_no_names(text):
    assert not has_name(text)


def test_no_real_deidentified_report_is_taken_to_hold_a_name(real_data):
    texts = [text for path in (real_data / "openi-reports").glob("*.xml") for _, text in parse_openi(path.read_bytes())]
    assert len(texts) > 1800
    assert [text for text in texts if has_name(text) or has_name(text.upper())] == []


def test_a_report_file_is_text_in_utf8_or_windows_letters(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffIMPRESSION: Größe normal.".encode())
    (tmp_path / "b.txt").write_bytes("IMPRESSION: Größe normal.".encode("cp1252"))
    assert (
        read_report(str(tmp_path / "a.txt"))
        == read_report(str(tmp_path / "b.txt"))
        == [("impression", "Größe normal.")]
    )
    with pytest.raises(Rejected, match="unreadable_report"):
        decode_text(b"a\0b")
    (tmp_path / "c.txt").write_bytes(b"x" * (1 << 21))
    with pytest.raises(Rejected, match="unreadable_report"):
        read_report(str(tmp_path / "c.txt"))
    with pytest.raises(Rejected, match="missing_report"):
        read_report(str(tmp_path / "none.txt"))


def test_an_xml_bomb_is_refused():
    bomb = b'<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><eCitation>&c;</eCitation>'
    for data in (bomb, bomb.decode().encode("utf-16"), b"<eCitation>", b'<?xml version="1.0" encoding="none"?><a/>'):
        with pytest.raises(Rejected, match="unreadable_report"):
            parse_openi(data)


def test_a_text_that_is_no_report_of_one_study_is_refused():
    with pytest.raises(Rejected, match="long_report"):
        read_sentences([("text", "The heart is normal. " * (MAX_REPORT_CHARS // 20))], 3)
