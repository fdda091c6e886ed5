"""The Triton kernels against float64: natively where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from place.kernels.patch_correlation.reference import Options
from place.kernels.testing import (
    Case,
    Inputs,
    Result,
    build_inputs,
    compute_plain,
    compute_truth,
    measure_error,
    poison_buffers,
)

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)
launch = importlib.import_module("place.kernels.patch_correlation.launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# `make test-gpu` takes these along where they run natively.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SLOW = pytest.mark.kernels
PLAIN, COVARIANCE = Options(), Options(normalize=False)
SMOOTH, DIAGONAL = Options(loss="smooth_l1", beta=0.2), Options(normalize=False, exclude_diag=False)
VARIANTS: dict[str, Case] = {
    "plain": Case(0, awkward=False),
    "awkward rows": Case(0),
    "one channel": Case(0, width=1, target_width=2, options=COVARIANCE),
    "covariance": Case(0, options=COVARIANCE),
    "smooth_l1": Case(0, options=SMOOTH),
    "diagonal": Case(0, options=DIAGONAL),
    "focus": Case(0, focus=True),
    "focus on covariance with diagonal": Case(0, focus=True, options=DIAGONAL),
    "strided": Case(0, width=5, target_width=80, strided=True),
    "converged": Case(0, width=33, target_width=33, noise=0.05),
}
SIZES = [1, 17, 37, pytest.param(196, marks=SLOW)]
HALVES: dict[str, Case] = {
    "bf16": Case(0, dtype=torch.bfloat16),
    "bf16 converged": Case(0, dtype=torch.bfloat16, target_width=33, noise=0.1, awkward=False),
    "bf16 covariance smooth_l1": Case(0, dtype=torch.bfloat16, options=Options(False, "smooth_l1", 0.5), focus=True),
    "bf16 strided": Case(0, dtype=torch.bfloat16, strided=True),
    "bf16 against fp32": Case(0, dtype=torch.bfloat16, target_dtype=torch.float32),
    "bf16 against int8": Case(0, dtype=torch.bfloat16, target_dtype=torch.int8),
    "bf16 against uint8": Case(0, dtype=torch.bfloat16, target_dtype=torch.uint8, focus=True),
    "fp16": Case(0, dtype=torch.float16, options=SMOOTH),
}


def run_kernels(inputs: Inputs, options: Options) -> Result:
    with poison_buffers():
        total_B, pairs_B = launch.sum_distances(*inputs[:4], options)
        to_x = launch.compute_gradient(inputs.weight_B, *inputs[:4], options)
        swapped = options._replace(eps_x=options.eps_y, eps_y=options.eps_x)
        x, y, *masks = inputs[:4]
        to_y = launch.compute_gradient(inputs.weight_B, y, x, *masks, swapped) if y.is_floating_point() else None
    return Result(total_B, pairs_B, to_x, to_y)


def find_errors(result: Result, truth: Result) -> list[float]:
    """Relative errors of totals and gradients; pair counts must agree exactly."""
    assert torch.equal(result.pairs_B, truth.pairs_B)
    pairs = [(result.total_B, truth.total_B), (result.to_x, truth.to_x), (result.to_y, truth.to_y)]
    return [measure_error(a, b) for a, b in pairs if a is not None and b is not None]


@pytest.mark.parametrize("patches", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_agrees_with_float64(variant: str, patches: int) -> None:
    case = VARIANTS[variant]._replace(patches=patches)
    inputs = build_inputs(case, DEVICE)
    errors = find_errors(run_kernels(inputs, case.options), compute_truth(inputs, case.options))
    assert max(errors) <= 1e-5


@pytest.mark.parametrize("patches", [1, 37, pytest.param(196, marks=SLOW)])
@pytest.mark.parametrize("variant", HALVES)
def test_halves_err_at_most_twice_as_much_as_plain_torch(variant: str, patches: int) -> None:
    case = HALVES[variant]._replace(patches=patches)
    inputs = build_inputs(case, DEVICE)
    truth = compute_truth(inputs, case.options)
    ours, plain = (find_errors(run(inputs, case.options), truth) for run in (run_kernels, compute_plain))
    assert [error for error, allowed in zip(ours, plain) if error > max(2 * allowed, 1e-6)] == []


@pytest.mark.parametrize("patches", [17, pytest.param(300, marks=SLOW)])
@pytest.mark.parametrize("variant", ["bf16", "bf16 converged", "bf16 covariance smooth_l1"])
def test_the_way_over_chunks_of_images_errs_no_more(
    variant: str, patches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = launch.choose_tile
    monkeypatch.setattr(launch, "choose_tile", lambda name, *rest: None if name == "panel" else choose(name, *rest))
    monkeypatch.setattr(launch, "H_BUDGET_BYTES", 2 * 32 * 17 * 2)
    case = HALVES[variant]._replace(patches=patches)
    inputs = build_inputs(case, DEVICE)
    truth = compute_truth(inputs, case.options)
    ours, plain = (find_errors(run(inputs, case.options), truth) for run in (run_kernels, compute_plain))
    assert [error for error, allowed in zip(ours, plain) if error > max(2 * allowed, 1e-6)] == []


def test_gradients_stay_exact_where_plain_bf16_loses_them() -> None:
    # Late in training C is close to T: their rounded difference is mostly rounding.
    case = Case(37, 64, 64, dtype=torch.bfloat16, noise=0.05, awkward=False)
    inputs = build_inputs(case, DEVICE)
    truth = compute_truth(inputs, case.options)
    ours, plain = (find_errors(run(inputs, case.options), truth) for run in (run_kernels, compute_plain))
    assert plain[1] > 2e-2
    assert ours[1] <= 4e-3


def test_a_large_mean_costs_no_accuracy() -> None:
    inputs = build_inputs(Case(37, 64, 64, dtype=torch.bfloat16, awkward=False), DEVICE)
    inputs = inputs._replace(x_BND=(inputs.x_BND.float() + 10).bfloat16())
    errors = find_errors(run_kernels(inputs, PLAIN), compute_truth(inputs, PLAIN))
    assert errors[1] <= 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    inputs = build_inputs(Case(37, dtype=dtype, focus=True), DEVICE)
    alone = Inputs(*(None if tensor is None else tensor[1:2] for tensor in inputs))
    together, single = run_kernels(inputs, PLAIN), run_kernels(alone, PLAIN)
    for a, b in zip(together, single):
        assert a is not None
        assert torch.equal(a[1:2], b)


def test_features_that_are_not_finite_reach_the_loss() -> None:
    inputs = build_inputs(Case(17, awkward=False), DEVICE)
    inputs.x_BND[1, 3, 0] = float("nan")
    total_B, _ = launch.sum_distances(*inputs[:4], PLAIN)
    assert total_B.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("variant", ["fp32", "bf16", "bf16 in chunks"])
def test_padding_may_hold_anything(variant: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant == "bf16 in chunks":
        choose = launch.choose_tile
        monkeypatch.setattr(launch, "choose_tile", lambda name, *rest: None if name == "panel" else choose(name, *rest))
    dtype = torch.float32 if variant == "fp32" else torch.bfloat16
    clean, dirty = (build_inputs(Case(37, dtype=dtype), DEVICE) for _ in range(2))
    for side in dirty[:2]:
        side[~dirty.valid_BN] = value
    for expected, found in zip(run_kernels(clean, PLAIN), run_kernels(dirty, PLAIN)):
        assert expected is not None
        assert found is not None
        assert expected.isfinite().all()
        assert torch.equal(found, expected)


def test_an_empty_batch_has_no_pairs() -> None:
    x_BND = torch.zeros(0, 5, 4, device=DEVICE)
    total_B, pairs_B = launch.sum_distances(x_BND, x_BND, None, None, PLAIN)
    assert total_B.shape == pairs_B.shape == (0,)
    assert launch.compute_gradient(total_B, x_BND, x_BND, None, None, PLAIN).shape == (0, 5, 4)
