"""A log is followed while others write it."""

from __future__ import annotations

from pathlib import Path

from place.runlog import Tail


def test_a_tail_gives_each_whole_line_once_and_passes_over_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    early = Tail(path)
    assert list(early.read()) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(early.read()) == [{"step": 1}]
    late = Tail(path)
    with path.open("a") as file:
        file.write('ep": 2}\n{"step": 3, "lo{"step": 3}\n{"step": 4}\n')
    assert list(early.read()) == [{"step": 2}, {"step": 4}]
    assert list(late.read()) == [{"step": 4}]
    assert list(early.read()) == []
