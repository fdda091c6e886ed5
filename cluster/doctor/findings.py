"""What a check found, how checks are bounded in time, and how findings of several nodes become few lines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

OK, WARN, FAIL, SKIP = "OK", "WARN", "FAIL", "SKIP"
_ORDER = (FAIL, WARN, SKIP, OK)


class Finding(NamedTuple):
    """One line: `state` is OK, WARN, FAIL or SKIP; `advice` says what to do; `hosts` where it was found."""

    check: str
    state: str
    text: str
    advice: str = ""
    hosts: tuple[str, ...] = ()


Check = Callable[[], list[Finding]]


def run_check(name: str, check: Check, timeout_s: float) -> list[Finding]:
    """Run a check for at most `timeout_s` seconds; one that hangs or breaks is a FAIL of its own.

    A file system that does not answer cannot be interrupted: its thread is left behind, and ends with the process.
    """
    found: list[Finding] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            found.extend(check())
        except Exception as error:  # noqa: BLE001  a check that breaks must not hide what the others find
            faults.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"doctor-{name}")
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        advice = "look at what it waits for (storage, network), or give more time with --timeout"
        return [Finding(name, FAIL, f"no answer within {timeout_s:.0f} s", advice)]
    if faults:
        return [Finding(name, FAIL, f"{type(faults[0]).__name__}: {' '.join(str(faults[0]).split())[:300]}")]
    return found


def merge_hosts(findings: list[Finding]) -> list[Finding]:
    """Findings of many hosts as few lines: the same text once, and of those that are OK one a check."""
    order = list(dict.fromkeys(finding.check for finding in findings))
    merged: list[Finding] = []
    for check in order:
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in (item for item in findings if item.check == check):
            same = finding.state if finding.state == OK else finding.text
            groups.setdefault((finding.state, same), []).append(finding)
        lines = [_join(group) for group in groups.values()]
        merged += sorted(lines, key=lambda finding: _ORDER.index(finding.state))
    return merged


def _join(group: list[Finding]) -> Finding:
    texts = list(dict.fromkeys(finding.text for finding in group))
    hosts = tuple(dict.fromkeys(host for finding in group for host in finding.hosts))
    text = texts[0] if len(texts) == 1 else f"{texts[0]} (others alike, {len(texts)} differ in numbers)"
    return group[0]._replace(text=text, hosts=hosts)


def exit_code(findings: list[Finding]) -> int:
    """1 when anything failed."""
    return int(any(finding.state == FAIL for finding in findings))
