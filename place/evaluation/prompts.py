"""Sentences that a radiologist writes when a finding is there, and when it is not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from place.config import UsageError


class FindingPrompts(NamedTuple):
    """Prompt sentences of one finding; `origin` is `file`, `built in` or `template`."""

    positive: list[str]
    negative: list[str]
    origin: str


TEMPLATES = (
    ["There is {}.", "Findings are consistent with {}.", "{} is present."],
    ["There is no {}.", "No evidence of {}.", "No {} is seen."],
)

BUILT_IN: dict[str, tuple[list[str], list[str]]] = {
    "cardiomegaly": (
        ["Cardiomegaly.", "The heart is enlarged.", "The cardiac silhouette is enlarged."],
        ["No cardiomegaly.", "The heart size is normal.", "The cardiac silhouette is normal in size."],
    ),
    "effusion": (
        ["There is a left pleural effusion.", "There is a right pleural effusion.", "Pleural effusion is present."],
        ["There is no pleural effusion.", "No pleural effusion.", "The costophrenic angles are sharp."],
    ),
    "pneumothorax": (
        ["There is a left pneumothorax.", "There is a right pneumothorax.", "Pneumothorax is present."],
        ["There is no pneumothorax.", "No pneumothorax.", "No pneumothorax is seen."],
    ),
    "consolidation": (
        [
            "There is a consolidation in the left lung.",
            "There is a consolidation in the right lung.",
            "Focal consolidation is present.",
        ],
        ["There is no consolidation.", "No focal consolidation.", "The lungs are clear."],
    ),
    "nodule": (
        ["There is a nodule in the left lung.", "There is a nodule in the right lung.", "A pulmonary nodule is seen."],
        ["There is no pulmonary nodule.", "No nodule.", "No suspicious nodule is seen."],
    ),
    "edema": (
        [
            "There is pulmonary edema.",
            "Findings are consistent with pulmonary edema.",
            "Interstitial edema is present.",
        ],
        ["There is no pulmonary edema.", "No pulmonary edema.", "The pulmonary vasculature is normal."],
    ),
    "atelectasis": (
        [
            "There is atelectasis at the left base.",
            "There is atelectasis at the right base.",
            "Bibasilar atelectasis is present.",
        ],
        ["There is no atelectasis.", "No atelectasis.", "No evidence of atelectasis."],
    ),
    "fracture": (
        ["There is a left rib fracture.", "There is a right rib fracture.", "A displaced rib fracture is seen."],
        ["There is no rib fracture.", "No acute fracture.", "The bones are intact."],
    ),
    "pneumonia": (
        [
            "There is pneumonia.",
            "Findings are consistent with pneumonia.",
            "Airspace opacity concerning for pneumonia.",
        ],
        ["There is no pneumonia.", "No evidence of pneumonia.", "The lungs are clear."],
    ),
    "covid 19": (
        [
            "There is COVID-19 pneumonia.",
            "Findings are consistent with COVID-19.",
            "Bilateral peripheral opacities are consistent with COVID-19.",
        ],
        ["There is no evidence of COVID-19.", "No findings of COVID-19 pneumonia.", "The lungs are clear."],
    ),
    "lung opacity": (
        [
            "There is an opacity in the left lung.",
            "There is an opacity in the right lung.",
            "Airspace opacity is present.",
        ],
        ["There is no airspace opacity.", "No focal opacity.", "The lungs are clear."],
    ),
    "enlarged cardiomediastinum": (
        ["The cardiomediastinal silhouette is enlarged.", "The mediastinum is widened."],
        ["The cardiomediastinal silhouette is normal.", "The mediastinal contours are normal."],
    ),
    "mass": (
        ["There is a mass in the left lung.", "There is a mass in the right lung.", "A pulmonary mass is seen."],
        ["There is no pulmonary mass.", "No mass.", "No suspicious mass is seen."],
    ),
    "pleural other": (
        ["There is pleural thickening.", "Pleural scarring is present."],
        ["There is no pleural thickening.", "The pleural surfaces are normal."],
    ),
    "support devices": (
        ["A central venous catheter is in place.", "An endotracheal tube is in place.", "A pacemaker is in place."],
        ["No support devices.", "There are no lines or tubes."],
    ),
    "emphysema": (
        ["There is emphysema.", "The lungs are hyperinflated.", "Emphysematous changes are present."],
        ["There is no emphysema.", "The lungs are normally inflated."],
    ),
    "fibrosis": (
        ["There is pulmonary fibrosis.", "Fibrotic changes are present."],
        ["There is no pulmonary fibrosis.", "No fibrotic changes."],
    ),
    "hernia": (
        ["There is a hiatal hernia.", "A large hiatal hernia is present."],
        ["There is no hiatal hernia.", "No hernia."],
    ),
    "no finding": (
        ["No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "The lungs are clear."],
        [
            "There is an acute cardiopulmonary abnormality.",
            "Abnormal chest radiograph.",
            "There is an opacity in the lungs.",
        ],
    ),
}

LONGEST_ABBREVIATION = 5
"""Letters; a longer word in capitals is a word."""

SYNONYMS = {
    "pleural effusion": "effusion",
    "infiltration": "lung opacity",
    "infiltrate": "lung opacity",
    "airspace opacity": "lung opacity",
    "lung lesion": "nodule",
    "pulmonary edema": "edema",
    "pulmonary nodule": "nodule",
    "rib fracture": "fracture",
    "pleural thickening": "pleural other",
    "normal": "no finding",
    "covid": "covid 19",
    "covid 19 pneumonia": "covid 19",
}


def build_prompts(findings: Sequence[str], path: str | Path | None = None) -> dict[str, FindingPrompts]:
    """Find prompts for each finding: from the file, else built in (phantom, CheXpert, NIH and COVIDx names), else
    templates.

    Args:
        findings: names as the data set has them; case, `_` and `-` do not matter.
        path: YAML of `finding: {positive: [...], negative: [...]}`.
    Raises:
        UsageError: a file that cannot be read or is not of that shape.
    Source: inferred (CheXzero, prompt pairs; GLoRIA, several prompts a finding); the sentences are ours.
    """
    from_file = _read_prompts(Path(path)) if path else {}
    return {name: from_file.get(_plain(name)) or _build_default(name) for name in findings}


def _build_default(name: str) -> FindingPrompts:
    plain = _plain(name)
    known = BUILT_IN.get(SYNONYMS.get(plain, plain))
    if known:
        return FindingPrompts(*known, origin="built in")
    positive, negative = ([template.format(_spell(name)) for template in templates] for templates in TEMPLATES)
    return FindingPrompts(positive, negative, "template")


def _read_prompts(path: Path) -> dict[str, FindingPrompts]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"evaluation.prompts {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"evaluation.prompts {path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise UsageError(f"evaluation.prompts {path}: expected `finding: {{positive: [...], negative: [...]}}`")
    return {_plain(str(name)): _check_entry(path, name, entry) for name, entry in tree.items()}


def _check_entry(path: Path, name: Any, entry: Any) -> FindingPrompts:
    sides = ("positive", "negative")
    complete = isinstance(entry, dict) and set(entry) == set(sides)
    if not complete or not all(_is_sentences(entry[side]) for side in sides):
        raise UsageError(
            f"evaluation.prompts {path}: '{name}' needs `positive` and `negative`, each a list of sentences"
        )
    return FindingPrompts(list(entry["positive"]), list(entry["negative"]), "file")


def _is_sentences(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item.strip() for item in value)


def _spell(name: str) -> str:
    """A name as it stands in a sentence: in small letters, but for abbreviations in capitals (ILD, COVID-19)."""
    words = " ".join(name.replace("_", " ").split())
    return re.sub("[^\\W\\d]+", lambda word: word[0] if _is_abbreviation(word[0]) else word[0].lower(), words)


def _is_abbreviation(word: str) -> bool:
    return word.isupper() and 1 < len(word) <= LONGEST_ABBREVIATION


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
