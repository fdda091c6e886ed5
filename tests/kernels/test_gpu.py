"""What only a GPU can show of the patch-correlation kernels; test_triton_kernel.py runs natively there as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from place.kernels.patch_correlation import patch_corr_loss
from place.kernels.patch_correlation.reference import Options
from place.kernels.testing import SHAPES, Case, build_inputs, compute_truth, measure_error

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SHAPE_NAMES = [",".join(map(str, shape)) for shape in SHAPES]


@pytest.mark.parametrize("patches", [196, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_hundred_reruns_give_the_same_bits(dtype: torch.dtype, patches: int) -> None:
    inputs = build_inputs(Case(patches, 128, 256, batch=8, dtype=dtype, focus=True), "cuda")

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        x = inputs.x_BND.detach().requires_grad_()
        loss, _ = patch_corr_loss(x, inputs.y_BNT, valid_BN=inputs.valid_BN, focus_BN=inputs.focus_BN, method="tiled")
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    first = run()
    for _ in range(200):
        again = run()
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
@pytest.mark.parametrize("method", ["tiled", "gram"])
def test_extra_memory_is_at_most_the_inputs(method: str, shape: tuple[int, int, int, int]) -> None:
    batch, patches, width, target_width = shape
    x = torch.randn(batch, patches, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = torch.randn(batch, patches, target_width, dtype=torch.bfloat16, device="cuda")
    patch_corr_loss(x, y, method=method)[0].backward()
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    patch_corr_loss(x, y, method=method)[0].backward()
    extra = torch.cuda.max_memory_allocated() - before
    # The gradient itself has to be.
    assert extra - x.nbytes <= x.nbytes + y.nbytes


def test_gradients_stay_exact_at_the_main_width_where_eager_bf16_loses_them() -> None:
    case = Case(196, 256, 256, batch=4, dtype=torch.bfloat16, noise=0.05, awkward=False)
    inputs = build_inputs(case, "cuda")
    truth = compute_truth(inputs, Options())
    errors = []
    for method, enabled in (("tiled", False), ("gram", False), ("reference", True)):
        x = inputs.x_BND.detach().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            mean_B, pairs_B = patch_corr_loss(x, inputs.y_BNT, reduction="none", method=method)
        (mean_B * pairs_B * inputs.weight_B).sum().backward()
        assert x.grad is not None
        errors.append(measure_error(x.grad, truth.to_x))
    assert max(errors[:2]) <= 4e-3
    assert errors[2] > 2e-2


def test_it_runs_on_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 37, 33, device="cuda:1", requires_grad=True)
    loss, _ = patch_corr_loss(x, torch.randn(2, 37, 48, device="cuda:1"), method="tiled")
    loss.backward()
    assert loss.device.index == 1


def test_it_compiles_by_inductor_into_one_graph() -> None:
    x, y = (torch.randn(4, 196, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def run(x: torch.Tensor) -> torch.Tensor:
        return patch_corr_loss(2 * x, y, method="tiled")[0]

    gradients = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_the_gate_of_the_benchmark_is_green() -> None:
    from place.kernels.benchmark import check_gate

    assert check_gate("cuda") == []


def test_compute_sanitizer_finds_nothing() -> None:
    tool = next((path for path in ("/usr/local/cuda/bin/compute-sanitizer",) if os.access(path, os.X_OK)), None)
    if tool is None:
        pytest.skip("no compute-sanitizer on this machine")
    code = (
        "import torch; from place.kernels.patch_correlation import patch_corr_loss\n"
        "for n in (37, 300):\n"
        "  for dtype in (torch.bfloat16, torch.float32):\n"
        "    x = torch.randn(2, n, 33, device='cuda', dtype=dtype, requires_grad=True)\n"
        "    patch_corr_loss(x, torch.randn(2, n, 48, device='cuda', dtype=dtype), method='tiled')[0].backward()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
