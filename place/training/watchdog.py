"""A step that does not end: each rank writes where it stands and dies, so that the group starts again."""

from __future__ import annotations

import faulthandler
import socket
from pathlib import Path


class Watchdog:
    """Armed by `feed`, at each step anew. faulthandler's own thread fires it, also while a collective holds the GIL.

    Final. Source: ours.
    """

    def __init__(self, run_dir: Path, attempt: int, rank: int, timeout_s: float):
        self.timeout_s = timeout_s
        folder = run_dir / "stacks" / f"attempt_{attempt:04}"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank_{rank:05}.{socket.gethostname()}.txt"
        self._file = self.path.open("w")

    def feed(self) -> None:
        """Something was finished: wait `timeout_s` for the next time."""
        faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=self._file)

    def close(self) -> None:
        """Disarm; an empty file is removed, and so are folders that hold nothing else."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self.path.unlink()
        for folder in (self.path.parent, self.path.parent.parent):
            try:
                folder.rmdir()
            except OSError:
                return  # other ranks have not come so far, or another attempt left its stacks


def describe_stacks(run_dir: Path, attempt: int, world: int) -> str:
    """Who of an attempt's ranks wrote stacks, for the log; empty if nobody did."""
    paths = (run_dir / "stacks" / f"attempt_{attempt:04}").glob("rank_*.txt")
    wrote = sorted(int(path.name[5:10]) for path in paths if path.stat().st_size)
    if not wrote:
        return ""
    missing = sorted({*range(world)} - {*wrote})
    silent = f", rank {', '.join(map(str, missing))} did not answer" if missing else ""
    return f"a step hung: {len(wrote)} of {world} ranks wrote their stacks to {run_dir / 'stacks'}{silent}"
