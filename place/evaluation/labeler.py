"""What a report says of 14 findings, by rules and offline: positive, negative, uncertain or nothing.

The 14 are CheXpert's observations. The rules stand in `labeler.yaml`; how far they agree with what librarians indexed
of real reports is measured by `python -m place.evaluation.labeler_agreement`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from place.data.report import split_sentences

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1
NO_FINDING, DEVICES, OTHER = "No Finding", "Support Devices", "other"
OBSERVATIONS = (
    NO_FINDING, "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", DEVICES,
)  # fmt: skip
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
"""The five on which CheXpert's leader board and most papers report a mean of their own."""

_RULES = "labeler.yaml"
_GAP_WORDS = 6
_OR_AFTER = re.compile(r" (?:\w+ )?(?:(?:and/)?or|versus|vs\.?)\b")
_OR_BEFORE = re.compile(
    r"(?:(?<!left)(?<!right)(?<!small)(?<!mild)(?<!moderate)(?<!upper)(?<!lower) (?:and/)?or|\bversus|\bvs\.?)"
    r" (?:\w+[ -]){0,3}$"
)
_CLOSED_LIST = re.compile(
    r"(?:,(?: (?!(?:and|with|is|are|was|were|has|have|may|might|could|which|there|an?|the)\b)[\w/-]+)+?)+"
    r",? (?:or|nor)\b"
)
_VERB = re.compile(r"\b(?:is|are|was|were|has|have|there|shows?|demonstrates?|with|represent\w*|reflect\w*)\b")


class Finding(NamedTuple):
    """Patterns of one finding, as `labeler.yaml` explains them."""

    mentions: re.Pattern[str]
    negative: re.Pattern[str]
    uncertain: re.Pattern[str]
    unrelated: re.Pattern[str]
    past_counts: bool


class Cue(NamedTuple):
    """A word that turns the mentions before or after it, such as 'no' or 'cannot be excluded', and where it stands."""

    kind: str
    start: int
    end: int


class Labeler:
    """Rules read once; labels any number of sentences and reports."""

    def __init__(self, rules: dict[str, Any]):
        gap = rf"(?:,? (?!(?:{rules['gap_stops']})\b)[\w/'-]+){{0,{_GAP_WORDS}}}?"
        entries = rules["findings"] | {OTHER: rules["other_abnormalities"]}
        clear = rules["clear_lungs"]
        self._findings = {name: _compile_finding(entry, gap, clear) for name, entry in entries.items()}
        self._cue = re.compile("|".join(f"(?P<{kind}>{_join(texts)})" for kind, texts in rules["cues"].items()))
        self._past = re.compile(rf"\b(?:{rules['past']}) (?:(?!(?:{rules['past_stops']})\b)[\w-]+ ){{0,2}}$")
        self._scope_end = re.compile("|".join(rules["scope_ends"]))
        starts = "".join(rules["statement_starts"].split())
        self._statement = re.compile(rf"(?:,(?: (?:and|with))?| and| with) (?:{starts})\b")

    def label_report(self, report: str | Iterable[str]) -> dict[str, int | None]:
        """Label a report.

        Args:
            report: free text, or its sentences.
        Returns: for each of `OBSERVATIONS` 1 positive, 0 negative, -1 uncertain, None not mentioned. Of several
            sentences a positive one counts first, then an uncertain one, then a negative one. 'No Finding' is
            positive where no other finding but a device, and no other abnormality, is positive or uncertain; else 0;
            None for an empty report.
        Source: inferred (the CheXpert paper: its 14 observations, and positive before uncertain before negative).
        """
        sentences = split_sentences(report) if isinstance(report, str) else list(report)
        found: dict[str, list[int]] = {}
        for sentence in sentences:
            for name, value in self.label_sentence(sentence).items():
                found.setdefault(name, []).append(value)
        labels = {name: _choose(found.get(name, [])) for name in OBSERVATIONS}
        if sentences:
            told = [_choose(values) for name, values in found.items() if name != DEVICES]
            labels[NO_FINDING] = NEGATIVE if POSITIVE in told or UNCERTAIN in told else POSITIVE
        return labels

    def label_sentence(self, sentence: str) -> dict[str, int]:
        """Label what one sentence mentions; `other` stands for abnormalities beyond the 14. Source: ours."""
        text = " ".join(sentence.lower().split())
        found: dict[str, list[int]] = {}
        for clause in self._split_clauses(text):
            cues = self._find_cues(clause)
            for name, finding in self._findings.items():
                found.setdefault(name, []).extend(self._label_clause(clause, finding, cues))
        chosen = {name: _choose(values) for name, values in found.items()}
        return {name: value for name, value in chosen.items() if value is not None}

    def _split_clauses(self, text: str) -> list[str]:
        """Parts beyond which no cue reaches."""
        cuts = [0, *(match.start() for match in self._scope_end.finditer(text)), len(text)]
        return [text[begin:end] for begin, end in zip(cuts, cuts[1:]) if end > begin]

    def _find_cues(self, clause: str) -> list[Cue]:
        return [Cue(str(match.lastgroup), *match.span()) for match in self._cue.finditer(clause)]

    def _label_clause(self, clause: str, finding: Finding, cues: Sequence[Cue]) -> list[int]:
        clause = finding.unrelated.sub(lambda match: "#" * len(match[0]), clause)
        labels: list[int | None] = [
            value
            for pattern, value in ((finding.negative, NEGATIVE), (finding.uncertain, UNCERTAIN))
            for phrase in pattern.finditer(clause)
            if not self._is_taken_back(clause, phrase, cues)
        ]
        mentions = finding.mentions.finditer(clause)
        labels += [self._judge_mention(clause, mention, cues, finding.past_counts) for mention in mentions]
        return [label for label in labels if label is not None]

    def _is_taken_back(self, clause: str, phrase: re.Match[str], cues: Sequence[Cue]) -> bool:
        """'The lungs are not clear' says nothing certain."""
        kinds = ("negative_before", "ignored_before")
        return any(cue.kind in kinds and self._reaches(clause, cue, phrase) for cue in cues)

    def _judge_mention(self, clause: str, mention: re.Match[str], cues: Sequence[Cue], past_counts: bool) -> int | None:
        """Label of a mention; None where it is asked for or of the past. A denial counts before most doubts."""
        kinds = {cue.kind for cue in cues if self._reaches(clause, cue, mention)}
        if "uncertain_after" in kinds:
            return UNCERTAIN
        if kinds & {"negative_before", "negative_after", "negative_around"}:
            return NEGATIVE
        is_past = not past_counts and bool(self._past.search(clause[: mention.start()]))
        if is_past or kinds & {"ignored_before", "ignored_after"}:
            return None
        doubted = bool(kinds & {"uncertain_before", "uncertain_to_end"}) or _has_alternative(clause, mention)
        return UNCERTAIN if doubted else POSITIVE

    def _reaches(self, clause: str, cue: Cue, mention: re.Match[str]) -> bool:
        """Whether a cue speaks of a mention: nothing between them begins a statement of its own."""
        if cue.start < mention.end():
            goes_on = self._goes_on(clause, cue.end, max(mention.start(), cue.end))
            return cue.kind == "uncertain_to_end" or (goes_on and cue.kind.endswith(("_before", "_around")))
        return cue.kind.endswith(("_after", "_around")) and _reaches_back(clause[: cue.start], mention.end())

    def _goes_on(self, clause: str, begin: int, end: int) -> bool:
        """Whether a list that a cue began still runs: a new statement ends it, unless 'or' comes later in the list."""
        start = self._statement.search(clause, begin, end)
        return start is None or bool(_CLOSED_LIST.match(clause, start.start()))


