"""Writes the report of a phantom study: each sentence says what is drawn, or denies what is not."""

from typing import NamedTuple

from numpy.random import Generator

from place.data.phantom_anatomy import Pose
from place.data.phantom_facts import FINDINGS, Devices, Fact


class Report(NamedTuple):
    """Sentences of both sections and, for each, the index of the fact it states, or -1."""

    findings: tuple[str, ...]
    impression: tuple[str, ...]
    fact_of_sentence: tuple[int, ...]


POSITIVE: dict[str, tuple[str, ...]] = {
    "cardiomegaly": (
        "The cardiac silhouette is {sev} enlarged.",
        "There is {adj} cardiomegaly.",
        "{Adj} cardiomegaly with a cardiothoracic ratio of {ratio}.",
        "The heart is {sev} enlarged, with a cardiothoracic ratio of about {ratio}.",
        "Heart size is {sev} increased, consistent with cardiomegaly.",
        "{Adj} enlargement of the cardiac silhouette.",
    ),
    "effusion": (
        "There is a {adj} {side} pleural effusion.",
        "{Adj} {side} pleural effusion, measuring {size} cm in height at the lateral chest wall.",
        "Blunting of the {side} costophrenic angle, consistent with a {adj} pleural effusion.",
        "A {adj} {side}-sided pleural effusion is present, {size} cm high laterally.",
        "{Adj} amount of pleural fluid on the {side}, reaching {size} cm above the costophrenic angle.",
        "The {side} hemidiaphragm is obscured by a {adj} pleural effusion.",
    ),
    "effusion both": (
        "There are {adj} bilateral pleural effusions.",
        "{Adj} bilateral pleural effusions, each measuring about {size} cm in height.",
        "Blunting of both costophrenic angles, consistent with {adj} pleural effusions.",
        "{Adj} pleural effusions are present on both sides, {size} cm high laterally.",
        "Both hemidiaphragms are obscured by {adj} pleural effusions.",
    ),
    "pneumothorax": (
        "There is a {adj} {side} pneumothorax.",
        "{Adj} {side} pneumothorax with an apical rim of {size} cm.",
        "A visceral pleural line is seen on the {side}, {size} cm below the apex, in a {adj} pneumothorax.",
        "{Adj} {side}-sided pneumothorax, measuring {size} cm at the apex.",
        "A {adj} pneumothorax is present on the {side}.",
    ),
    "consolidation": (
        "There is {adj} consolidation in the {side} {zone} zone.",
        "{Adj} airspace consolidation in the {side} {zone} lung zone.",
        "Consolidation in the {side} {zone} lung, {adj}, with air bronchograms.",
        "A {adj} focal consolidation projects over the {side} {zone} zone.",
        "{Adj} air space opacity in the {side} {zone} lung zone, in keeping with consolidation.",
        "The {side} {zone} zone shows {adj} consolidation.",
    ),
    "nodule": (
        "There is a {size} cm nodule in the {side} {zone} zone.",
        "A {adj} round nodule of {size} cm projects over the {side} {zone} lung zone.",
        "{Adj} pulmonary nodule in the {side} {zone} lung, measuring {mm} mm.",
        "A {mm} mm nodule is seen in the {side} {zone} lung zone.",
        "Well defined {size} cm nodular density in the {side} {zone} zone.",
    ),
    "edema": (
        "There is {adj} pulmonary edema.",
        "{Adj} bilateral perihilar haze and interstitial lines, consistent with pulmonary edema.",
        "Perihilar opacities on both sides with septal lines represent {adj} pulmonary edema.",
        "{Adj} pulmonary edema with indistinct pulmonary vessels.",
        "Bilateral interstitial and perihilar opacities are compatible with {adj} edema.",
        "Central vascular congestion and {adj} pulmonary edema.",
    ),
    "atelectasis band": (
        "There is {adj} plate-like atelectasis in the {side} {zone} zone.",
        "{Adj} linear atelectasis in the {side} {zone} lung.",
        "A {adj} band of atelectasis crosses the {side} {zone} lung zone.",
        "Band-like opacity in the {side} {zone} zone represents {adj} subsegmental atelectasis.",
        "{Adj} discoid atelectasis is seen in the {side} {zone} zone.",
    ),
    "atelectasis lobar": (
        "There is {adj} atelectasis of the {side} lower lobe with elevation of the hemidiaphragm.",
        "{Adj} volume loss at the {side} base with a raised hemidiaphragm, consistent with atelectasis.",
        "The {side} hemidiaphragm is elevated by {adj} {side} lower lobe atelectasis.",
        "{Adj} {side} basilar atelectasis with volume loss.",
        "{Side} lower lobe collapse, {adj}, in keeping with atelectasis.",
    ),
    "fracture": (
        "There is a {adj} fracture of the {side} {rib} rib.",
        "{Adj} {side} {rib} rib fracture posteriorly.",
        "A {adj} fracture of the posterior {side} {rib} rib is seen.",
        "Cortical break of the {side} {rib} rib, consistent with a {adj} fracture.",
    ),
}

