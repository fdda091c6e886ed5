"""No mutated file crashes, hangs or fills the memory: each is kept, or rejected by reason.

`make test` tries some hundreds, `make fuzz` 20,000 DICOM files and 20,000 others.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mutants import KINDS, build_seeds, mutate

from place.compat import read_peak_mib
from place.config import PrepareConfig
from place.data.dicom import read_identity
from place.data.images import Rejected
from place.data.rows import Row
from place.data.task import read_sample

MAX_SECONDS, MAX_MIB = 5.0, 1024
SENTENCES = (("findings", "The heart is normal."), ("impression", "Clear lungs."))


def build_row(kind: str, data: bytes, folder: Path) -> Row:
    """The row whose image or report is the mutant."""
    row = Row(0, 1, "p", "ab", "train", data, SENTENCES, "", {})
    if kind in ("xml", "txt"):
        path = folder / f"report.{kind}"
        path.write_bytes(data)
        return row._replace(image=build_seeds("jpeg")[0], sections=(), report_path=str(path))
    return row


def try_mutants(kind: str, numbers: range, folder: Path) -> None:
    """What the child process does: print, for each mutant, its number before and its outcome and seconds after."""
    seeds = build_seeds(kind)
    config = PrepareConfig(source="csv", output="", size_px=32, views=("ALL",))
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # what does harm shall not do it to this machine
    for number in numbers:
        print(number, flush=True)
        faulthandler.dump_traceback_later(4 * MAX_SECONDS, exit=True)
        row = build_row(kind, mutate(seeds, number), folder)
        begun = time.perf_counter()
        if kind == "dicom":
            read_identity(io.BytesIO(row.image))
        try:
            read_sample(row, config)
            outcome = "kept"
        except Rejected as drop:
            outcome = drop.reason
        print(json.dumps([outcome, time.perf_counter() - begun]), flush=True)
    print(json.dumps(["memory", read_peak_mib()]))


def run_mutants(kind: str, count: int, folder: Path) -> dict[str, int]:
    """Outcomes of `count` mutants, tried in a process of their own; fails with the number of one that does harm."""
    command = [sys.executable, __file__, kind, str(count), str(folder)]
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    environment = {**os.environ, "PYTHONPATH": paths}
    errors = folder / "errors.txt"
    outcomes: dict[str, int] = {}
    number, memory_mib, slowest = "none", 0.0, (0.0, "none")
    with (
        errors.open("w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("["):
                number = line.strip()
                continue
            outcome, value = json.loads(line)
            if outcome == "memory":
                memory_mib = value
                continue
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            slowest = max(slowest, (value, number))
    assert process.returncode == 0, f"{kind} mutant {number} ended the process: {errors.read_text()[-2000:]}"
    assert slowest[0] < MAX_SECONDS, f"{kind} mutant {slowest[1]} took {slowest[0]:.1f} s"
    assert 0 < memory_mib < MAX_MIB, f"{memory_mib:.0f} MiB taken"
    assert sum(outcomes.values()) == count
    print(f"{kind}: {count} mutants, slowest {slowest[0]:.2f} s, {memory_mib:.0f} MiB, {outcomes}")
    return outcomes


@pytest.mark.parametrize(("kind", "count"), [("dicom", 400), ("jpeg", 100), ("png", 100), ("xml", 100), ("txt", 100)])
def test_mutated_files_are_kept_or_rejected_by_reason(tmp_path, kind, count):
    outcomes = run_mutants(kind, count, tmp_path)
    assert len(outcomes) > 1
    assert all(re.fullmatch("[a-z_]+", reason) for reason in outcomes)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_tens_of_thousands_of_mutated_files_are_kept_or_rejected_by_reason(tmp_path, kind):
    run_mutants(kind, 20_000 if kind == "dicom" else 5_000, tmp_path)


if __name__ == "__main__":
    try_mutants(sys.argv[1], range(int(sys.argv[2])), Path(sys.argv[3]))
