"""What looks like a name that de-identification left in a report: a warning, never a proof of the contrary."""

from __future__ import annotations

import re

# A mark of de-identification, or a word behind a title's full stop that ended a sentence ("on MR. No effusion").
_NO_NAME = r"(?!X{2,}|_|(?i:the|this|there|no|not|is|in|if|it|of|on|and|for|(?:fe)?male)\b)"
_CAPITAL = r"[^\W\d_a-zß-öø-ÿ]"
# Names are bounded, so that a word of any length takes its time once.
_MIXED = rf"{_NO_NAME}{_CAPITAL}(?=[\w'’-]{{0,30}}[a-zß-öø-ÿ])[\w'’-]{{1,30}}"
_CAPITALS = rf"{_NO_NAME}{_CAPITAL}(?:{_CAPITAL}|['’-]){{1,30}}\b"
_TWO = r"{0}[ \t,]+(?:[A-Z]\.?[ \t]+)?{0}"
_TWO_MIXED, _TWO_CAPITALS = _TWO.format(_MIXED), _TWO.format(_CAPITALS)
_BEFORE = r"(?:(?i:van|von|de|den|der|del|di|da|du|la|le|el|al|bin)[ \t-]+|[dD]['’]|[A-Z]\.[ \t]*)*"
_BY = r"\b(?i:dictated|signed|transcribed|reported|read|reviewed|interpreted)[ \t]+(?i:by)"
_NAMES = re.compile(
    # Dr. Smith, Mrs. J. Doe, Dr.Li; the title in any case;
    rf"\b(?i:dr|drs|mr|mrs|ms|prof|professor|doctor|nurse)\b(?:\.[ \t]*|[ \t]+){_BEFORE}{_MIXED}"
    # DR. SMITH, DR SMITH, Mr SMITH, but neither DR CHEST (digital radiography) nor MR IMAGING;
    rf"|\b(?i:dr|drs|mr|mrs|ms|prof)\.[ \t]*{_BEFORE}{_CAPITALS}"
    rf"|\b(?:DR|Dr|Mr|Mrs|Ms)[ \t]+(?!(?:CHEST|CXR|PA|AP|PORTABLE)\b|X-?RAY|IMAG|RADIOG){_BEFORE}{_CAPITALS}"
    # Jane Doe, M.D.; in capitals DO is a verb, and MD stands behind other words too;
    rf"|\b{_TWO_MIXED},?[ \t]+(?:M\.?D\.?|D\.?O\.?|R\.?N\.?|Ph\.?D\.?)(?![a-z])"
    rf"|\b{_TWO_CAPITALS}(?:,[ \t]*(?:MD|RN|PHD)\b|,?[ \t]+(?:M\.D|D\.O|R\.N|PH\.D)\b)"
    # signed by Jane Doe; in capitals what is read or reported by someone is mostly no report, unless a colon follows;
    rf"|{_BY}:?[ \t]+{_TWO_MIXED}"
    rf"|(?:{_BY}:|\b(?i:dictated|signed|transcribed)[ \t]+(?i:by))[ \t]+{_TWO_CAPITALS}"
    # Patient: Jane Doe;
    rf"|\b(?i:patient|name):[ \t]*(?:{_TWO_MIXED}|{_TWO_CAPITALS})"
    # MRN: 12345, patient name: Doe;
    r"|\b(?:MRN|DOB|SSN|(?i:patient name|patient id|date of birth|medical record number))\b[ \t]*[:#=][ \t]*"
    rf"{_NO_NAME}\w"
    r"|\bMRN[ \t]+\d{5}"
    # addresses and telephone numbers.
    r"|\b[\w.+-]{1,64}@[\w-]{1,64}\.\w{2,}\b|(?<!\d)(?:\(\d{3}\)[-. ]?|\d{3}[-. ])\d{3}[-. ]\d{4}(?!\d)"
)


def has_name(text: str) -> bool:
    """Whether the text holds what looks like a person's name, number or address. The marks ___ and XXXX are none.

    English titles and phrases only; it warns of archives that were not de-identified, and clears none.
    Source: ours.
    """
    return _NAMES.search(text) is not None
