"""What looks like a name that de-identification left in a report: a warning, never a proof of the contrary."""

from __future__ import annotations

import re

_MARKED = r"(?!X{2,}|_)"
_NAMES = re.compile(
    # Dr. Smith, Mrs. J. Doe; the title in any case, the name with a capital;
    r"\b(?i:dr|drs|mr|mrs|ms|prof|professor|doctor|nurse)\b\.?[ \t]+(?:[A-Z]\.[ \t]*)*[A-Z][a-z]{2,}"
    # Jane Doe, M.D.;
    r"|\b[A-Z][a-z]+,?[ \t]+(?:[A-Z]\.[ \t]*)?[A-Z][a-z]+,?[ \t]+(?:M\.?D\.?|D\.?O\.?|R\.?N\.?|Ph\.?D\.?)(?![a-z])"
    # signed by Jane Doe;
    r"|\b(?i:dictated|signed|transcribed|reported|read|reviewed|interpreted)[ \t]+(?i:by):?[ \t]+"
    rf"{_MARKED}[A-Z][a-z]{{2,}}[ \t,]+[A-Z][a-z]+"
    # MRN: 12345, patient name: Doe;
    r"|\b(?:MRN|DOB|SSN|(?i:patient name|patient id|date of birth|medical record number))\b[ \t]*[:#=][ \t]*"
    rf"{_MARKED}\w"
    # addresses and telephone numbers.
    r"|\b[\w.+-]{1,64}@[\w-]{1,64}\.\w{2,}\b|(?<!\d)\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}(?!\d)"
)


def has_name(text: str) -> bool:
    """Whether the text holds what looks like a person's name, number or address. The marks ___ and XXXX are none.

    English titles and phrases only; it warns of archives that were not de-identified, and clears none.
    Source: ours.
    """
    return _NAMES.search(text) is not None
