"""A salt of the tests' own, never the user's."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_salt(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
