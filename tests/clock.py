"""A clock for tests of what is timed."""

from __future__ import annotations


class Clock:
    """Seconds that go on where somebody sleeps and nowhere else, so that a busy machine changes nothing."""

    def __init__(self, now_s: float = 0.0):
        self.now_s = now_s

    def read(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
