"""The benchmark of the loader: fair, checked before it is timed, complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from place.config import RunError, UsageError
from place.data import benchmark, rivals


@pytest.fixture
def bench(prepared: Path, tmp_path: Path) -> benchmark.Bench:
    return benchmark.build_bench(str(prepared), 0, 32, 16, tmp_path)


def test_every_way_is_checked_and_timed(bench: benchmark.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "WAIT_STEPS", 4)
    monkeypatch.setattr(benchmark, "SLEEP_S", 0.01)
    record = benchmark.measure(bench, rounds=1, num_workers=1)
    assert len(record["ways"]) == 6
    for row in record["ways"].values():
        assert all(value > 0 for value in row.values())
        assert set(row) >= {"cold_per_core_s", "warm_per_core_s", "resume_s", "bytes_per_sample"}
    assert 0 <= record["data_wait_share"] <= 1
    json.dumps(record)
    text = benchmark.format_table(record)
    assert all(name in text for name in record["ways"])


def test_there_are_no_figures_where_a_way_shows_another_image(bench: benchmark.Bench) -> None:
    ways = benchmark.build_ways(bench)
    read = ways["PLACE"].read

    def darken(cold: bool, skip: float):
        return (batch._replace(image_BCYX=batch.image_BCYX - 1) for batch in read(cold, skip))

    with pytest.raises(RunError, match="no figures"):
        benchmark.check_ways(bench, {"dark": benchmark.Way(darken, [])})


def test_there_are_no_figures_where_a_way_leaves_samples_out(bench: benchmark.Bench) -> None:
    ways = benchmark.build_ways(bench)
    read = ways["HDF5 of pixels, torchvision"].read
    with pytest.raises(RunError, match="no figures"):
        benchmark.check_ways(bench, {"half": benchmark.Way(lambda cold, _: read(cold, 0.5), [])})


def test_a_way_goes_on_in_the_middle_of_an_epoch(bench: benchmark.Bench) -> None:
    steps = len(bench.rows) // bench.batch
    for name, way in benchmark.build_ways(bench).items():
        left = list(way.read(True, 0.5))
        assert len(left) == steps - steps // 2, name
        assert isinstance(left[0].image_BCYX, torch.Tensor)


def test_a_missing_package_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"pip install -c constraints.txt -e .\[bench\]"):
        rivals.import_extra("no_such_package")
