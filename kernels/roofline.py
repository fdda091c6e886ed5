"""What a GPU needs for the loss at least, and what we expect of the kernels before they are measured.

`python -m place.kernels.roofline` prints both for the shapes of the benchmark, bf16 on both sides; kernels/README.md
holds the table.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from place.kernels.patch_correlation.reference import Options
from place.kernels.testing import SHAPES

if TYPE_CHECKING:
    from place.kernels.patch_correlation.launch import Launch

Shape = tuple[int, int, int, int]


class Device(NamedTuple):
    """Dense bf16 speed and memory bandwidth. Source: quoted (NVIDIA's data sheets of the SXM modules)."""

    flops: float
    bytes_per_s: float


DEVICES = {"H100": Device(989e12, 3.35e12), "H200": Device(989e12, 4.8e12), "A100": Device(312e12, 2.04e12)}
# Assumptions of the prediction, ours: share of the tensor cores' speed by kernel, of the bandwidth, cost of a launch.
EFFICIENCY = {"distance_kernel": 0.45, "slope_kernel": 0.4, "apply_kernel": 0.5, "panel_kernel": 0.35}
BANDWIDTH_SHARE = 0.75
LAUNCH_US = 3.0


def find_device(name: str) -> Device | None:
    """By the name that CUDA gives, such as `NVIDIA H200`."""
    return next((device for key, device in DEVICES.items() if key in name), None)


def compute_bound_us(shape: Shape, device: Device, target_bytes: int = 2) -> tuple[float, float]:
    """Microseconds forward and backward, for bf16 features and targets of so many bytes a number.

    Products are taken at the speed of bf16, those of fp32 targets too. Half of each symmetric matrix is computed in
    each direction; backward multiplies the whole H with x.
    """
    batch, patches, width, target_width = shape
    differences = batch * patches * (patches + 1) * (width + target_width)
    gradient = 2 * batch * patches * width
    inputs = gradient + batch * patches * target_width * target_bytes
    forward = max(differences / device.flops, inputs / device.bytes_per_s)
    products = differences + 2 * batch * patches * patches * width
    backward = max(products / device.flops, (inputs + gradient) / device.bytes_per_s)
    return 1e6 * forward, 1e6 * backward


def predict_us(launches: list[Launch], shape: Shape, device: Device) -> float:
    """Microseconds of a plan: each kernel as slow as its products on whole tiles or its bytes, plus a launch."""
    total = 0.0
    for launch in launches:
        name = launch.kernel.fn.__name__
        compute = count_flops(launch, shape) / device.flops / EFFICIENCY.get(name, 1.0)
        memory = launch.count_bytes() / device.bytes_per_s / BANDWIDTH_SHARE
        total += 1e6 * max(compute, memory) + LAUNCH_US
    return total


def count_flops(launch: Launch, shape: Shape) -> float:
    """Operations of the products of a launch, padding included."""
    _, patches, width, target_width = shape
    name, tile, images = launch.kernel.fn.__name__, launch.tile, launch.grid[-1]
    if name in ("distance_kernel", "slope_kernel"):
        tiles = launch.grid[0] * (launch.grid[0] + 1) // 2
        return 2 * images * tiles * tile.rows**2 * (width + target_width)
    if name == "apply_kernel":
        return 2 * images * launch.grid[0] * launch.grid[1] * tile.rows * tile.cols * patches
    if name == "panel_kernel":
        return 2 * images * launch.grid[0] * tile.rows * tile.cols * (2 * width + target_width)
    return 0.0


def main() -> None:
    """The table of predictions for H200."""
    from place.kernels.patch_correlation import launch

    device = DEVICES["H200"]
    for shape in SHAPES:
        batch, patches, width, target_width = shape
        x_BND = torch.empty(batch, patches, width, dtype=torch.bfloat16, device="meta")
        y_BNT = torch.empty(batch, patches, target_width, dtype=torch.bfloat16, device="meta")
        _, forward = launch.plan_distances(x_BND, y_BNT, None, None, Options())
        _, backward = launch.plan_gradient(torch.empty(batch, device="meta"), x_BND, y_BNT, None, None, Options())
        bounds = compute_bound_us(shape, device)
        expected = [predict_us(launches, shape, device) for launches in (forward, backward)]
        cells = " | ".join(f"{value / 1e3:.3f}" for value in (*bounds, *expected, sum(expected)))
        sys.stdout.write(f"| {', '.join(map(str, shape))} | {cells} |\n")


if __name__ == "__main__":
    main()
