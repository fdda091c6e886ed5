"""Measures alternative tiles on the GPU at hand and prints the fastest of each kernel, to be committed by hand.

    python -m place.kernels.tune --shape 256,196,768,256

Writes nothing: copy what convinces into `patch_correlation/configurations.py`, then `make test-kernels`, benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch
from place.kernels.benchmark import Shape, Timer, build_shape, check_gate, parse_shape, quantiles
from place.kernels.patch_correlation import configurations, launch
from place.kernels.patch_correlation.configurations import Tile
from place.kernels.patch_correlation.reference import Options
from triton.runtime.errors import OutOfResources

CANDIDATES = {
    "distance": [Tile(*tile) for tile in itertools.product((64, 128), (0,), (32, 64), (4, 8), (2, 3, 4))],
    "slope": [Tile(*tile) for tile in itertools.product((64, 128), (0,), (32, 64), (4, 8), (2, 3, 4))],
    "apply": [Tile(*tile) for tile in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 5, 7))],
    "panel": [Tile(*tile) for tile in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3))],
}


def measure_tile(name: str, tile: Tile, shape: Shape, timer: Timer, repeats: int) -> float | None:
    """Median milliseconds of a pass with one kernel's tile replaced, or None where it does not fit on the device."""
    x_BND, y_BNT = build_shape(shape, "cuda")
    scale_B = torch.ones(shape[0], device="cuda")

    def run() -> None:
        if name == "distance":
            launch.sum_distances(x_BND, y_BNT, None, None, Options())
        else:
            launch.compute_gradient(scale_B, x_BND, y_BNT, None, None, Options())

    choose = launch.choose_tile

    def replace(kernel: str, architecture: int, kind: str, patches: int, width: int) -> Tile | None:
        # Slope and apply run only where the panel does not.
        if kernel == "panel" and name in ("slope", "apply"):
            return None
        return tile if kernel == name else choose(kernel, architecture, kind, patches, width)

    launch.choose_tile = replace
    try:
        return quantiles([timer.measure(run) for _ in range(repeats + 3)][3:])["p50"]
    except OutOfResources:
        return None
    finally:
        launch.choose_tile = choose


def list_tiles(kernel: str, patches: int) -> Iterator[Tile]:
    """Candidates that can serve this N."""
    for tile in CANDIDATES[kernel]:
        if kernel != "panel" or patches <= tile.cols:
            yield tile


def main(arguments: list[str] | None = None) -> int:
    """For each kernel: its committed tile and the three fastest, in milliseconds of the pass it belongs to.

    Backward is the panel alone, or slope and apply: their times are times of the same pass.
    """
    parser = argparse.ArgumentParser(prog="python -m place.kernels.tune", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, required=True, help="B,N,D,Dt")
    parser.add_argument("--kernel", choices=sorted(CANDIDATES), action="append", help="repeatable; default: all")
    parser.add_argument("--repeats", type=int, default=20)
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("tune: no GPU here; tiles are measured, not guessed\n")
        return 2
    faults = check_gate("cuda")
    if faults:
        sys.stderr.write("tune: the kernels are wrong, nothing was timed:\n" + "\n".join(faults) + "\n")
        return 1
    timer = Timer("cuda", torch.empty(64 << 20, dtype=torch.int32, device="cuda"))
    major, minor = torch.cuda.get_device_capability()
    for kernel in asked.kernel or CANDIDATES:
        committed = configurations.choose_tile(kernel, major * 10 + minor, "half", *asked.shape[1:3])
        times = {
            tile: measure_tile(kernel, tile, asked.shape, timer, asked.repeats)
            for tile in list_tiles(kernel, asked.shape[1])
        }
        ranked = sorted((ms, tile) for tile, ms in times.items() if ms is not None)
        sys.stdout.write(f"{kernel}: committed {committed} {times.get(committed) if committed else None} ms\n")
        for ms, tile in ranked[:3]:
            sys.stdout.write(f"    {ms:.4f} ms  {tuple(tile)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
