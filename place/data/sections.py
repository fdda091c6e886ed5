"""The sections of a free-text report, under one name each, and those of them that tell of the image."""

from __future__ import annotations

import re

# How radiologists and archives head their sections (MIMIC-CXR above all), and what we call each.
_NAMES = {
    "findings": ("finding", "findings", "observations", "report", "body", "comment", "comments", "result", "results"),
    "findings_impression": (
        "findings and impression",
        "findings/impression",
        "findings/impressions",
        "impression and findings",
    ),
    "impression": (
        "impression",
        "impressions",
        "conclusion",
        "conclusions",
        "opinion",
        "summary",
        "impression and recommendation",
        "impression and recommendations",
        "final impression",
    ),
    "wet_read": ("wet read", "preliminary read", "preliminary report", "pfi", "preliminary findings"),
    "addendum": ("addendum", "addenda", "final addendum"),
    "final_report": ("final report",),
    "examination": ("examination", "exam", "study", "procedure", "type of examination", "examinations", "study date"),
    "indication": (
        "indication",
        "indications",
        "clinical indication",
        "reason for exam",
        "reason for examination",
        "reason for study",
        "reason for the exam",
        "reason",
        "clinical question",
    ),
    "history": (
        "history",
        "clinical history",
        "clinical information",
        "patient history",
        "medical history",
        "medical condition",
        "underlying medical condition",
    ),
    "comparison": ("comparison", "comparisons", "comparison exam", "comparison film", "reference exam", "compared to"),
    "technique": ("technique", "techniques", "views", "view", "protocol"),
    "recommendation": ("recommendation", "recommendations"),
    "notification": ("notification", "notifications", "communication", "critical result", "attestation"),
}
_SECTION_OF = {heading: section for section, headings in _NAMES.items() for heading in headings}
_LONGEST_FIRST = sorted(_SECTION_OF, key=len, reverse=True)
_KNOWN = "|".join(re.escape(heading).replace(r"\ ", r"[ \t]+") for heading in _LONGEST_FIRST)
_KNOWN_UPPER = "|".join(re.escape(heading.upper()).replace(r"\ ", r"[ \t]+") for heading in _LONGEST_FIRST)
_HEADING = re.compile(
    # A wet read or an addendum carries its time and its reader;
    r"^[ \t]*(?P<dated>WET READ|(?:FINAL )?ADDENDUM)\b[^a-z\n]*$"
    # a known heading has its colon, in any case, at the start of a line or behind a sentence;
    rf"|(?:^|(?<=[.:!?\n]))[ \t]*(?P<known>(?i:{_KNOWN}))(?:[ \t]*\([^()\n]*\))?[ \t]*:"
    # or stands in capitals alone on its line;
    rf"|^[ \t]*(?P<alone>{_KNOWN_UPPER})[ \t]*$"
    # any other line that begins in capitals and has a colon.
    r"|^[ \t]*(?P<other>[A-Z][A-Z0-9/,()& \t.-]{2,60}[A-Z)])[ \t]*:",
    re.MULTILINE,
)
_RULE = re.compile(r"^[ \t]*[_=-]{8,}[ \t]*$", re.MULTILINE)
_FILM = re.compile(r"\b(?:CHEST|VIEWS?|RADIOGRAPHS?|X-?RAY|CXR)\b")
_TOLD = {"findings", "impression"}


def parse_report(text: str) -> list[tuple[str, str]]:
    """Every section of a free-text report in its order.

    Args:
        text: a whole report, as MIMIC-CXR has it or in one line; headings may be odd or missing.
    Returns:
        (section, text) pairs that hold all words of the report but its headings. Sections are findings, impression,
        wet_read, addendum, examination, indication, history, comparison, technique, recommendation, notification, and
        `body` for what stands under no heading. A subheading within the findings or the impression ('LUNGS:') stays
        part of them; a heading that names a film ('PA AND LATERAL VIEWS OF THE CHEST:') opens findings.
    Source: ours; the headings are those of MIMIC-CXR's reports.
    """
    sections: list[tuple[str, str]] = []
    current, begin = "body", 0
    for mark in _HEADING.finditer(text):
        name, keeps_heading = _name_section(mark, current)
        if name == current and keeps_heading:
            continue
        sections.append((current, text[begin : mark.start()]))
        current, begin = name, mark.end()
    sections.append((current, text[begin:]))
    return [(name, body) for name, raw in sections if (body := _RULE.sub("", raw).strip())]


def _name_section(mark: re.Match[str], current: str) -> tuple[str, bool]:
    """Section that a heading opens, and whether it is a subheading that belongs to the text."""
    known = mark["known"] or mark["alone"]
    if known:
        name = _SECTION_OF[" ".join(known.lower().split())]
        return {"findings_impression": "findings", "final_report": "body"}.get(name, name), False
    if mark["dated"]:
        return ("wet_read" if mark["dated"].startswith("WET") else "addendum"), False
    if current in _TOLD or current == "wet_read":
        return current, True
    return ("findings" if _FILM.search(mark["other"]) else "body"), False


def split_sections(text: str) -> list[tuple[str, str]]:
    """Cut free text at its headings, and take what tells of the image.

    Args:
        text: a whole report.
    Returns:
        (section, text) pairs: `findings` and `impression` where the report has them; else, as `report`, what stands
        under no heading; else the last paragraphs under a heading such as COMPARISON; else the wet read, which a
        final report makes void. History, technique and addenda are left out. A text without any heading is `report`.
    Source: ours.
    """
    sections = parse_report(text)
    found: dict[str, list[str]] = {}
    for name, body in sections:
        found.setdefault(name, []).append(body)
    told = [(name, "\n\n".join(found[name])) for name in found if name in _TOLD]
    if told:
        return told
    bodies = [part for part in found.get("body", []) if _is_told(part, len(sections))]
    rest = bodies or _last_paragraphs(sections) or found.get("wet_read", [])
    return [("report", "\n\n".join(rest))] if rest else []


def _is_told(body: str, num_sections: int) -> bool:
    """A body beside headings must be more than the title of the film, such as 'AP CHEST, 5:24 A.M. ___'."""
    return num_sections == 1 or any(letter.islower() for letter in body)


def _last_paragraphs(sections: list[tuple[str, str]]) -> list[str]:
    """What follows an empty line in the last section, whose heading names the first paragraph only."""
    told = [(name, body) for name, body in sections if name not in ("wet_read", "addendum", "notification", "body")]
    if not told:
        return []
    paragraphs = re.split(r"\n[ \t]*\n", told[-1][1])[1:]
    return ["\n\n".join(paragraphs).strip()] if paragraphs else []
