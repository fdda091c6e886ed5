"""The least time that a GPU needs for the loss: products at tensor-core speed, inputs and gradient moved once."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Dense bf16 speed and memory bandwidth. Source: quoted (NVIDIA's data sheets of the SXM modules)."""

    flops: float
    bytes_per_s: float


DEVICES = {"H100": Device(989e12, 3.35e12), "H200": Device(989e12, 4.8e12), "A100": Device(312e12, 2.04e12)}


def find_device(name: str) -> Device | None:
    """By the name that CUDA gives, such as `NVIDIA H200`."""
    return next((device for key, device in DEVICES.items() if key in name), None)


def compute_bound_us(shape: tuple[int, int, int, int], device: Device, item_bytes: int = 2) -> tuple[float, float]:
    """Microseconds forward and backward.

    Half of each symmetric matrix is computed in each direction; backward multiplies the whole H with x.
    """
    batch, patches, width, target_width = shape
    differences = batch * patches * (patches + 1) * (width + target_width)
    inputs = batch * patches * (width + target_width) * item_bytes
    gradient = batch * patches * width * item_bytes
    forward = max(differences / device.flops, inputs / device.bytes_per_s)
    products = differences + 2 * batch * patches * patches * width
    backward = max(products / device.flops, (inputs + gradient) / device.bytes_per_s)
    return 1e6 * forward, 1e6 * backward
