"""What a run noted to be removed from a host is removed, and what others noted is not."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from place.node import clean_folder, clean_node, note_cache, note_path


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


def test_hosts_that_share_a_temporary_folder_clean_up_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run, caches = tmp_path / "run", {name: tmp_path / f"cache-{name}" for name in ("gpu-1", "rack-gpu-1")}
    for name, cache in caches.items():
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        cache.mkdir()
        note_cache(run, cache)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-1")
    clean_node(run)
    assert [cache.is_dir() for cache in caches.values()] == [False, True]
    clean_folder(tmp_path)
    assert caches["rack-gpu-1"].is_dir()
    monkeypatch.setattr(socket, "gethostname", lambda: "rack-gpu-1")
    clean_folder(tmp_path)
    assert not caches["rack-gpu-1"].exists()


def test_two_that_clean_up_at_once_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    note_cache(tmp_path / "run", tmp_path / "cache")
    plain = os.geteuid

    def ask_while_another_cleans() -> int:
        note_path(tmp_path / "run").unlink()
        return plain()

    monkeypatch.setattr(os, "geteuid", ask_while_another_cleans)
    assert clean_node(tmp_path / "run") == 0
