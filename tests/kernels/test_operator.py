"""The registered operator: gradients, what torch checks of an operator, compilation, and its cost on a CPU."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from place.kernels import patch_correlation
from place.kernels.patch_correlation import choose_implementation, patch_corr_loss
from place.kernels.patch_correlation.autograd import patch_corr, patch_corr_gradient
from place.kernels.patch_correlation.reference import Options
from place.kernels.testing import Case, build_inputs, compute_truth, measure_error, measure_peak_bytes
from torch import Tensor

METHODS = ["tiled", "gram"]
OPTIONS = [
    Options(normalize, loss, 0.2, exclude_diag)
    for normalize, loss, exclude_diag in itertools.product([True, False], ["mse", "smooth_l1"], [True, False])
]


@pytest.mark.parametrize("focus", [False, True])
@pytest.mark.parametrize("patches", [1, 37, 300])
@pytest.mark.parametrize("method", ["chunked", "gram"])
def test_implementations_in_torch_equal_the_reference(method: str, patches: int, focus: bool) -> None:
    for options in OPTIONS:
        if method == "gram" and options.loss != "mse":
            continue
        inputs = build_inputs(Case(patches, 5, 9, focus=focus, awkward=patches > 1, options=options))
        x, y = (side.double().requires_grad_() for side in inputs[:2])
        total_B, pairs_B = patch_corr(x, y, *inputs[2:4], *options, method)
        (total_B * inputs.weight_B).sum().backward()
        truth = compute_truth(inputs, options)
        assert torch.equal(pairs_B, truth.pairs_B)
        for ours, theirs in ((total_B, truth.total_B), (x.grad, truth.to_x), (y.grad, truth.to_y)):
            assert ours is not None
            assert theirs is not None
            assert measure_error(ours, theirs) < 1e-11


@pytest.mark.parametrize("method", METHODS)
def test_gradients_to_both_sides_pass_gradcheck(method: str) -> None:
    inputs = build_inputs(Case(6, 4, 5, focus=True))
    x, y = (side.double().requires_grad_() for side in inputs[:2])

    def run(x: Tensor, y: Tensor) -> Tensor:
        return patch_corr_loss(x, y, valid_BN=inputs.valid_BN, focus_BN=inputs.focus_BN, method=method)[0]

    assert torch.autograd.gradcheck(run, (x, y))


@pytest.mark.parametrize("method", ["chunked", "gram"])
def test_the_operators_pass_opcheck(method: str) -> None:
    inputs = build_inputs(Case(6, 4, 5, focus=True))
    x, y, *rest = inputs[:4]
    options = Options()
    forward = (x.requires_grad_(), y, *rest, *options, method)
    backward = (inputs.weight_B, x.detach(), y, *rest, *options, method)
    for operator, arguments in ((patch_corr, forward), (patch_corr_gradient, backward)):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("method", [*METHODS, "reference"])
def test_what_is_not_finite_is_seen_but_in_padding(method: str, value: float) -> None:
    inputs = build_inputs(Case(37, 5, 9))
    results = []
    for padding in (0.0, value):
        x, y = (side.masked_fill(~inputs.valid_BN[..., None], padding).requires_grad_() for side in inputs[:2])
        loss, _ = patch_corr_loss(x, y, valid_BN=inputs.valid_BN, method=method)
        results.append((loss, *torch.autograd.grad(loss, (x, y))))
    assert all(map(torch.equal, *results))
    x = inputs.x_BND.clone()
    x[0, inputs.valid_BN[0].nonzero()[0], 2] = value
    assert patch_corr_loss(x, inputs.y_BNT, valid_BN=inputs.valid_BN, method=method)[0].isnan()


@pytest.mark.parametrize("method", [*METHODS, "reference"])
def test_autocast_changes_nothing(method: str) -> None:
    inputs = build_inputs(Case(37, 5, 9, focus=True))
    results = []
    for enabled in (False, True):
        x = inputs.x_BND.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = patch_corr_loss(x, inputs.y_BNT, valid_BN=inputs.valid_BN, method=method)
        # The definition's backward pass is torch's own, which is not for autocast.
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and method != "reference"):
            (to_x,) = torch.autograd.grad(loss, x)
        results.append((loss, to_x))
    assert all(map(torch.equal, *results))


# Inductor takes long to start, and nothing of the operator is its to compile.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("method", METHODS)
def test_it_compiles_into_one_graph(method: str, backend: str) -> None:
    inputs = build_inputs(Case(9, 4, 5, focus=True))

    def run(x: Tensor, y: Tensor) -> Tensor:
        return patch_corr_loss(2 * x, y, valid_BN=inputs.valid_BN, focus_BN=inputs.focus_BN, method=method)[0]

    gradients = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        x = inputs.x_BND.clone().requires_grad_()
        function(x, inputs.y_BNT).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_cpu_it_is_faster_than_eager_in_less_than_half_the_memory(method: str) -> None:
    x, y = torch.randn(2, 1024, 128, requires_grad=True), torch.randn(2, 1024, 256)

    def step(method: str) -> None:
        x.grad = None
        patch_corr_loss(x, y, method=method)[0].backward()

    seconds: dict[str, list[float]] = {"reference": [], method: []}
    for _ in range(6):
        for name, values in seconds.items():
            start = time.process_time()
            step(name)
            values.append(time.process_time() - start)
    assert min(seconds[method]) <= min(seconds["reference"])
    x.grad = None
    assert measure_peak_bytes(lambda: step(method)) <= measure_peak_bytes(lambda: step("reference")) / 2


def test_only_the_inputs_are_kept_for_backward() -> None:
    inputs = build_inputs(Case(40, 8, 8))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch_corr(inputs.x_BND.requires_grad_(), *inputs[1:4], *Options(), "chunked")
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in inputs[:3]}


@pytest.mark.parametrize(
    ("shape", "loss", "method", "expected"),
    [
        ((2, 196, 128, 256), "mse", "auto", "chunked"),
        ((2, 768, 128, 256), "mse", "auto", "gram"),
        ((2, 768, 128, 256), "smooth_l1", "auto", "chunked"),
        ((2, 196, 128, 256), "mse", "gram", "gram"),
        ((2, 196, 128, 256), "mse", "reference", "reference"),
    ],
)
def test_auto_follows_the_documented_rule(shape: tuple[int, ...], loss: str, method: str, expected: str) -> None:
    batch, patches, width, target_width = shape
    x, y = torch.zeros(batch, patches, width), torch.zeros(batch, patches, target_width)
    assert choose_implementation(x, y, loss, method) == expected


@pytest.mark.parametrize(("method", "expected"), [("auto", "triton"), ("gram", "gram"), ("tiled", "triton")])
def test_on_a_gpu_auto_is_always_the_fused_kernel(method: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_correlation, "has_triton", lambda: True)
    wide = SimpleNamespace(shape=(2, 768, 128), is_cuda=True, dtype=torch.bfloat16)
    assert choose_implementation(wide, wide, "mse", method) == expected


def test_gram_is_refused_for_what_it_cannot_do() -> None:
    x = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match="method 'gram' computes mse only"):
        patch_corr_loss(x, x, loss="smooth_l1", method="gram")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"beta": 0.0, "loss": "smooth_l1"}, "beta 0.0, expected more than 0"),
        ({"valid_BN": torch.ones(1, 3)}, "valid is torch.float32"),
        ({"focus_BN": torch.ones(1, 4, dtype=torch.bool)}, r"focus is torch.bool \(1, 4\), expected bool \(1, 3\)"),
    ],
)
def test_masks_and_beta_are_checked(change: dict, line: str) -> None:
    x = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match=line):
        patch_corr_loss(x, x, **change)


def test_integers_have_no_gradient() -> None:
    with pytest.raises(ValueError, match="x is torch.int8, expected floating point"):
        patch_corr_loss(torch.ones(1, 3, 4, dtype=torch.int8), torch.randn(1, 3, 4))
