"""Attention backends agree with the definition, padded and packed, inside other people's models too."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torch.nn.attention.varlen
from place.kernels.attention import (
    Blocks,
    Routed,
    attend,
    attention_weights,
    backends,
    build_full_packing,
    build_packing,
    choose_backend,
    pack,
    unpack,
)
from place.kernels.attention.packing import mark_real, number_positions, number_sequences
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
LENGTHS = [13, 1, 7]
needs_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")


def build_inputs(dtype: torch.dtype = torch.float32, head: int = 8, device: str = "cpu") -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 2, length, head) for length in (5, 13, 13)]
    return [torch.randn(shape, generator=rng).to(device, dtype).requires_grad_() for shape in shapes]


def build_mask(device: str = "cpu") -> Tensor:
    """Real keys; those of the last row lie at its end."""
    mask_BK = torch.arange(13) < torch.tensor(LENGTHS)[:, None]
    mask_BK[2] = mask_BK[2].flip(0)
    return mask_BK.to(device)


def run_padded(backend: str, inputs: list[Tensor], mask_BK: Tensor | None) -> list[Tensor]:
    """Output, and the gradient of each input."""
    out = attend(*inputs, mask_BK, backend)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


def run_packed(backend: str, inputs: list[Tensor], mask_BK: Tensor) -> list[Tensor]:
    """The same of packed inputs, whose gradients come back to the padded ones."""
    keys = build_packing(mask_BK)
    queries = build_full_packing(3, 5, mask_BK.device)
    parts = [
        pack(x.transpose(1, 2), packing).transpose(0, 1)[None]
        for x, packing in zip(inputs, (queries, keys, keys), strict=True)
    ]
    out = attend(parts[0], parts[1], parts[2], Blocks(queries, keys), backend)
    out = unpack(out[0].transpose(0, 1), queries).transpose(1, 2)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.mark.parametrize("run", [run_padded, run_packed])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_each_way_equals_the_definition_with_gradients(backend: str, run: Any) -> None:
    inputs, mask_BK = build_inputs(torch.float64), build_mask()
    expected = run_padded("eager", inputs, mask_BK)
    for ours, theirs in zip(run(backend, inputs, mask_BK), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def find_errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]


def check_tolerance(backend: str, dtype: torch.dtype, head: int, device: str) -> None:
    """Errors against fp64 are at most twice those of the definition at the same precision.

    Or below 1e-6: torch's own flash kernel for CPUs errs by up to 4 times as much in fp32. Or below 1e-5 on a GPU,
    where its memory-efficient kernel in fp32 erred by up to 6.5e-6 (H100, torch 2.11).
    """
    floor = 1e-6 if device == "cpu" else 1e-5
    rough, mask_BK = build_inputs(dtype, head, device), build_mask(device)
    exact = run_padded("eager", [x.detach().double().cpu().requires_grad_() for x in rough], mask_BK.cpu())
    plain = find_errors(run_padded("eager", rough, mask_BK), exact)
    for run in (run_padded, run_packed):
        for ours, theirs in zip(find_errors(run(backend, rough, mask_BK), exact), plain, strict=True):
            assert ours <= max(2 * theirs, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [8, 20])
def test_sdpa_errs_at_most_twice_as_much_as_the_definition(dtype: torch.dtype, head: int) -> None:
    check_tolerance("sdpa", dtype, head, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [16, 64, 80])
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_a_gpu_errs_at_most_twice_as_much_as_the_definition(backend: str, dtype: torch.dtype, head: int) -> None:
    if backend == "xformers" and choose_backend("auto", torch.device("cuda"), dtype, [head])[0] != "xformers":
        pytest.skip(choose_backend("auto", torch.device("cuda"), dtype, [head])[1])
    check_tolerance(backend, dtype, head, "cuda")


def attend_by_definition(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
) -> Tensor:
    """What xformers documents as the equivalent of its operator, which no CPU has."""
    if isinstance(attn_bias, Tensor):
        assert attn_bias.stride(-2) % 8 == 0, "cutlass wants rows of bias aligned to 8"
        assert attn_bias.shape == (*q.shape[:1], q.shape[2], q.shape[1], k.shape[1])
    elif attn_bias is not None:
        attn_bias = attn_bias.materialize((1, q.shape[2], q.shape[1], k.shape[1]))
    scores = q.transpose(1, 2) * scale @ k.permute(0, 2, 3, 1)
    weights = (scores if attn_bias is None else scores + attn_bias).softmax(-1)
    return (torch.nn.functional.dropout(weights, p) @ v.transpose(1, 2)).transpose(1, 2)


@needs_xformers
@pytest.mark.parametrize("run", [run_padded, run_packed])
def test_xformers_is_called_so_that_it_gives_the_definition(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import xformers.ops

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", attend_by_definition)
    inputs, mask_BK = build_inputs(), build_mask()
    expected = run_padded("eager", inputs, mask_BK)
    for ours, theirs in zip(run("xformers", inputs, mask_BK), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_xformers
def test_xformers_block_diagonal_bias_joins_what_our_blocks_join() -> None:
    mask_BK = build_mask()
    keys, queries = build_packing(mask_BK), build_full_packing(3, 5, CPU)
    bias = backends.build_block_diagonal(queries.lengths, keys.lengths, "cpu").materialize((15, sum(LENGTHS)))
    together = number_sequences(queries)[:, None] == number_sequences(keys)
    assert torch.equal(bias == 0, together)


def attend_sequence_by_sequence(
    q_PHD: Tensor, k_PHD: Tensor, v_PHD: Tensor, starts_q: Tensor, starts_k: Tensor, *longest: int, scale: float
) -> Tensor:
    """What torch documents of its varlen_attn, which runs on CUDA alone."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    all_starts = (q_PHD, starts_q), (k_PHD, starts_k), (v_PHD, starts_k)
    attended = []
    for q, k, v in zip(*(x.tensor_split(starts[1:-1].long()) for x, starts in all_starts), strict=True):
        assert len(q) <= longest[0]
        assert len(k) <= longest[1]
        weights_HQK = torch.einsum("qhd,khd->hqk", q, k).mul(scale).softmax(-1)
        attended.append(torch.einsum("hqk,khd->qhd", weights_HQK, v))
    return torch.cat(attended)