SHORT: dict[str, tuple[str, ...]] = {
    "cardiomegaly": ("{Adj} cardiomegaly.", "{Adj} enlargement of the heart.", "Cardiomegaly, {adj}."),
    "effusion": ("{Adj} {side} pleural effusion.", "{Side} pleural effusion, {adj}.", "{Side}-sided {adj} effusion."),
    "effusion both": ("{Adj} bilateral pleural effusions.", "Bilateral pleural effusions, {adj}."),
    "pneumothorax": (
        "{Adj} {side} pneumothorax.", "{Side} pneumothorax, {adj}.", "{Side} apical pneumothorax of {size} cm.",
    ),
    "consolidation": (
        "{Side} {zone} zone consolidation.", "{Adj} {side} {zone} zone consolidation, suspicious for pneumonia.",
        "{Side} {zone} lung consolidation may represent pneumonia.",
    ),
    "nodule": (
        "{Side} {zone} zone nodule of {size} cm, follow-up CT is recommended.", "{mm} mm {side} {zone} lung nodule.",
        "{Adj} {side} pulmonary nodule.",
    ),
    "edema": ("{Adj} pulmonary edema.", "Findings of {adj} pulmonary edema.", "{Adj} cardiogenic edema pattern."),
    "atelectasis band": ("{Side} {zone} zone atelectasis.", "{Adj} linear atelectasis on the {side}."),
    "atelectasis lobar": ("{Side} lower lobe atelectasis.", "{Adj} atelectasis with volume loss at the {side} base."),
    "fracture": ("{Side} {rib} rib fracture.", "{Adj} fracture of the {side} {rib} rib."),
}  # fmt: skip

NEGATIVE: dict[str, tuple[str, ...]] = {
    "cardiomegaly": (
        "Heart size is normal.", "The cardiac silhouette is normal in size.", "No cardiomegaly.",
        "The heart is not enlarged.", "Cardiac size is within normal limits.",
    ),
    "effusion": (
        "No pleural effusion.", "There is no pleural effusion.", "The costophrenic angles are sharp.",
        "No pleural fluid is seen.", "Both costophrenic angles are clear.",
    ),
    "pneumothorax": ("No pneumothorax.", "There is no pneumothorax.", "No evidence of pneumothorax."),
    "consolidation": (
        "No focal consolidation.", "There is no consolidation.", "No airspace consolidation is identified.",
        "No evidence of consolidation.",
    ),
    "nodule": ("No pulmonary nodule.", "There is no suspicious nodule.", "No nodule or mass is seen."),
    "edema": (
        "No pulmonary edema.", "There is no evidence of pulmonary edema.", "No edema.",
        "Pulmonary vascularity is normal, without edema.",
    ),
    "atelectasis": ("No atelectasis.", "There is no atelectasis.", "No evidence of atelectasis or volume loss."),
    "fracture": (
        "No acute fracture.", "There is no rib fracture.", "No displaced rib fracture is identified.",
        "The ribs are intact, without fracture.",
    ),
}  # fmt: skip

