"""Memory and traffic of the Triton path, read from its plan on the meta device."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from place.kernels.patch_correlation.configurations import choose_tile
from place.kernels.patch_correlation.reference import Options
from place.kernels.testing import SHAPES

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)
launch = importlib.import_module("place.kernels.patch_correlation.launch")
MIB = 1 << 20
# Bytes that move if each kernel moves each number once, in MiB: forward, backward.
TRAFFIC_MIB = {
    (256, 196, 128, 256): (75.8, 87.3),
    (256, 196, 768, 256): (198.3, 386.6),
    (64, 1024, 768, 256): (259.0, 715.0),
    (64, 1024, 128, 256): (99.0, 395.0),
    (16, 4096, 256, 256): (131.1, 1251.0),
}


def build_meta(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, patches, width, target_width = shape
    x_BND = torch.empty(batch, patches, width, dtype=torch.bfloat16, device="meta")
    y_BNT = torch.empty(batch, patches, target_width, dtype=torch.bfloat16, device="meta")
    return x_BND, y_BNT, torch.empty(batch, device="meta")


def plan_both(shape: tuple[int, int, int, int]) -> tuple[list, list, list[torch.Tensor]]:
    """Launches forward and backward, and what exists outside them."""
    x_BND, y_BNT, gradient_B = build_meta(shape)
    totals, forward = launch.plan_distances(x_BND, y_BNT, None, None, Options())
    result_BND, backward = launch.plan_gradient(gradient_B, x_BND, y_BNT, None, None, Options())
    return forward, backward, [x_BND, y_BNT, gradient_B, *totals, result_BND]


def count_workspace(launches: list, outside: list[torch.Tensor]) -> int:
    known = {id(tensor) for tensor in outside}
    held = {id(arg): arg.nbytes for item in launches for arg in item.args if isinstance(arg, torch.Tensor)}
    return sum(size for key, size in held.items() if key not in known)


@pytest.mark.parametrize("shape", SHAPES)
def test_extra_memory_is_at_most_the_inputs(shape: tuple[int, int, int, int]) -> None:
    forward, backward, outside = plan_both(shape)
    inputs = outside[0].nbytes + outside[1].nbytes
    assert count_workspace(forward, outside) <= 0.03 * inputs
    assert count_workspace(backward, outside) <= inputs


@pytest.mark.parametrize("shape", SHAPES)
def test_traffic_stays_what_it_was(shape: tuple[int, int, int, int]) -> None:
    forward, backward, _ = plan_both(shape)
    moved = tuple(sum(item.count_bytes() for item in launches) / MIB for launches in (forward, backward))
    assert moved == pytest.approx(TRAFFIC_MIB[shape], rel=1e-3)


def test_against_fp32_targets_slope_and_apply_run_and_no_panel() -> None:
    x_BND, y_BNT, gradient_B = build_meta((256, 196, 128, 256))
    kernels = launch.kernels
    for target_BNT, expected in (
        (y_BNT, [kernels.panel_kernel]),
        (y_BNT.float(), [kernels.slope_kernel, kernels.apply_kernel]),
    ):
        _, (_, *backward) = launch.plan_gradient(gradient_B, x_BND, target_BNT, None, None, Options())
        assert [item.kernel for item in backward[: len(expected)]] == expected


@pytest.mark.parametrize("architecture", [86, 89, 120])
def test_the_widest_panel_is_left_out_where_shared_memory_is_small(architecture: int) -> None:
    assert choose_tile("panel", architecture, "half", 196, 128) is None
    assert choose_tile("panel", architecture, "half", 128, 128) == choose_tile("panel", 90, "half", 128, 128)
    assert choose_tile("apply", architecture, "half", 196, 128) == choose_tile("apply", 90, "half", 196, 128)
    assert choose_tile("panel", 90, "half", 196, 128) is not None


def test_no_launch_exceeds_the_grid_of_cuda() -> None:
    for patches, batch in ((196, 60_000), (4096, 16)):
        forward, backward, _ = plan_both((batch, patches, 64, 64))
        assert max(size for item in (*forward, *backward) for size in item.grid[1:]) <= 65_535
