"""GradCache: whatever the accumulation, the gradients are those of one piece."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, build_batch, build_tiny_config

from place.config import Config
from place.losses.objective import compute_losses
from place.model.place import build_model
from place.training.engine import TorchEngine
from place.training.gradcache import backward_contrast


def run_step(accumulation: int, **sections: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = build_tiny_config(train={"accumulation": accumulation}, **sections)
    torch.manual_seed(0)
    model, _ = build_model(config, VOCAB, torch.device("cpu"))
    engine = TorchEngine(model, config, torch.device("cpu"))
    torch.manual_seed(1)
    losses, _ = backward_contrast(engine, build_batch(8, 0, config), accumulation, objective(config))
    return torch.stack(losses).detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def objective(config: Config):
    return lambda outputs, batch: compute_losses(outputs, batch, config.loss, 1 / 255)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    whole = torch.stack([value.norm() for value in a.values()]).norm()
    for name, value in a.items():
        # A bias of keys has no gradient but rounding: softmax does not see it.
        error = (b[name] - value).norm() / value.norm().clamp(min=float(1e-3 * whole))
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("tokens", [0.0, 1.0])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_leaves_losses_and_gradients_alone(accumulation: int, tokens: float) -> None:
    losses, gradients = run_step(1, loss={"tokens": {"weight": tokens}})
    other_losses, other = run_step(accumulation, loss={"tokens": {"weight": tokens}})
    assert (losses[-1] > 0) == (tokens > 0)
    torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=0)
    assert_same(gradients, other)
    assert {"log_scale_instance", "log_scale_pathology"} <= other.keys()


FP16 = {
    "engine": {"precision": "fp16"},
    # As small as gradients are at a batch of thousands.
    "loss": {"instance": {"weight": 0.0}, "pathology": {"weight": 0.0}, "correlation": {"weight": 1e-4}},
}


def test_small_gradients_survive_fp16_in_chunks_as_in_one_piece() -> None:
    _, gradients = run_step(1, **FP16)
    _, other = run_step(4, **FP16)
    largest = max(value.norm() for value in gradients.values())
    assert largest > 0
    for name, value in gradients.items():
        assert (other[name] - value).norm() < 0.02 * largest, name


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_overflow_leaves_the_step_out(accumulation: int) -> None:
    config = build_tiny_config(engine={"precision": "fp16"})
    torch.manual_seed(0)
    model, _ = build_model(config, VOCAB, torch.device("cpu"))
    engine = TorchEngine(model, config, torch.device("cpu"))
    engine.scale.value = 2.0**30
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    backward_contrast(engine, build_batch(8, 0, config), accumulation, objective(config))
    assert engine.step(1e-3) == 0
    assert engine.scale.value == 2.0**29
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"text": {"dropout": 0.3}}},
        {"model": {"correlation": {"mask_ratio": 0.4}}},
        {
            "model": {"text": {"dropout": 0.3}, "correlation": {"mask_ratio": 0.4}},
            "engine": {"activation_checkpointing": True},
        },
    ],
    ids=["dropout", "masks", "both-recomputed"],
)
def test_the_second_pass_draws_the_random_numbers_of_the_first(accumulation: int, sections: dict) -> None:
    config = build_tiny_config(**sections)
    torch.manual_seed(0)
    model, _ = build_model(config, VOCAB, torch.device("cpu"))
    engine = TorchEngine(model, config, torch.device("cpu"))
    batch = build_batch(8, 0, config)
    # One graph over the same chunks, drawn in the same order, is what GradCache must equal.
    torch.manual_seed(1)
    parts = [engine.forward(chunk) for chunk in batch.chunks(accumulation)]
    names = parts[0]._fields[:-1]
    whole = parts[0]._replace(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    objective(config)(whole, batch).total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(1)
    backward_contrast(engine, batch, accumulation, objective(config))
    assert_same(expected, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
