"""The benchmark: nothing is timed on a red gate, and a row names what made it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)

from place.kernels import benchmark
from place.kernels.roofline import DEVICES, compute_bound_us, find_device
from place.kernels.testing import Case


@pytest.fixture
def small_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "GATE_CASES", [Case(9), Case(9, dtype=torch.bfloat16)])


def run(*arguments: str) -> int:
    return benchmark.main(["--device", "cpu", "--shape", "2,9,8,8", "--repeats", "1", *arguments])


def test_a_row_names_machine_versions_commit_shape_and_errors(
    small_gate: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    assert run("--contender", "eager", "--contender", "fused", "--output", str(path)) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["contender"], row["target"]) for row in rows] == [
        ("eager", "bf16"),
        ("fused", "bf16"),
        ("eager", "fp32"),
        ("fused", "fp32"),
    ]
    for row in rows:
        assert {"device", "commit", "torch", "triton", "shape", "peak_mib", "loss_error"} < row.keys()
        assert all(row[key]["p20"] <= row[key]["p50"] <= row[key]["p80"] for key in benchmark.PASSES)
        assert 0 < row["gradient_error"] < 1e-2
    assert "| 2, 9, 8, 8 | fused | fp32 |" in capsys.readouterr().out


def test_targets_are_of_the_type_that_was_asked_for(small_gate: None, capsys: pytest.CaptureFixture) -> None:
    assert benchmark.build_shape((2, 9, 8, 8), "cpu", "fp32")[1].dtype == torch.float32
    assert run("--contender", "fused", "--target", "fp32") == 0
    assert "bf16 |" not in capsys.readouterr().out


def test_a_red_gate_prints_no_speed(
    small_gate: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = benchmark.run_operator

    def run_wrong(*arguments: object) -> benchmark.Result:
        result = right(*arguments)  # type: ignore[arg-type]
        return result._replace(to_x=1.1 * result.to_x)

    monkeypatch.setattr(benchmark, "run_operator", run_wrong)
    assert run() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing was timed" in printed.err


def test_the_gate_sees_a_result_that_changes(small_gate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "is_repeatable", lambda *_: False)
    assert all("not repeatable" in fault for fault in benchmark.check_gate("cpu"))
    assert len(benchmark.check_gate("cpu")) == 4


def test_the_bound_is_the_slower_of_products_and_bytes() -> None:
    h200 = DEVICES["H200"]
    # One pair of rows: bytes decide. Many: products do.
    narrow = compute_bound_us((1, 1, 1000, 1000), h200)
    assert narrow == pytest.approx((4000 / 4.8e6, 6000 / 4.8e6))
    assert compute_bound_us((1, 1, 1000, 1000), h200, 4) == pytest.approx((6000 / 4.8e6, 8000 / 4.8e6))
    forward, backward = compute_bound_us((1, 8192, 128, 128), h200)
    assert forward == pytest.approx(8192 * 8193 * 256 / 989e6)
    assert backward == pytest.approx((8192 * 8193 * 256 + 2 * 8192**2 * 128) / 989e6)


def test_a_device_is_found_by_cuda_s_name() -> None:
    assert find_device("NVIDIA H200") == DEVICES["H200"]
    assert find_device("NVIDIA H100 80GB HBM3") == DEVICES["H100"]
    assert find_device("CPU") is None
