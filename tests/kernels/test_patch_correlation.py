"""The reference patch-correlation loss against a loop over pairs in float64, and its edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from place.kernels.patch_correlation import patch_corr_loss
from place.kernels.patch_correlation.gram import multiply_halves


def loop_over_pairs(x, y, valid, focus, normalize: bool, loss: str, beta: float) -> list[tuple[float, int]]:
    """The definition once more, pair by pair: (sum, pairs) per image."""
    results = []
    for image in range(len(x)):
        total, pairs = 0.0, 0
        for i in range(x.shape[1]):
            for j in range(x.shape[1]):
                rows = [side[image, k] for side in (x, y) for k in (i, j)]
                flat = any((row - row.mean()).norm() < 1e-9 for row in rows)
                counts = valid[image, i] and valid[image, j] and (focus[image, i] or focus[image, j])
                if i == j or flat or not counts:
                    continue
                c, t = (_pair(side[image, i], side[image, j], normalize) for side in (x, y))
                d = abs(float(c - t))
                total += d * d if loss == "mse" else (d * d / (2 * beta) if d < beta else d - beta / 2)
                pairs += 1
        results.append((total, pairs))
    return results


def _pair(a, b, normalize: bool):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm() if normalize else len(a))


def build_inputs() -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(4, 7, 5, generator=rng, dtype=torch.float64)
    y = torch.randn(4, 7, 9, generator=rng, dtype=torch.float64)
    x[0, 2], y[1, 4] = 1.5, -2.0  # constant patches
    valid = torch.rand(4, 7, generator=rng) > 0.2
    valid[3] = False  # an image of padding alone
    return x.requires_grad_(), y, valid, torch.rand(4, 7, generator=rng) > 0.6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_the_reference_equals_a_loop_over_pairs(normalize: bool, loss: str) -> None:
    x, y, valid, focus = build_inputs()
    options = {"valid_BN": valid, "focus_BN": focus, "normalize": normalize, "loss": loss}
    expected = loop_over_pairs(x.detach(), y, valid, focus, normalize, loss, 0.1)
    means = [total / max(pairs, 1) for total, pairs in expected]
    each, pairs_B = patch_corr_loss(x, y, reduction="none", **options)
    assert each.tolist() == pytest.approx(means, rel=1e-10)
    assert pairs_B.tolist() == [pairs for _, pairs in expected]
    by_image, images = patch_corr_loss(x, y, reduction="image", **options)
    assert by_image.item() == pytest.approx(sum(means), rel=1e-10)
    assert images.item() == sum(pairs > 0 for _, pairs in expected)
    by_pair, pairs = patch_corr_loss(x, y, reduction="pairs", **options)
    assert by_pair.item() == pytest.approx(sum(total for total, _ in expected) / pairs.item(), rel=1e-10)


def test_gradients_are_right_and_finite_beside_constant_patches() -> None:
    x, y, valid, focus = build_inputs()

    def run(x: torch.Tensor) -> torch.Tensor:
        return patch_corr_loss(x, y, valid_BN=valid, focus_BN=focus)[0]

    assert torch.autograd.gradcheck(run, (x,))
    (gradient,) = torch.autograd.grad(run(x), x)
    assert gradient.isfinite().all()
    assert gradient[3].abs().max() == 0
    assert gradient[0, 2].abs().max() == 0


def test_equal_correlations_cost_nothing() -> None:
    x = torch.randn(2, 6, 8)
    loss, count = patch_corr_loss(x, 3 * x + 1)
    assert loss.item() < 1e-10
    assert count.item() == 2


def test_the_diagonal_counts_only_when_asked_for() -> None:
    x, y = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    assert patch_corr_loss(x, y, reduction="none")[1].item() == 30
    assert patch_corr_loss(x, y, reduction="none", exclude_diag=False)[1].item() == 36


def test_bf16_is_computed_in_fp32() -> None:
    x, y = torch.randn(2, 9, 16).bfloat16(), torch.randn(2, 9, 16)
    loss, _ = patch_corr_loss(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, patch_corr_loss(x.double(), y.double())[0].float(), rtol=1e-4, atol=1e-6)
    assert math.isfinite(loss.item())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"method": "fast"}, "method 'fast', expected one of auto"),
        ({"loss": "l1"}, "loss 'l1', expected one of mse, smooth_l1"),
        ({"reduction": "sum"}, "reduction 'sum', expected one of pairs, image, none"),
    ],
)
def test_unknown_options_are_refused(options: dict, line: str) -> None:
    x = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match=line):
        patch_corr_loss(x, x, **options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="B and N must agree"):
        patch_corr_loss(torch.randn(1, 3, 4), torch.randn(1, 4, 4))


def test_halves_multiply_like_fp32_whatever_the_size_of_the_factors() -> None:
    """What a GPU does, its fp16 products with fp32 sums done in fp32 here."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 40, 300, generator=rng), torch.randn(3, 300, 20, generator=rng)
    for size in (1e-6, 1.0, 1e6):
        product = multiply_halves(size * a, b, lambda left, right: left.float() @ right.float())
        truth = size * (a.double() @ b.double())
        assert (product - truth).norm() <= 1e-6 * truth.norm()
    for image in range(3):
        one = slice(image, image + 1)
        apart = multiply_halves(1e6 * a[one], b[one], lambda left, right: left.float() @ right.float())
        assert torch.equal(apart, product[one]), "images do not depend on each other"
    assert multiply_halves(0 * a, b, lambda left, right: left.float() @ right.float()).abs().max() == 0
