"""Attention backends agree with the definition, and the choice says why."""

from __future__ import annotations

import pytest
import timm
import torch
from place.kernels.attention import attend, attention_weights, choose_backend, patch_timm_attention

CPU = torch.device("cpu")


def build_inputs(mask: bool) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, length, 8, generator=rng, requires_grad=True) for length in (5, 13, 13))
    lengths = torch.tensor([13, 1, 7])
    return q, k, v, (torch.arange(13)[None] < lengths[:, None]) if mask else None


@pytest.mark.parametrize("mask", [False, True])
def test_sdpa_equals_the_definition_with_gradients(mask: bool) -> None:
    q, k, v, mask_BK = build_inputs(mask)
    results = []
    for backend in ("eager", "sdpa"):
        out = attend(q, k, v, mask_BK, backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_masked_keys_have_no_influence() -> None:
    q, k, v, mask_BK = build_inputs(True)
    before = attend(q, k, v, mask_BK, "sdpa")
    far = torch.where(mask_BK[:, None, :, None], v, v + 1e4)
    torch.testing.assert_close(attend(q, k, far, mask_BK, "sdpa"), before)


def test_attention_weights_are_a_distribution_in_fp32() -> None:
    q, k, _v, _ = build_inputs(False)
    weights = attention_weights(q.bfloat16(), k.bfloat16())
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 5))


def test_auto_falls_back_on_cpu_and_says_why() -> None:
    assert choose_backend("auto", CPU) == ("sdpa", "xformers has no attention operator for cpu")
    assert choose_backend("eager", CPU)[0] == "eager"


def test_xformers_by_name_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match="no attention operator for cpu; use auto or sdpa"):
        choose_backend("xformers", CPU)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_patched_timm_encoder_gives_what_timm_gives(backend: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", **size).eval()
    image = torch.randn(2, 3, 32, 32)
    before = vit.forward_features(image)
    assert patch_timm_attention(vit, backend) == 2
    torch.testing.assert_close(vit.forward_features(image), before, rtol=1e-4, atol=1e-5)


def test_an_attention_with_dropped_weights_is_refused() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, attn_drop_rate=0.1)
    with pytest.raises(ValueError, match="gate or dropout"):
        patch_timm_attention(vit, "sdpa")
