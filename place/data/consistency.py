"""Finds reports whose findings and impression contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TERMS = {
    "effusion": "effusion",
    "effusions": "effusion",
    "pneumothorax": "pneumothorax",
    "pneumothoraces": "pneumothorax",
    "cardiomegaly": "cardiomegaly",
    "consolidation": "consolidation",
    "consolidations": "consolidation",
    "edema": "edema",
    "oedema": "edema",
}
_DENIES = {"no", "without", "negative", "free", "absence"}
# Nothing else may stand between the "no" and the finding: "no large effusion" leaves room for a small one.
_BARE = re.compile(
    "evidence|signs?|of|for|any|or|and|nor|the|an?|definite|visible|focal|airspace|lung|acute|pleural|pulmonary|"
    "interstitial"
)
_SEEN = re.compile(
    r"\b(?:small|moderate|large|mild|severe|marked|massive|left|right|bilateral|bibasilar|new|increased|increasing|"
    r"persistent|stable|unchanged|there (?:is|are)|apical|basilar)\b"
)
_DOUBTED = re.compile(
    r"\b(?:no|not|without|negative|free|absent|absence|resol\w+|clear\w*|decreas\w+|improv\w+|may|might|possibl\w+|"
    r"probabl\w+|cannot|could|question\w*|versus|vs|rule|evaluat\w+|history|previous\w*|prior|if|unlikely|likely|"
    r"suggest\w*|concern\w*|suspicio\w+|suspect\w*|borderline|trace|pericardial|former|treated|removal|neither|nor|"
    r"consistent|compatible|represent\w*|trauma\w*|underlying|differential|consider\w*|appear\w*|limit\w*)\b|\?|"
    r"(?:xx+|_{3})\W+(?:pleural )?(?:effusion|pneumothora|cardiomegaly|consolidation|o?edema)"
)


def find_contradiction(sentences: Iterable[tuple[str, str]]) -> str:
    """The finding that one of findings and impression asserts and the other denies outright; empty if there is none.

    Args:
        sentences: (section, text) pairs of one report.
    Returns:
        effusion, pneumothorax, cardiomegaly, consolidation, edema or nothing. It errs to nothing: a sentence counts
        only if it is plain; one with doubt, comparison or a removed word before the finding says neither.
    Source: ours; English only.
    """
    asserted: dict[str, set[str]] = {"findings": set(), "impression": set()}
    denied: dict[str, set[str]] = {"findings": set(), "impression": set()}
    for section, text in sentences:
        if section in asserted:
            plain = " ".join(text.lower().split())
            denied[section] |= _find_denied(plain)
            if _SEEN.search(plain) and not _DOUBTED.search(plain):
                asserted[section] |= {_TERMS[word] for word in re.findall("[a-z]+", plain) if word in _TERMS}
    torn = (asserted["findings"] & denied["impression"]) | (asserted["impression"] & denied["findings"])
    return min(torn, default="")


def _find_denied(text: str) -> set[str]:
    found, denies = set(), False
    for word in re.findall(r"[a-z]+|[^a-z\s,/]", text):
        if word in _DENIES:
            denies = True
        elif denies and word in _TERMS:
            found.add(_TERMS[word])
        elif not _BARE.fullmatch(word):
            denies = False
    return found
