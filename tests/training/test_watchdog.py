"""A step that hangs: the process writes where it stands, and dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from place.training.watchdog import Watchdog, describe_stacks

HANG = """
import sys, time
from pathlib import Path
from place.training.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), 3, 1, 0.5)
def wait_for_a_peer():
    time.sleep(60)
for _ in range(3):
    watchdog.feed()
    time.sleep(0.3)
wait_for_a_peer()
"""


def test_a_rank_that_hangs_writes_its_stack_and_dies(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], timeout=50, check=False)
    assert done.returncode == 1
    (path,) = (tmp_path / "stacks" / "attempt_0003").iterdir()
    assert "in wait_for_a_peer" in path.read_text()
    said = describe_stacks(tmp_path, 3, 3)
    assert said == f"a step hung: 1 of 3 ranks wrote their stacks to {tmp_path / 'stacks'}, rank 0, 2 did not answer"
    assert describe_stacks(tmp_path, 2, 3) == ""


def test_a_rank_that_ends_leaves_nothing(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 0, 60)
    watchdog.feed()
    assert describe_stacks(tmp_path, 0, 1) == ""
    watchdog.close()
    assert list(tmp_path.iterdir()) == []
