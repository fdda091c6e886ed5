"""A report as sentences, and the hashes by which identical ones are known."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

_LOOK_BACK = 64
# Reports are cut at a full stop only if the word before it is none of these.
_TITLES = {"dr", "drs", "mr", "mrs", "ms", "prof", "st"}
_ABBREVIATIONS = _TITLES | {"vs", "approx", "ca", "cf", "e.g", "i.e", "eg", "ie", "fig", "figs", "resp", "incl", "dept"}
_BEFORE_NUMBER = {"no", "nos", "fig", "figs", "ser", "se", "im", "pt", "vol"}

_STOP = re.compile(r"(?<![.!?])[.!?]+[\"')\]]*(?=\s|$)|(?<=[a-z]{2})\.(?=[A-Z])|(?<=[a-z]{2})\.(?=\d{1,2}[.)]\s)")
_MARKER = re.compile(r"(?<!\S)(\d{1,2})[.)](?=\s+[A-Z_])")
_BREAK = re.compile(r"\n\s*\n|\n\s*(?=\d{1,2}[.)]\s|[-*•]\s)")
_BULLET = re.compile(r"^[-*•]\s+")
_WORD = re.compile(r"[^\W\d_]|_{3}")
# They carry no finding; "no", "not" and "without" do, and stay.
_FILLING = re.compile(
    r"x{2,}|an?|the|is|are|was|were|be|been|being|there|this|that|these|its?|ha[sd]|have|of|in|on|at|to|for|with|within"
    r"|and|or|as|by|from|seen|noted|identified|demonstrated|present|evidence|definite|again|also|appears?|which"
)
_LEADING_MARK = re.compile(r"^(?:\d{1,2}[.)]|[-*•])\s+")


def split_sentences(text: str) -> list[str]:
    """Cut text into sentences, words and numbers unchanged, white space collapsed.

    '2.5 cm', 'Dr. Smith', enumeration marks ('1. ...') and the de-identification marks XXXX and ___ do not end a
    sentence; an empty line, a bullet or a numbered line does.
    Source: ours.
    """
    sentences = []
    for block in _BREAK.split(text):
        flat = _BULLET.sub("", " ".join(block.split()))
        start = 0
        for cut in _cuts(flat):
            sentences.append(flat[start:cut].strip())
            start = cut
        sentences.append(flat[start:].strip())
    return _join_wordless(sentences)


def _cuts(text: str) -> list[int]:
    """Positions behind which a sentence begins."""
    marks = _enumeration(text)
    inside = {position for mark in marks for position in range(*mark)}
    cuts = [
        stop.end()
        for stop in _STOP.finditer(text)
        if stop.start() not in inside and not _is_abbreviation(text, stop.start(), stop.end())
    ]
    return sorted({*cuts, *(begin for begin, _ in marks if begin)})


def _enumeration(text: str) -> list[tuple[int, int]]:
    """Spans of '1.', '2.', ... that count up from the first; 'on image 2. The heart' counts nothing."""
    spans, expected = [], 1
    for mark in _MARKER.finditer(text):
        before = text[max(0, mark.start() - 2) : mark.start()].rstrip()
        opens = not before or before[-1] in ".:!?"
        if int(mark[1]) == expected and (opens or expected > 1):
            spans.append(mark.span())
            expected += 1
    return spans if len(spans) > 1 or (spans and spans[0][0] == 0) else []


def _is_abbreviation(text: str, position: int, end: int) -> bool:
    if text[position] != ".":
        return False
    words = text[
        max(0, position - _LOOK_BACK) : position
    ].split()  # not all of it: reports of any length take their time
    is_first = position <= _LOOK_BACK and len(words) == 1
    word = words[-1].lstrip("(['\"").lower() if words else ""
    following = text[end : end + 2].lstrip()
    if word in _BEFORE_NUMBER and following[:1].isdigit():
        return True
    if len(word) == 1 and word.isalpha() and len(words) > 1:
        return words[-2].lower().rstrip(".") in _TITLES
    return word in _ABBREVIATIONS or (is_first and word.isdigit() and len(word) <= 2 and bool(following))


def _join_wordless(sentences: list[str]) -> list[str]:
    """Stray stops and numbers belong to the sentence before them, so that nothing is lost."""
    kept: list[str] = []
    for sentence in sentences:
        if _WORD.search(sentence):
            kept.append(sentence)
        elif kept and re.search(r"\w", sentence):
            kept[-1] += " " + sentence
    return kept


def normalize_text(text: str) -> str:
    """Lower case, one space, no enumeration mark and no final stop: what makes two sentences or reports the same one.

    Source: ours.
    """
    flat = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return _LEADING_MARK.sub("", flat).rstrip(" .!?;,")


def hash_text(text: str) -> int:
    """Positive 63-bit hash of the normalised text; never 0, which marks an empty place. Source: ours."""
    digest = hashlib.sha256(normalize_text(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


def hash_near(sentences: Iterable[str]) -> int:
    """Positive 63-bit hash by which reports that say nearly the same are known: one number, in any order of reports.

    Sentences are taken as sets of words without case, order, plural, filling words, numbers and the marks of
    de-identification, and the report as the set of its sentences. Chosen over shingles with locality-sensitive
    hashing, because it holds nothing in memory, does not hang on what else is in the archive, and never chains
    reports that differ into one group.
    Source: ours.
    """
    cores = {" ".join(sorted(core)) for sentence in sentences if (core := _core_words(sentence))}
    digest = hashlib.sha256("\n".join(sorted(cores)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


def _core_words(sentence: str) -> set[str]:
    words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", sentence).lower())
    kept = (word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words)
    return {word for word in kept if not _FILLING.fullmatch(word)}


def count_words(text: str) -> int:
    """Words with a letter in them, as white space cuts them."""
    return sum(any(letter.isalpha() for letter in word) for word in text.split())
