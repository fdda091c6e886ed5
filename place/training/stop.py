"""The stop file: who asks a run to end at its next step, and why."""

from __future__ import annotations

from pathlib import Path

_STOP_FILE = "stop"
ANOTHER_START = ("SIGUSR1", "hosts are missing")
"""How reasons begin after which the same command, started again by a scheduler, would go on."""


def ask_to_stop(run_dir: Path, why: str) -> None:
    """Ask the workers to save a checkpoint at their next step and end; the first reason stays."""
    if not is_asked(run_dir):
        (run_dir / _STOP_FILE).write_text(why)


def is_asked(run_dir: Path) -> bool:
    """Whether somebody asked; looked at in each step."""
    return (run_dir / _STOP_FILE).exists()


def read_stop(run_dir: Path) -> str:
    """Why the run was asked to stop; empty when it was not."""
    try:
        return (run_dir / _STOP_FILE).read_text() or "asked"
    except FileNotFoundError:
        return ""


def withdraw_stop(run_dir: Path, why: str | None = None) -> None:
    """Take the request back: any, or only one for this reason."""
    if why is None or read_stop(run_dir) == why:
        (run_dir / _STOP_FILE).unlink(missing_ok=True)
