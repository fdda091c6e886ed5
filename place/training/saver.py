"""Checkpoints written behind the training steps: each rank its share, rank 0 the rest, nobody waits for the disk."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from place.config import RunError
from place.distributed import broadcast_text, read_world
from place.kept import write_text
from place.training.checkpoint import LISTING, STATE, hash_file
from place.training.engine import Engine
from place.training.state import WEIGHTS, Layout, Share, join_runs, name_moments

POLL_S = 0.02


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread. Final; made and called by all ranks alike.

    A step waits for the copy of its rank's share to host memory, and for the write before it where that still goes on.
    Ranks hear of each other by files alone, so that no collective runs beside those of training. A folder has its name
    only when it is complete and on disk; until then it is NAME.TOKEN.partial, with a token that no earlier attempt had.
    """

    def __init__(self, run_dir: Path, engine: Engine, keep: int, timeout_s: float):
        self.root, self.engine, self.keep, self.timeout_s = run_dir / "checkpoints", engine, keep, timeout_s
        self.thread: threading.Thread | None = None
        self.fault, self.waited_s, self.copied_s = "", 0.0, 0.0
        self.world = read_world()
        if self.world.is_first:
            for left in [*self.root.glob("step_*.partial"), *self.root.glob("step_*.removed")]:
                shutil.rmtree(left, ignore_errors=True)
        # Nobody gets past this before rank 0 has cleared away, and so nobody loses what is new.
        self.token = broadcast_text(uuid.uuid4().hex[:8])

    def save(self, state: dict[str, Any]) -> None:
        """Copy what is to be saved and begin to write it.

        Args:
            state: JSON values, among them `step` and `best_step`, the step of the best checkpoint so far.
        Raises:
            RunError: the checkpoint before could not be written.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        share = self.engine.copy_share()
        self.waited_s += waited - began
        self.copied_s += time.perf_counter() - waited
        self.thread = threading.Thread(target=self._write, args=(share, state), name="checkpoint", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise RunError, one line, if a checkpoint could not be written."""
        if self.fault:
            raise RunError(self.fault)

    def wait(self) -> None:
        """Wait until this rank has done its part, rank 0 until the checkpoint is complete. Raises as `check` does."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def take_times(self) -> dict[str, float]:
        """Seconds that steps waited for checkpoints since the last call; empty where there was none."""
        times = {"checkpoint_wait_s": round(self.waited_s, 4), "checkpoint_copy_s": round(self.copied_s, 4)}
        has_saved = self.copied_s > 0
        self.waited_s, self.copied_s = 0.0, 0.0
        return times if has_saved else {}

    def _write(self, share: Share, state: dict[str, Any]) -> None:
        name = f"step_{state['step']:08d}"
        partial = self.root / f"{name}.{self.token}.partial"
        try:
            write_share(partial, self.world.rank, share)
            if self.world.is_first:
                listings = wait_for_shares(partial, self.world.world, self.timeout_s)
                state = {**state, "numbers": share.numbers}
                write_rest(partial, self.engine.layout, share, state, listings, self.world.world)
                publish(partial, self.root / name, state, self.keep)
        except Exception as error:  # noqa: BLE001  a thread has nobody to raise to: `check` does it
            said = " ".join(str(error).split()) or type(error).__name__
            self.fault = (
                f"checkpoint {name} could not be written by rank {self.world.rank} to {self.root}: {said}; the one "
                "before it is whole: make room or repair the disk, then start again with run.resume=auto"
            )
            _give_up(partial, self.world.rank, said)


def write_share(partial: Path, rank: int, share: Share) -> None:
    """Write what one rank saves, and last of all its listing, whose presence says that the rest is there.

    Rank 0 keeps its weights in memory: it is the one that joins those of all ranks.
    """
    partial.mkdir(parents=True, exist_ok=True)
    moments = partial / name_moments(rank)
    save_file(share.moments, moments)
    if rank:
        save_file(share.weights, partial / _name_weights(rank))
    listing = {moments.name: _settle(moments)}
    write_text(partial / _name_listing(rank), json.dumps(listing))


def wait_for_shares(partial: Path, world: int, timeout_s: float) -> dict[str, Any]:
    """Wait until every rank's share is there; returns sizes and hashes by file. Raises RunError: one never came."""
    deadline = time.monotonic() + timeout_s
    waiting = set(range(world))
    while waiting:
        waiting = {rank for rank in waiting if not (partial / _name_listing(rank)).is_file()}
        for rank in waiting:
            failed = partial / _name_failure(rank)
            if failed.is_file():
                raise RunError(f"rank {rank} said: {failed.read_text() or 'no reason'}")
        if waiting and time.monotonic() > deadline:
            raise RunError(f"the share of rank {min(waiting)} did not come within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    listings: dict[str, Any] = {}
    for rank in range(world):
        listings.update(json.loads((partial / _name_listing(rank)).read_text()))
    return listings


def write_rest(
    partial: Path, layout: Layout, share: Share, state: dict[str, Any], listings: dict[str, Any], world: int
) -> None:
    """Rank 0's part: the whole model in one file, the state, and the listing of all with their hashes."""
    runs = dict(share.weights)
    for rank in range(1, world):
        runs.update(load_file(partial / _name_weights(rank)))
    save_file(join_runs(layout, runs.items()), partial / WEIGHTS)
    (partial / STATE).write_text(json.dumps(state, indent=1))
    listings = {**listings, WEIGHTS: _settle(partial / WEIGHTS), STATE: _settle(partial / STATE)}
    for rank in range(world):
        (partial / _name_listing(rank)).unlink()
        (partial / _name_weights(rank)).unlink(missing_ok=True)
    (partial / LISTING).write_text(json.dumps(listings, indent=1))
    _sync(partial / LISTING)
    _sync(partial)


def publish(partial: Path, final: Path, state: dict[str, Any], keep: int) -> None:
    """Give a complete folder its name, point `latest` (and `best`) at it, and thin out the older ones."""
    root = final.parent
    if final.exists():
        # A resume takes the newest complete checkpoint and points `latest` at it: what stands here was damaged.
        _remove(final)
    partial.rename(final)
    _sync(root)
    write_text(root / "latest", final.name)
    if state.get("best_step") == state["step"]:
        write_text(root / "best", final.name)
    best = (root / "best").read_text().strip() if (root / "best").is_file() else ""
    names = sorted(path.name for path in root.glob("step_????????"))
    done = [name for name in names if name <= final.name]
    for name in {*names} - {*done[-keep:], best}:
        _remove(root / name)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that nobody ever finds half of it."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _give_up(partial: Path, rank: int, said: str) -> None:
    """Make room again, and tell rank 0 if the disk still takes a name."""
    try:
        if rank:
            for name in (name_moments(rank), _name_weights(rank)):
                (partial / name).unlink(missing_ok=True)
            (partial / _name_failure(rank)).write_text(said)
        else:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError:
        return


def _settle(path: Path) -> tuple[int, str]:
    """Size and hash of a file that is now on disk."""
    _sync(path)
    return path.stat().st_size, hash_file(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name_weights(rank: int) -> str:
    return f"weights_{rank:05d}.safetensors"


def _name_listing(rank: int) -> str:
    return f"share_{rank:05d}.json"


def _name_failure(rank: int) -> str:
    return f"share_{rank:05d}.failed"
