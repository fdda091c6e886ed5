"""Machine code of the committed configurations for Hopper, compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.kernels


def compile_kernels(pattern: str, triton: str | None = None, timeout_s: int = 280) -> list[dict]:
    """Codes of the configurations whose label matches, by the installed Triton or the one in a folder."""
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux alone")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*([triton] if triton else []), str(ROOT)])
    command = [sys.executable, "-m", "place.kernels.patch_correlation.offline", pattern]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def find_faults(code: dict) -> list[str]:
    """What the acceptance rules forbid, in words."""
    faults = []
    if code["shared_bytes"] > 232_448:
        faults.append("too much shared memory")
    if code["local_in_loops"]:
        faults.append("local memory in a loop of products")
    halves = code["label"].split()[1:3] != ["float32", "float32"]
    if halves and code["name"] in ("distance_kernel", "slope_kernel", "panel_kernel", "apply_kernel"):
        if not code["hgmma"]:
            faults.append("no HGMMA")
        if code["hmma"]:
            faults.append("HMMA")
    if code["name"] in ("slope_kernel", "panel_kernel", "apply_kernel"):
        if not code["stores"].get("128"):
            faults.append("no 128-bit stores")
        if code["stores"].keys() & {"8", "16"}:
            faults.append("scalar stores of halves")
    return faults


def test_kernels_of_the_main_shape_use_hopper_s_tensor_cores() -> None:
    codes = compile_kernels(r"(distance|panel)_kernel bfloat16 bfloat16 mse .*\((128|64, 256)")
    assert [code["name"] for code in codes] == ["distance_kernel", "panel_kernel"]
    assert [(code["label"], find_faults(code)) for code in codes if find_faults(code)] == []


@SLOW
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_every_committed_configuration_compiles_as_it_should(version: str) -> None:
    folder = None if version == "installed" else os.environ.get("PLACE_TRITON_36")
    if version == "3.6" and folder is None:
        pytest.skip("PLACE_TRITON_36 names no folder with Triton 3.6: make test-kernels installs one")
    codes = compile_kernels("", folder and str(Path(folder).resolve()), timeout_s=1400)
    assert len(codes) > 40
    assert version == "installed" or {code["triton"] for code in codes} == {"3.6.0"}
    assert [(code["label"], find_faults(code)) for code in codes if find_faults(code)] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared_bytes": 232_449}, "too much shared memory"),
        ({"local_in_loops": 1}, "local memory in a loop of products"),
        ({"hgmma": 0}, "no HGMMA"),
        ({"hmma": 1}, "HMMA"),
        ({"stores": {"32": 4}}, "no 128-bit stores"),
        ({"stores": {"128": 4, "16": 133}}, "scalar stores of halves"),
    ],
)
def test_each_fault_of_machine_code_is_found(change: dict, fault: str) -> None:
    good = {"label": "slope_kernel bfloat16 int8 mse", "name": "slope_kernel", "shared_bytes": 9, "local_in_loops": 0}
    good |= {"hgmma": 8, "hmma": 0, "stores": {"128": 16, "32": 4}}
    assert find_faults(good) == []
    assert find_faults(good | change) == [fault]


def test_loops_are_found_in_a_listing() -> None:
    # The module needs Triton as it is without its interpreter.
    code = (
        "from place.kernels.patch_correlation.offline import find_loops\n"
        "lines = [(0, 'STL [R1]'), (16, 'HGMMA.64x128x16'), (32, 'LDL R2'), (48, '@P0 BRA 0x10'), (64, 'BRA 0x40')]\n"
        "assert list(find_loops(lines)) == [['HGMMA.64x128x16', 'LDL R2', '@P0 BRA 0x10']], list(find_loops(lines))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux alone")
    subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, check=True, cwd=ROOT)
