"""The labeler on sentences written by hand: negation, doubt, lists, sides, time; then whole reports and phantoms."""

from __future__ import annotations

import numpy as np
import pytest

from place.data.phantom_facts import FINDINGS, Fact
from place.data.phantom_report import JOINT, NEGATIVE, POSITIVE, SHORT, fill_template
from place.evaluation.labeler import COMPETITION, OBSERVATIONS, OTHER, build_labeler, hash_rules

NAMES = {
    "ecm": "Enlarged Cardiomediastinum", "heart": "Cardiomegaly", "lesion": "Lung Lesion", "opacity": "Lung Opacity",
    "edema": "Edema", "cons": "Consolidation", "pna": "Pneumonia", "atel": "Atelectasis", "ptx": "Pneumothorax",
    "eff": "Pleural Effusion", "pleura": "Pleural Other", "fx": "Fracture", "dev": "Support Devices",
}  # fmt: skip
PLUS, MINUS, DOUBT = 1, 0, -1
CLEAR = ("lesion", "opacity", "edema", "cons", "pna", "atel")

SENTENCES = [
    # Said outright.
    ("There is a small left pleural effusion.", {"eff": PLUS}),
    ("Moderate cardiomegaly.", {"heart": PLUS}),
    ("The heart is enlarged.", {"heart": PLUS}),
    ("The cardiac silhouette is moderately enlarged.", {"heart": PLUS}),
    ("Enlargement of the cardiac silhouette.", {"heart": PLUS}),
    ("The mediastinum is widened.", {"ecm": PLUS}),
    ("Right upper lobe pneumonia.", {"pna": PLUS}),
    ("Bibasilar atelectasis, left greater than right.", {"atel": PLUS}),
    ("2.5 cm nodule in the right upper lobe.", {"lesion": PLUS}),
    ("Nodular opacity in the left mid lung.", {"lesion": PLUS, "opacity": PLUS}),
    ("Hazy opacity at the right base.", {"opacity": PLUS}),
    ("Pulmonary vascular congestion.", {"edema": PLUS}),
    ("Consolidation with air bronchograms in the lingula.", {"cons": PLUS}),
    ("Acute fracture of the left sixth rib.", {"fx": PLUS}),
    ("Biapical pleural thickening.", {"pleura": PLUS}),
    ("Right-sided PICC with its tip in the SVC.", {"dev": PLUS}),
    ("Sternal wires are intact.", {"dev": PLUS}),
    ("The patient is intubated.", {"dev": PLUS}),
    ("Right hydropneumothorax.", {"ptx": PLUS, "eff": PLUS}),
    ("Left lower lobe collapse.", {"atel": PLUS}),
    # Negation.
    ("No pneumothorax.", {"ptx": MINUS}),
    ("There is no pleural effusion.", {"eff": MINUS}),
    ("No evidence of pneumonia.", {"pna": MINUS}),
    ("Without evidence of edema.", {"edema": MINUS}),
    ("Negative for pneumothorax.", {"ptx": MINUS}),
    ("The heart is not enlarged.", {"heart": MINUS}),
    ("The heart is not significantly enlarged.", {"heart": MINUS}),
    ("Pneumothorax is not seen.", {"ptx": MINUS}),
    ("A pneumothorax is no longer visualized.", {"ptx": MINUS}),
    ("Pleural effusion: none.", {"eff": MINUS}),
    ("The lungs are free of consolidation.", {"cons": MINUS}),
    ("Absence of pleural effusion.", {"eff": MINUS}),
    ("Both lungs are clear.", dict.fromkeys(CLEAR, MINUS)),
    ("The lungs are not clear.", {}),
    ("There are no focal opacities to suggest pneumonia.", {"opacity": MINUS, "pna": MINUS}),
    ("Normal heart size.", {"heart": MINUS}),
    ("Heart size is upper limits of normal.", {"heart": MINUS}),
    ("Heart size and mediastinal contours are normal.", {"heart": MINUS, "ecm": MINUS}),
    ("The cardiomediastinal silhouette is within normal limits.", {"heart": MINUS, "ecm": MINUS}),
    ("The costophrenic angles are sharp.", {"eff": MINUS}),
    ("The ribs are intact.", {"fx": MINUS}),
    ("No support devices.", {"dev": MINUS}),
    ("Neither consolidation nor edema is seen.", {"cons": MINUS, "edema": MINUS}),
    ("Heart size and pulmonary vascular engorgement appear within limits of normal.", {"heart": MINUS, "edema": MINUS}),
    # Lists.
    ("No pneumothorax or pleural effusion.", {"ptx": MINUS, "eff": MINUS}),
    ("No focal consolidation, large pleural effusion, or pneumothorax.", {"cons": MINUS, "eff": MINUS, "ptx": MINUS}),
    ("No consolidation, small effusion, or pneumothorax.", {"cons": MINUS, "eff": MINUS, "ptx": MINUS}),
    ("No pneumothorax, effusion, infiltrate.", {"ptx": MINUS, "eff": MINUS, "opacity": MINUS}),
    ("No consolidation, edema and effusion.", {"cons": MINUS, "edema": MINUS, "eff": MINUS}),
    ("Pleural effusion and pneumothorax are not seen.", {"eff": MINUS, "ptx": MINUS}),
    ("Effusion, consolidation, and pneumothorax are absent.", {"eff": MINUS, "cons": MINUS, "ptx": MINUS}),
    ("Edema, small effusions and cardiomegaly.", {"edema": PLUS, "eff": PLUS, "heart": PLUS}),
    ("No nodules or masses.", {"lesion": MINUS}),
    # Where a negation ends.
    ("No pneumothorax, small left effusion.", {"ptx": MINUS, "eff": PLUS}),
    ("No pneumothorax but a small effusion is present.", {"ptx": MINUS, "eff": PLUS}),
    ("No pneumothorax; moderate cardiomegaly.", {"ptx": MINUS, "heart": PLUS}),
    ("There is no effusion and the heart is enlarged.", {"eff": MINUS, "heart": PLUS}),
    ("There is a small effusion and pneumothorax is not seen.", {"eff": PLUS, "ptx": MINUS}),
    ("No consolidation, however there is right basilar atelectasis.", {"cons": MINUS, "atel": PLUS}),
    ("Cardiomegaly without edema.", {"heart": PLUS, "edema": MINUS}),
    ("Lungs are clear except for left basilar atelectasis.", dict.fromkeys(CLEAR, MINUS) | {"atel": PLUS}),
    ("No effusion although the right costophrenic angle is blunted.", {"eff": DOUBT}),
    ("No opacity apart from a calcified nodule.", {"opacity": MINUS, "lesion": PLUS}),
    ("Left effusion, no pneumothorax.", {"eff": PLUS, "ptx": MINUS}),
    ("No effusion, no pneumothorax, mild cardiomegaly.", {"eff": MINUS, "ptx": MINUS, "heart": PLUS}),
    # Doubt.
    ("Pneumothorax cannot be excluded.", {"ptx": DOUBT}),
    ("A small pneumothorax cannot be entirely excluded.", {"ptx": DOUBT}),
    ("Cannot exclude pneumonia.", {"pna": DOUBT}),
    ("Possible left effusion.", {"eff": DOUBT}),
    ("Questionable small right effusion.", {"eff": DOUBT}),
    ("Basilar opacity may represent atelectasis or pneumonia.", {"opacity": PLUS, "atel": DOUBT, "pna": DOUBT}),
    ("Opacity concerning for pneumonia.", {"opacity": PLUS, "pna": DOUBT}),
    ("Findings suggest mild edema.", {"edema": DOUBT}),
    ("Atelectasis versus consolidation at the left base.", {"atel": DOUBT, "cons": DOUBT}),
    ("Rib fracture is suspected.", {"fx": DOUBT}),
    ("Pneumonia is unlikely.", {"pna": DOUBT}),
    ("Borderline heart size.", {"heart": DOUBT}),
    ("Borderline cardiomegaly.", {"heart": DOUBT}),
    ("Borderline enlarged heart.", {"heart": DOUBT}),
    ("The heart is borderline enlarged.", {"heart": DOUBT}),
    ("Effusion?", {"eff": DOUBT}),
    ("The differential includes infection and mild edema.", {"pna": DOUBT, "edema": DOUBT}),
    ("Blunting of the left costophrenic angle.", {"eff": DOUBT}),
    ("No pneumothorax, left basilar opacity may be atelectasis.", {"ptx": MINUS, "opacity": PLUS, "atel": DOUBT}),
    ("The nodule is not well seen.", {"lesion": DOUBT}),
    ("Atelectasis may be present.", {"atel": DOUBT}),
    ("Prominence of the interstitium may be secondary to edema.", {"opacity": PLUS, "edema": DOUBT}),
    ("Small or moderate effusion.", {"eff": PLUS}),
    # Committed, though in careful words.
    ("Opacity likely representing atelectasis.", {"opacity": PLUS, "atel": PLUS}),
    ("Consistent with pulmonary edema.", {"edema": PLUS}),
    ("Blunting of the left costophrenic angle, consistent with a small pleural effusion.", {"eff": PLUS}),
    # Time.
    ("The left effusion has resolved.", {"eff": MINUS}),
    ("Interval resolution of the right pneumothorax.", {"ptx": MINUS}),
    ("The pneumothorax has nearly resolved.", {"ptx": PLUS}),
    ("Resolving pneumonia.", {"pna": PLUS}),
    ("Resolved pneumothorax.", {"ptx": MINUS}),
    ("No significant change in the left effusion.", {"eff": PLUS}),
    ("Without interval change of the cardiomegaly.", {"heart": PLUS}),
    ("Stable cardiomegaly.", {"heart": PLUS}),
    ("The effusion has decreased.", {"eff": PLUS}),
    ("No new consolidation.", {"cons": MINUS}),
    ("The chest tube has been removed.", {"dev": MINUS}),
    ("Interval removal of the left chest tube.", {"dev": MINUS}),
    ("History of pneumonia.", {}),
    ("Prior pneumothorax.", {}),
    ("Old healed rib fractures.", {"fx": PLUS}),
    ("Compared to the prior exam, the effusion is larger.", {"eff": PLUS}),
    # Asked for, not found.
    ("Evaluate for pneumothorax.", {}),
    ("Rule out pneumonia.", {}),
    ("Recommend CT to exclude a mass.", {}),
    ("Fractures may not be visible on this study.", {}),
    ("Followup to document resolution of the consolidation.", {"cons": PLUS}),
    # Words that mean something else here.
    ("Pericardial effusion.", {}),
    ("Soft tissue edema.", {}),
    ("Thickening of the minor fissure line.", {}),
    ("Low bone density.", {}),
    ("Expansile rib lesion.", {}),
    # Left and right apart.
    ("Left pneumothorax, no right pneumothorax.", {"ptx": PLUS}),
    ("The right lung is clear, left basilar consolidation.", dict.fromkeys(CLEAR, MINUS) | {"cons": PLUS}),
]  # fmt: skip


