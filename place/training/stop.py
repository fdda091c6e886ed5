"""The stop file: who asks a run to end at its next step, and why."""

from __future__ import annotations

from pathlib import Path

# A file of its own each: a wish to grow is taken back, and must take no other wish with it.
_STOP_FILE, _RESIZE_FILE = "stop", "resize"
RESIZE = "more hosts are there"
"""Why workers stop who go on at once in a larger number; any other reason comes first."""
ANOTHER_START = ("SIGUSR1", "hosts are missing")
"""How reasons begin after which the same command, started again by a scheduler, would go on."""


def ask_to_stop(run_dir: Path, why: str) -> None:
    """Ask the workers to save a checkpoint at their next step and end; the first reason stays, but for RESIZE."""
    if why == RESIZE:
        (run_dir / _RESIZE_FILE).touch()
    elif not (run_dir / _STOP_FILE).exists():
        (run_dir / _STOP_FILE).write_text(why)


def is_asked(run_dir: Path) -> bool:
    """Whether somebody asked; looked at in each step."""
    return (run_dir / _STOP_FILE).exists() or (run_dir / _RESIZE_FILE).exists()


def read_stop(run_dir: Path) -> str:
    """Why the run was asked to stop; empty when it was not."""
    try:
        return (run_dir / _STOP_FILE).read_text() or "asked"
    except FileNotFoundError:
        return RESIZE if (run_dir / _RESIZE_FILE).exists() else ""


def withdraw_resize(run_dir: Path) -> None:
    """Take a wish to grow back; any other stays."""
    (run_dir / _RESIZE_FILE).unlink(missing_ok=True)


def withdraw_stop(run_dir: Path) -> None:
    """Take every request back."""
    withdraw_resize(run_dir)
    (run_dir / _STOP_FILE).unlink(missing_ok=True)