JOINT: dict[tuple[str, ...], tuple[str, ...]] = {
    ("effusion", "pneumothorax"): ("No pleural effusion or pneumothorax.", "There is no pneumothorax or effusion."),
    ("consolidation", "effusion", "pneumothorax"): ("No focal consolidation, pleural effusion, or pneumothorax.",),
    ("consolidation", "edema"): ("No consolidation or pulmonary edema.", "Neither consolidation nor edema is seen."),
    ("consolidation", "nodule", "edema", "atelectasis"): (
        "The lungs are clear.", "Both lungs are clear.", "The lungs are well aerated and clear.",
    ),
    ("cardiomegaly", "edema"): ("Normal heart size, without edema.",),
    ("effusion", "fracture"): ("No effusion and no rib fracture.",),
}  # fmt: skip

NORMAL = (
    "No acute cardiopulmonary process.", "Normal chest radiograph.", "No acute cardiopulmonary abnormality.",
    "No acute findings.", "Unremarkable chest radiograph.", "No radiographic evidence of acute disease.",
)  # fmt: skip

ADJECTIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "consolidation": {"mild": ("mild", "patchy"), "moderate": ("moderate",), "severe": ("dense", "severe")},
    "atelectasis": {"mild": ("mild", "minor"), "moderate": ("moderate",), "severe": ("marked", "severe")},
    "effusion": {"small": ("small",), "moderate": ("moderate",), "large": ("large",)},
    "nodule": {"small": ("small",), "moderate": ("medium-sized",), "large": ("large",)},
    "fracture": {"nondisplaced": ("nondisplaced", "non-displaced"), "displaced": ("displaced",)},
}
ADVERBS = {"mild": "mildly", "moderate": "moderately", "severe": "severely"}
ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def write_report(facts: tuple[Fact, ...], devices: Devices, pose: Pose, rng: Generator) -> Report:
    """Write findings and impression.

    Args:
        facts: what is drawn; sentences refer to them by index.
        devices: devices that are drawn.
        pose: view, inspiration and rotation, which a sentence may tell.
        rng: source of the wording.
    Returns:
        Report, each sentence ending in a full stop.
    Source: ours.
    """
    body = [(fill_template(_pick(rng, POSITIVE[_key(fact)]), fact, rng), i) for i, fact in enumerate(facts)]
    others = _write_negations(facts, rng) + _write_devices(devices, rng) + _write_pose(pose, rng)
    body += [(text, -1) for text in others]
    order = rng.permutation(len(body))
    findings = [body[i] for i in order]
    if rng.random() < 0.4:
        findings.insert(0, (_pick(rng, _VIEWS).format(view=pose.view), -1))
    impression = _write_impression(facts, rng)
    return Report(
        tuple(text for text, _ in findings),
        tuple(text for text, _ in impression),
        tuple(i for _, i in findings + impression),
    )


def fill_template(template: str, fact: Fact, rng: Generator) -> str:
    """Put a fact's words and measurements into a template."""
    adjective = _pick(rng, ADJECTIVES.get(fact.finding, {}).get(fact.severity, (fact.severity,)))
    text = template.format(
        adj=adjective, Adj=adjective.capitalize(), sev=ADVERBS.get(fact.severity, ""), side=fact.side,
        Side=fact.side.capitalize(), zone=fact.zone, size=f"{fact.size_mm / 10:.1f}", mm=round(fact.size_mm),
        ratio=f"{fact.size_mm:.2f}", rib=ORDINALS[fact.rib],
    )  # fmt: skip
    return text[0].upper() + text[1:]