@pytest.fixture(scope="module")
def labeler():
    return build_labeler()


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES)
def test_a_sentence_is_labelled_as_a_reader_would(labeler, sentence, expected):
    found = labeler.label_sentence(sentence)
    found.pop(OTHER, None)
    assert found == {NAMES[key]: value for key, value in expected.items()}


REPORTS = [
    (["The lungs are clear.", "No acute cardiopulmonary abnormality."], {"No Finding": PLUS}),
    (["Heart size is normal.", "Left chest wall pacemaker."], {"No Finding": PLUS, NAMES["dev"]: PLUS}),
    (["Mild degenerative changes of the spine.", "Lungs are clear."], {"No Finding": MINUS}),
    (["Possible pneumonia."], {"No Finding": MINUS, NAMES["pna"]: DOUBT}),
    (["No pneumothorax.", "Tiny right apical pneumothorax."], {NAMES["ptx"]: PLUS}),
    (["Atelectasis may be present.", "No atelectasis."], {NAMES["atel"]: DOUBT}),
    ([], {"No Finding": None, NAMES["ptx"]: None}),
]


@pytest.mark.parametrize(("sentences", "expected"), REPORTS)
def test_sentences_are_joined_to_a_report_positive_first(labeler, sentences, expected):
    labels = labeler.label_report(sentences)
    assert tuple(labels) == OBSERVATIONS
    assert {name: labels[name] for name in expected} == expected


