"""Report files to sections: free text as of MIMIC-CXR, and the XML of Open-i; each way to fail has a reason code."""

from __future__ import annotations

from xml.etree import ElementTree

from place.data.images import Rejected, read_file
from place.data.sections import split_sections

MAX_REPORT_BYTES = 1 << 20
_WANTED = {"FINDINGS": "findings", "IMPRESSION": "impression"}


def read_report(path: str) -> list[tuple[str, str]]:
    """(section, text) pairs of a report file. Raises Rejected: `missing_report`, `unreadable_report`. Source: ours."""
    try:
        data = read_file(path, MAX_REPORT_BYTES)
    except Rejected as fault:
        reason = "missing_report" if fault.reason == "missing_image" else "unreadable_report"
        raise Rejected(reason, fault.detail) from None
    return parse_openi(data) if path.lower().endswith(".xml") else split_sections(decode_text(data))


def decode_text(data: bytes) -> str:
    """UTF-8, or what Windows writes. Raises Rejected: `unreadable_report` if it is no text at all. Source: ours."""
    if b"\0" in data:
        raise Rejected("unreadable_report", "no text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def parse_openi(data: bytes) -> list[tuple[str, str]]:
    """Findings and impression of an Open-i report. Raises Rejected: `unreadable_report`. Source: ours."""
    nodes = parse_xml(data).iter("AbstractText")
    texts = [(_WANTED.get((node.get("Label") or "").upper()), "".join(node.itertext()).strip()) for node in nodes]
    return [(section, text) for section, text in texts if section and text]


def parse_xml(data: bytes) -> ElementTree.Element:
    """The root of an XML document without entities of its own. Raises Rejected: `unreadable_report`. Source: ours."""
    if b"<!DOCTYPE" in data or b"\0" in data:  # in UTF-16 a document type would not be seen
        raise Rejected("unreadable_report", "XML with a document type, or not in UTF-8: entities are not expanded")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        raise Rejected("unreadable_report", "no well-formed XML") from None