def test_flash_attention_is_called_so_that_it_gives_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_flash_varlen", lambda *_: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_sequence_by_sequence)
    inputs, mask_BK = build_inputs(torch.float64), build_mask()
    expected = run_padded("eager", inputs, mask_BK)
    for ours, theirs in zip(run_packed("sdpa", inputs, mask_BK), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_flash_attention_over_sequences_is_for_half_precision_on_cuda_without_dropout() -> None:
    assert backends.has_flash_varlen("cuda", torch.bfloat16, 64, 0.0)
    for changed in (
        ("cpu", torch.bfloat16, 64, 0.0),
        ("cuda", torch.float32, 64, 0.0),
        ("cuda", torch.bfloat16, 20, 0.0),
        ("cuda", torch.bfloat16, 264, 0.0),
        ("cuda", torch.bfloat16, 64, 0.1),
    ):
        assert not backends.has_flash_varlen(*changed)


@pytest.mark.parametrize("run", [run_padded, run_packed])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_masked_keys_have_no_influence(backend: str, run: Any) -> None:
    (q, k, v), mask_BK = build_inputs(), build_mask()
    far = torch.where(mask_BK[:, None, :, None], v, v + 1e4).detach().requires_grad_()
    before, after = (run(backend, [q, k, values], mask_BK)[0] for values in (v, far))
    torch.testing.assert_close(after, before)


def test_a_packed_batch_goes_there_and_back() -> None:
    mask_BK, x = build_mask(), torch.randn(3, 13, 4, requires_grad=True)
    packing = build_packing(mask_BK)
    assert packing.lengths == tuple(LENGTHS)
    assert torch.equal(mark_real(packing), mask_BK)
    assert torch.equal(pack(x, packing), x[mask_BK])
    back = unpack(pack(x, packing), packing)
    assert torch.equal(back, x * mask_BK[..., None])
    back.sum().backward()
    assert torch.equal(x.grad, mask_BK[..., None].expand(-1, -1, 4).float())
    assert number_positions(packing).tolist() == [*range(13), 0, *range(7)]


def test_attention_weights_are_a_distribution_in_fp32() -> None:
    q, k, _v = build_inputs(torch.bfloat16)
    weights = attention_weights(q, k)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_weights(q, k), weights)


def test_auto_falls_back_on_cpu_and_says_why() -> None:
    assert choose_backend("auto", CPU) == ("sdpa", "xformers has no attention operator for cpu")
    assert choose_backend("eager", CPU)[0] == "eager"


def test_xformers_by_name_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match="no attention operator for cpu; use auto or sdpa"):
        choose_backend("xformers", CPU)


def build_vit(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **size, **changes).eval()


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_routed_timm_encoder_gives_what_timm_gives(backend: str, changes: dict) -> None:
    vit, image = build_vit(**changes), torch.randn(2, 3, 32, 32)
    before = vit.forward_features(image)
    with Routed(backend) as route:
        after = vit.forward_features(image)
    assert route.has_attended
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    route.has_attended = False
    vit.forward_features(image)
    assert not route.has_attended, "outside the context torch's own attention runs"


class Operators(TorchDispatchMode):
    """Keeps the names of torch's operators as they run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names = [*getattr(self, "names", []), func.name()]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("stride", "size", "is_product"), [((4, 2), (12, 8), True), ((4, 2), (13, 8), False), ((2, 2), (12, 8), False)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_routed_convolution_of_patches_is_a_product(
    channels: int, stride: tuple, size: tuple, is_product: bool
) -> None:
    conv, image_BCYX = torch.nn.Conv2d(channels, 6, (4, 2), stride), torch.randn(2, channels, *size)
    results = []
    for route in (nullcontext(), Routed("sdpa")):
        conv.zero_grad()
        with route, Operators() as operators:
            out = conv(image_BCYX)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in conv.parameters())])
    assert ("aten::convolution" not in operators.names) == is_product
    with Routed("sdpa"):
        named = torch.nn.functional.conv2d(image_BCYX, weight=conv.weight, bias=conv.bias, stride=stride)
    torch.testing.assert_close(named, results[0][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_of_weights_is_that_of_the_encoder() -> None:
    vit, image = build_vit(attn_drop_rate=0.5), torch.randn(2, 3, 32, 32)
    with Routed("eager"):
        assert torch.equal(vit.forward_features(image), vit.forward_features(image))
        vit.train()
        assert not torch.equal(vit.forward_features(image), vit.forward_features(image))


@pytest.mark.parametrize("argument", [{"is_causal": True}, {"enable_gqa": True}])
def test_an_attention_that_is_not_offered_is_refused(argument: dict) -> None:
    q = torch.zeros(1, 2, 3, 8)
    with Routed("sdpa"), pytest.raises(ValueError, match="causal or shares keys among heads"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, **argument)
