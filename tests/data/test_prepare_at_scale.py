"""What keeps `place prepare` within its memory, says how long it takes, and compares it with a plain loop."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
from small_sets import write_csv_source

from place.data import benchmark_prepare, card
from place.data.prepare import run_prepare
from place.data.storage import open_store
from place.screen import compute_pace

READ = """
import sys
from pathlib import Path
from place.data.frame_rows import FrameRows
from place.data.identity import IdHasher
from place.data.table import read_table

def read_private_mib():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def read(name):
    frame = read_table(Path(sys.argv[1], name), {"image": "file", "text": "note", "patient": "who"}, ())
    frame["number"] = range(len(frame))
    frame["identity"] = frame["study"] = frame["image"]
    frame["split"] = "train"
    rows = FrameRows(frame, [], IdHasher(b"salt"))
    return rows, [len(rows[at : at + 100]) for at in range(0, len(rows), 100)]

read("small.csv")
before = read_private_mib()
rows, _ = read("large.csv")
print(read_private_mib() - before, rows[7:8][0].sections[0][1][:9])
"""


def test_reports_of_a_large_table_stay_on_the_disk(tmp_path):
    for name, count in (("small.csv", 100), ("large.csv", 6000)):
        reports = [f"report {number} " + "clear lungs " * 1000 for number in range(count)]
        files = [f"{number}.png" for number in range(count)]
        pd.DataFrame({"file": files, "note": reports, "who": files}).to_csv(tmp_path / name, index=False)
    assert (tmp_path / "large.csv").stat().st_size > 65 << 20
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, *words = done.stdout.split()
    assert words == ["report", "7"]
    assert int(grown) < 35, "MiB of private memory for a table of 70"


def test_counts_are_the_same_in_any_number_of_turns(tmp_path, monkeypatch):
    config = write_csv_source(tmp_path, count=30)
    found = run_prepare(config)["counts"]
    monkeypatch.setattr(card, "_VALUES_A_TURN", 4)
    turns = list(card.count_in_turns(open_store(config.output), ["patient"], 30))
    assert len(turns) == 8
    assert max(map(len, turns)) < 12
    assert card.count_splits(open_store(config.output), 30) == {
        split: found[split] for split in ("train", "val", "test")
    }


def test_the_pace_is_that_of_this_run_alone():
    assert compute_pace(10.0, 50, 500) == (5.0, 100.0)
    assert compute_pace(0.0, 0, 500) == (0.0, None)


def test_the_benchmark_gives_speeds_of_equal_images():
    found = benchmark_prepare.measure(6, 300, 1)
    assert "faults" not in found
    assert found["ratio"] == pytest.approx(found["studies_per_s"]["place"] / found["studies_per_s"]["loop"])


def test_the_benchmark_gives_no_speed_when_images_differ(monkeypatch):
    read = benchmark_prepare._read_by_loop
    monkeypatch.setattr(benchmark_prepare, "_read_by_loop", lambda path: read(path)[:-1] + b"\0")
    assert set(benchmark_prepare.measure(4, 64, 1)) == {"faults"}
