"""Checkpoints behind the steps: nobody waits for the disk, a fault is one line, and a kill never leaves half a one."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from spawn import run_ranks
from tiny import build_tiny_config

from place.config import RunError
from place.distributed import read_world
from place.training import saver
from place.training.checkpoint import find_checkpoint, find_fault
from place.training.engine import TorchEngine
from place.training.saver import Saver
from place.training.state import Share

KILLS = 25


class StubEngine:
    """Weights that say which step they are of."""

    def __init__(self, size: int = 8):
        self.device, self.layout = torch.device("cpu"), {"weight": ("weight", (size,))}
        self.size, self.step = size, 0

    def copy_share(self) -> Share:
        world = read_world()
        part = self.size // world.world
        run = {f"weight@{world.rank * part}": torch.full((part,), float(self.step))}
        return Share(run, {f"exp_avg:{key}": value for key, value in run.items()}, {"optimizer_step": self.step})

    def load(self, folder: Path, numbers: dict[str, float]) -> None:
        raise AssertionError("nothing is loaded here")


def save(writer: Saver, step: int) -> None:
    writer.engine.step = step
    writer.save({"step": step, "best_step": step // 2 * 2})


def test_a_step_goes_on_while_the_disk_is_slow_and_the_next_save_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, write = threading.Event(), saver.write_share
    monkeypatch.setattr(saver, "write_share", lambda *given: (release.wait(60), write(*given)))
    writer = Saver(tmp_path, StubEngine(), 5, 60)
    save(writer, 1)
    assert writer.take_times()["checkpoint_wait_s"] == 0
    assert find_checkpoint(tmp_path) == (None, [])
    threading.Timer(0.3, release.set).start()
    save(writer, 2)
    assert find_fault(tmp_path / "checkpoints" / "step_00000001") == ""
    writer.wait()
    assert writer.take_times()["checkpoint_wait_s"] > 0.2
    assert writer.take_times() == {}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002"


def test_what_is_saved_is_what_was_copied_not_what_came_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, write = threading.Event(), saver.write_share
    monkeypatch.setattr(saver, "write_share", lambda *given: (release.wait(60), write(*given)))
    engine = TorchEngine(torch.nn.Linear(4, 3), build_tiny_config(), torch.device("cpu"))
    before = engine.model.weight.detach().clone()
    writer = Saver(tmp_path, engine, 5, 60)
    writer.save({"step": 1})
    with torch.no_grad():
        engine.model.weight.add_(1)
    release.set()
    writer.wait()
    stored = load_file(tmp_path / "checkpoints" / "step_00000001" / "model.safetensors")
    assert torch.equal(stored["weight"], before)
    assert stored["bias"].shape == (3,)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Saver(tmp_path, StubEngine(), 5, 60)
    save(writer, 1)
    writer.wait()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saver, "save_file", refuse)
    save(writer, 2)
    with pytest.raises(RunError) as caught:
        writer.wait()
    assert "step_00000002 could not be written by rank 0" in str(caught.value)
    assert "No space left on device; the one before it is whole" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(RunError, match="No space left"):
        writer.check()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert find_fault(tmp_path / "checkpoints" / "step_00000001") == ""


def save_on_ranks(folder: str, failing: int | None) -> str:
    """A checkpoint of two ranks, where one may find its disk full; what this rank was told."""
    if read_world().rank == failing:
        saver.write_share = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    writer = Saver(Path(folder), StubEngine(), 5, 5)
    save(writer, 3)
    try:
        writer.wait()
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.multiprocess
def test_a_checkpoint_of_two_ranks_is_complete_only_with_both_shares(tmp_path: Path) -> None:
    assert run_ranks(save_on_ranks, 2, str(tmp_path / "good"), None) == ["", ""]
    folder = tmp_path / "good" / "checkpoints" / "step_00000003"
    assert find_fault(folder) == ""
    assert {path.name for path in folder.iterdir()} == {
        *("files.json", "state.json", "model.safetensors"),
        *("optimizer_00000.safetensors", "optimizer_00001.safetensors"),
    }
    first, second = run_ranks(save_on_ranks, 2, str(tmp_path / "bad"), 1)
    assert "written by rank 0" in first
    assert "rank 1 said: [Errno 28] No space left on device" in first or "share of rank 1 did not come" in first
    assert "could not be written by rank 1" in second
    assert find_checkpoint(tmp_path / "bad") == (None, [])


def write_for_ever(folder: Path) -> None:
    """Checkpoints one after the other, until killed."""
    writer = Saver(folder, StubEngine(100_000), 2, 60)
    step = int((find_checkpoint(folder)[0] or Path("step_0")).name.removeprefix("step_"))
    while True:
        step += 1
        save(writer, step)


def kill_at_random(folder: Path) -> None:
    """Kill a writer again and again; after each kill both pointers lead to complete checkpoints."""
    rng, seen = random.Random(0), set()
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            write_for_ever(folder)
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for pointer in (folder / "checkpoints" / "latest", folder / "checkpoints" / "best"):
            if pointer.exists():
                fault = find_fault(folder / "checkpoints" / pointer.read_text())
                assert fault == "", fault
        names = [path.name for path in (folder / "checkpoints").glob("step_????????")]
        assert not [fault for name in names if (fault := find_fault(folder / "checkpoints" / name))]
        seen |= {path.suffix for path in (folder / "checkpoints").iterdir()}
    assert ".partial" in seen, "no kill came in the middle of a checkpoint: nothing was tested"
    assert (folder / "checkpoints" / "latest").exists()


def test_a_kill_at_any_moment_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    # In a process that has no threads and may fork.
    code = "import sys, pathlib; from training.test_saver import *; kill_at_random(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