def _pick(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _key(fact: Fact) -> str:
    extra = fact.kind or ("both" if fact.finding == "effusion" and fact.side == "both" else "")
    return f"{fact.finding} {extra}".strip()


def _write_negations(facts: tuple[Fact, ...], rng: Generator) -> list[str]:
    """Deny some of the absent findings; a normal study is denied more."""
    absent = {name for name in FINDINGS if name not in {fact.finding for fact in facts}}
    budget = int(rng.integers(2, 5)) if facts else int(rng.integers(3, 6))
    sentences = []
    joints = [names for names in JOINT if set(names) <= absent]
    if joints and rng.random() < 0.6:
        names = joints[int(rng.integers(len(joints)))]
        sentences.append(_pick(rng, JOINT[names]))
        absent -= set(names)
    for name in rng.permutation(sorted(absent))[: max(budget - len(sentences), 0)]:
        sentences.append(_pick(rng, NEGATIVE[str(name)]))
    return sentences


_VIEWS = ("{view} view of the chest.", "Single {view} radiograph of the chest.", "Frontal {view} chest radiograph.")


def _write_devices(devices: Devices, rng: Generator) -> list[str]:
    """Name the devices, nearly always."""
    said = []
    if devices.tube_mm:
        tip = f"{devices.tube_mm / 10:.1f} cm"
        said.append(_pick(rng, (f"The endotracheal tube tip is {tip} above the carina.",
                                f"Endotracheal tube in place, its tip {tip} above the carina.",
                                f"ET tube terminates {tip} above the carina.")))  # fmt: skip
    if devices.line_side:
        side = devices.line_side
        said.append(_pick(rng, (f"A {side} internal jugular central line ends in the superior vena cava.",
                                f"{side.capitalize()} central venous catheter with its tip in the SVC.",
                                f"{side.capitalize()} jugular catheter tip projects over the SVC.")))  # fmt: skip
    if devices.pacemaker:
        said.append(_pick(rng, ("A left-sided dual lead pacemaker is in place.",
                                "Left chest wall pacemaker with leads in the right atrium and ventricle.",
                                "Pacemaker generator over the left chest.")))  # fmt: skip
    if devices.sternotomy:
        said.append(_pick(rng, ("Median sternotomy wires are intact.", "The patient is status post median sternotomy.",
                                "Sternal wires are present.")))  # fmt: skip
    if devices.leads:
        said.append(_pick(rng, ("ECG leads overlie the chest.", "Monitoring leads project over the thorax.",
                                "Overlying ECG electrodes are noted.")))  # fmt: skip
    return said


def _write_pose(pose: Pose, rng: Generator) -> list[str]:
    """Comment on inspiration and rotation where they stand out."""
    said = []
    if pose.inspiration < -0.8:
        said.append(_pick(rng, ("Lung volumes are low.", "Low inspiratory volumes.", "The inspiration is shallow.")))
    if pose.inspiration > 0.75:
        said.append(_pick(rng, ("The lungs are well expanded.", "Good inspiration.", "Lung volumes are large.")))
    if abs(pose.rotation) > 0.7:
        side = "left" if pose.rotation > 0 else "right"
        said.append(_pick(rng, (f"The patient is rotated to the {side}.", f"Mild rotation to the {side} is noted.")))
    for up, side in zip(pose.raised, ("right", "left")):
        if up:
            said.append(_pick(rng, (f"The {side} hemidiaphragm is mildly elevated.",
                                    f"Mild eventration of the {side} hemidiaphragm.")))  # fmt: skip
    return said


def _write_impression(facts: tuple[Fact, ...], rng: Generator) -> list[tuple[str, int]]:
    """One to three of the findings in short, or that there are none."""
    if not facts:
        return [(_pick(rng, NORMAL), -1)]
    order = rng.permutation(len(facts))[: max(1, int(rng.integers(len(facts) + 1)), len(facts) - 1)]
    said = [(fill_template(_pick(rng, SHORT[_key(facts[i])]), facts[i], rng), int(i)) for i in order]
    absent = sorted(set(FINDINGS) - {fact.finding for fact in facts})
    if rng.random() < 0.25:
        said.append((_pick(rng, NEGATIVE[str(rng.choice(absent))]), -1))
    return said
