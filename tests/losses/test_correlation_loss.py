"""In half precision the target of pixels goes to the kernel in half precision too, and nothing is lost by it."""

from __future__ import annotations

import pytest
import torch
from place.kernels.patch_correlation.reference import Options, sum_distances

from place.config import CorrelationLossConfig
from place.data.phantom import generate_study
from place.data.transforms import eval_transform
from place.losses import correlation
from place.model.place import patchify

GREY_LEVEL = 4 / 255


def read_target() -> torch.Tensor:
    """Pixels of the patches (B,N,T) of phantoms: bright and dark ones, flat ones among them."""
    images = [eval_transform(generate_study(1, number, 96).image_YX, 96, 0.5, 0.25) for number in range(4)]
    return patchify(torch.stack(images), 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_those_of_the_exact_target(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    target_BND, seen = read_target(), []
    everywhere_BN = torch.ones(target_BND.shape[:2], dtype=torch.bool)
    z_BNE = (target_BND[..., :32] + torch.randn(*target_BND.shape[:2], 32)).to(dtype)
    exact_BNE, z_BNE = z_BNE.detach().double().requires_grad_(), z_BNE.requires_grad_()
    plain = correlation.patch_corr_loss
    monkeypatch.setattr(
        correlation, "patch_corr_loss", lambda x, y, **options: seen.append(y) or plain(x, y, **options)
    )
    loss = correlation.correlation_loss(
        z_BNE, target_BND, everywhere_BN, everywhere_BN, CorrelationLossConfig(), GREY_LEVEL
    )
    loss.backward()
    total_B, pairs_B = sum_distances(exact_BNE, target_BND.double(), None, None, Options(eps_y=GREY_LEVEL))
    exact = (total_B / pairs_B).mean()
    exact.backward()
    assert seen[0].dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert (z_BNE.grad.double() - exact_BNE.grad).norm() < 4e-3 * exact_BNE.grad.norm()