def test_a_text_is_cut_into_sentences(labeler):
    text = "1. No pneumothorax. 2. Small left effusion."
    assert labeler.label_report(text) == labeler.label_report(["No pneumothorax.", "Small left effusion."])


def test_case_and_space_do_not_matter(labeler):
    assert labeler.label_sentence("NO   PLEURAL\nEFFUSION") == labeler.label_sentence("no pleural effusion")


def test_the_five_of_the_competition_are_among_the_fourteen():
    assert len(OBSERVATIONS) == 14
    assert set(COMPETITION) < set(OBSERVATIONS)


def test_rules_have_a_fingerprint():
    assert len(hash_rules()) == 16


PHANTOM = {
    "cardiomegaly": "heart", "effusion": "eff", "pneumothorax": "ptx", "consolidation": "cons", "nodule": "lesion",
    "edema": "edema", "atelectasis": "atel", "fracture": "fx",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(POSITIVE))
def test_every_phantom_sentence_states_its_finding(labeler, key):
    finding, rng = key.split()[0], np.random.default_rng(0)
    fact = Fact(finding, "left", "upper", "moderate", 20.0, key.partition(" ")[2], 6)
    for template in POSITIVE[key] + SHORT[key]:
        sentence = fill_template(template, fact, rng)
        assert labeler.label_sentence(sentence).get(NAMES[PHANTOM[finding]]) == PLUS, sentence


@pytest.mark.parametrize("finding", FINDINGS)
def test_every_phantom_denial_denies_its_finding_alone(labeler, finding):
    for sentence in NEGATIVE[finding]:
        found = labeler.label_sentence(sentence)
        assert found.get(NAMES[PHANTOM[finding]]) == MINUS, sentence
        assert set(found.values()) == {MINUS}, sentence


@pytest.mark.parametrize("findings", sorted(JOINT))
def test_every_joint_phantom_denial_denies_all_of_them(labeler, findings):
    for sentence in JOINT[findings]:
        found = labeler.label_sentence(sentence)
        assert {found.get(NAMES[PHANTOM[name]]) for name in findings} == {MINUS}, sentence
