"""The batched assignment is optimal, is the same in torch and Triton, and never waits for the device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from place.kernels import assignment
from place.kernels.assignment import assign
from scipy.optimize import linear_sum_assignment

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def build_cases(batch: int, rows: int, columns: int, ties: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random costs, of four values where there are to be ties, and masks that leave out about a third."""
    rng = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, rows, columns, generator=rng)
    mask = torch.rand(batch, rows, generator=rng) < 0.7
    return (cost * 3).round() if ties else cost, mask


def read_cost(cost: torch.Tensor, mask: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Total cost of each pairing, after checks that it is one-to-one, of real rows, and as large as can be."""
    paired = column >= 0
    assert not (paired & ~mask).any()
    assert torch.equal(paired.sum(1), mask.sum(1).clamp(max=cost.shape[2]))
    used = torch.zeros(len(cost), cost.shape[2]).scatter_add(1, column.clamp(min=0), paired.float())
    assert used.max() <= 1
    return (cost.double().gather(2, column.clamp(min=0)[..., None])[..., 0] * paired).sum(1)


def read_least_cost(cost: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What scipy finds, problem by problem."""
    totals = []
    for cost_SK, mask_S in zip(cost.double().numpy(), mask.numpy(), strict=True):
        row, column = linear_sum_assignment(cost_SK[mask_S])
        totals.append(cost_SK[mask_S][row, column].sum())
    return torch.tensor(totals, dtype=torch.float64)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (7, 16), (16, 5), (3, 3), (1, 1)])
@pytest.mark.parametrize("method", ["torch", "scipy"])
def test_the_least_cost_is_reached_in_ten_thousand_cases(method: str, rows: int, columns: int, ties: bool) -> None:
    cost, mask = build_cases(1000, rows, columns, ties, seed=rows)
    found = read_cost(cost, mask, assign(cost, mask, method))
    torch.testing.assert_close(found, read_least_cost(cost, mask), rtol=0, atol=1e-9)


def run_script(script: str, interpret: str) -> str:
    """Output of a script in a process of its own: at its import Triton reads whether it interprets or compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{script}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_the_kernel_takes_the_pairing_of_torch() -> None:
    script = """
import torch
from place.kernels.assignment import assign
from test_assignment import build_cases
for rows, columns in ((5, 5), (3, 9), (4, 2), (1, 1)):
    for ties in (False, True):
        cost, mask = build_cases(2, rows, columns, ties, seed=rows)
        print(torch.equal(assign(cost, mask, "triton"), assign(cost, mask, "torch")))
strided = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
mask = torch.ones(2, 2, dtype=torch.bool)
print(torch.equal(assign(strided, mask, "triton"), assign(strided, mask, "torch")))
"""
    assert run_script(script, interpret="1").split() == 9 * ["True"]


@needs_triton
def test_the_kernel_compiles_for_hopper_without_local_memory() -> None:
    script = """
import triton
from place.kernels.assignment.triton_kernel import assign_kernel
from triton.backends.compiler import GPUTarget
types = {"cost_ptr": "*fp64", "mask_ptr": "*i8", "column_ptr": "*i64", "rows": "i32", "columns": "i32"}
source = triton.compiler.ASTSource(assign_kernel, {**types, "LANES": "constexpr"}, {"LANES": 16})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"])
"""
    ptx = run_script(script, interpret="0")
    assert "assign_kernel" in ptx
    assert ".local" not in ptx


@pytest.mark.gpu
def test_the_kernel_takes_the_pairing_of_torch_on_a_gpu() -> None:
    cost, mask = build_cases(256, 16, 16, True, seed=0)
    ours = assign(cost.cuda(), mask.cuda(), "triton").cpu()
    assert torch.equal(ours, assign(cost, mask, "torch"))


def test_twice_the_same_costs_give_the_same_pairing_and_no_batch_mate_changes_it() -> None:
    cost, mask = build_cases(64, 9, 9, True, seed=0)
    whole = assign(cost, mask, "torch")
    assert torch.equal(whole, assign(cost, mask, "torch"))
    assert torch.equal(whole[10:11], assign(cost[10:11], mask[10:11], "torch"))


def test_no_operation_depends_on_a_value() -> None:
    """On the meta device there are no values: whatever would wait for one fails."""
    meta = {"device": "meta"}
    for rows, columns in ((16, 16), (16, 4)):
        column = assign(torch.rand(4, rows, columns, **meta), torch.ones(4, rows, dtype=torch.bool, **meta))
        assert column.shape == (4, rows)


def test_costs_that_are_not_finite_still_give_a_pairing() -> None:
    cost = torch.tensor([[[torch.nan, torch.inf], [torch.inf, -torch.inf]]])
    for method in ("scipy", "torch"):
        assert assign(cost, torch.ones(1, 2, dtype=torch.bool), method).tolist() == [[0, 1]]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method 'auction', expected auto or one of"):
        assign(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), "auction")


@pytest.mark.parametrize(("device", "method"), [("cpu", "scipy"), ("meta", "torch")])
def test_the_method_is_chosen_by_device(device: str, method: str) -> None:
    assert assignment._choose(device) == method
