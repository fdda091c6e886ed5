"""What a run noted to be removed from a host is removed, and what others noted is not."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from place.node import clean_node, note_cache, note_path


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to write as somebody else")
def test_what_somebody_else_noted_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs, run = tmp_path / "home", tmp_path / "run"
    theirs.mkdir()
    note_cache(run, theirs)
    os.chown(note_path(run), 65534, 65534)
    assert clean_node(run) == 0
    assert theirs.is_dir()
    os.chown(note_path(run), 0, 0)
    clean_node(run)
    assert not theirs.exists()
