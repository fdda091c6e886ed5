"""A suite of minutes goes on where it was: what passed at this commit is left out. Figures come at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rig.rig import Rig, wait_until
from slurm.jobs import CHAOS_EPOCHS, Job, are_all_idle, run_here

from place.config import PrepareConfig
from place.data.prepare import run_prepare


def _read_passed() -> tuple[Path | None, set[str]]:
    """PLACE_SLURM_PASSED names the file that passed cases are noted in; none runs all."""
    path = Path(os.environ["PLACE_SLURM_PASSED"]) if os.environ.get("PLACE_SLURM_PASSED") else None
    return path, set(path.read_text().splitlines()) if path and path.is_file() else set()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _, passed = _read_passed()
    done = [item for item in items if item.nodeid in passed]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in passed]
        config.stash[DONE] = len(done)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path, _ = _read_passed()
    if path and report.when == "call" and report.passed and "tests/slurm" in report.nodeid:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(report.nodeid + "\n")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(DONE, 0):
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    figures = [(report.nodeid.split("::")[-1], *item) for report in reports for item in report.user_properties]
    for name, what, value in dict.fromkeys(figures):
        terminalreporter.write_line(f"{what}: {value}   ({name})")
    if config.stash.get(DONE, 0):
        terminalreporter.write_line(f"{config.stash[DONE]} cases passed before at this state of the code")


DONE: pytest.StashKey[int] = pytest.StashKey()


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Rig(tmp_path_factory.mktemp("rig")).running() as rig:
        yield rig


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "phantoms"
    run_prepare(PrepareConfig(source="phantom", count=900, size_px=48, output=str(folder), split=(0.8, 0.15, 0.05)))
    return folder


@pytest.fixture
def job(rig: Rig, pairs: Path, tmp_path: Path) -> Any:
    job = Job(rig, pairs, tmp_path)
    yield job
    if job.number:
        rig.ctl("scancel", str(job.number), check=False)
    rig.repair()
    wait_until(lambda: are_all_idle(rig), 90, "the machines to be idle again")


@pytest.fixture(scope="session")
def undisturbed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three workers on one machine, started by torchrun and left alone."""
    return run_here(pairs, tmp_path_factory.mktemp("undisturbed"), "cluster.launcher=torchrun", processes=3)


@pytest.fixture(scope="session")
def alone(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process without DeepSpeed, on the same data and global batch."""
    folder = tmp_path_factory.mktemp("alone")
    return run_here(pairs, folder, "cluster.launcher=local", "engine.kind=torch", "train.epochs=3")


@pytest.fixture(scope="session")
def long_undisturbed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the faults of `make chaos` befall, without them."""
    folder = tmp_path_factory.mktemp("long")
    return run_here(pairs, folder, "cluster.launcher=torchrun", f"train.epochs={CHAOS_EPOCHS}", processes=3)