def _reaches_back(before: str, end: int) -> bool:
    """Whether what is said at the end of `before` still speaks of the mention that ends at `end`."""
    between = before[end:]
    if re.search(r"[;,]", between) and not re.search(r"\b(?:or|and|nor)\b", between):
        return False
    # 'There is an effusion and pneumothorax is not seen': the verb before belongs to the first of the two.
    return not (_VERB.search(between) or (_VERB.search(before[:end]) and " and " in between))


def _has_alternative(clause: str, mention: re.Match[str]) -> bool:
    """Whether a mention is one side of 'or' or 'versus'; 'left or right', 'small or moderate' are no such sides."""
    return bool(_OR_AFTER.match(clause[mention.end() :]) or _OR_BEFORE.search(clause[: mention.start()]))


def _compile_finding(entry: dict[str, Any], gap: str, clear_lungs: list[str]) -> Finding:
    texts = {key: entry.get(key, []) for key in ("mentions", "negative", "uncertain", "unrelated")}
    if entry.get("denied_by_clear_lungs"):
        texts["negative"] = texts["negative"] + clear_lungs
    patterns = {key: re.compile(_join([text.replace("{gap}", gap) for text in each])) for key, each in texts.items()}
    return Finding(**patterns, past_counts=bool(entry.get("past_counts")))


def _join(patterns: Sequence[str]) -> str:
    """One pattern of whole words for several; none matches nothing."""
    whole = "|".join(f"(?:{pattern})" for pattern in patterns)
    return rf"(?:(?<!\w)|(?=\W))(?:{whole})(?:(?!\w)|(?<=\W))" if patterns else r"(?!)"


def _choose(values: Sequence[int]) -> int | None:
    return next((value for value in (POSITIVE, UNCERTAIN, NEGATIVE) if value in values), None)


@lru_cache(maxsize=1)
def build_labeler() -> Labeler:
    """The labeler with the rules of this package."""
    return Labeler(yaml.safe_load(_read_rules()))


def hash_rules() -> str:
    """Hash of the rules, by which results of different rules are told apart."""
    return hashlib.sha256(_read_rules().encode()).hexdigest()[:16]


def _read_rules() -> str:
    return (resources.files("place.evaluation") / _RULES).read_text(encoding="utf-8")
