"""The optimiser: what decays, and that a step takes the learning rate that it is given."""

from __future__ import annotations

import torch
from tiny import VOCAB, build_batch, build_tiny_config

from place.config import OptimConfig
from place.losses.objective import compute_losses
from place.model.place import build_model
from place.training.engine import TorchEngine
from place.training.gradcache import backward_contrast
from place.training.optim import build_optimizer

CPU = torch.device("cpu")


def test_weights_decay_and_norms_biases_temperatures_positions_and_queries_do_not() -> None:
    model, _ = build_model(build_tiny_config(), VOCAB, CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    options = OptimConfig(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7)
    groups = build_optimizer(model, options).param_groups
    assert all((group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-7) for group in groups)
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay.keys() == set(names.values())
    single = (
        "log_scale_instance",
        "log_scale_pathology",
        "observe.queries",
        "vision.vit.pos_embed",
        "vision.vit.cls_token",
    )
    positions = "text.encoder.embeddings.position_embeddings.weight"
    others = {
        name
        for name in decay
        if name.endswith("bias") or "norm" in name.lower() or name == "correlate.project.0.weight"
    }
    plain = {*single, positions, *others}
    assert {name for name, value in decay.items() if value == 0} == plain
    assert {value for name, value in decay.items() if name not in plain} == {0.1}


def test_a_step_takes_the_learning_rate_that_it_is_given() -> None:
    config = build_tiny_config(optim={"weight_decay": 0.0})
    torch.manual_seed(0)
    engine = TorchEngine(build_model(config, VOCAB, CPU)[0], config, CPU)
    weight = engine.model.observe.queries
    for rate in (0.03, 0.0):
        before = weight.detach().clone()
        backward_contrast(engine, build_batch(8), 1, lambda o, b: compute_losses(o, b, config.loss, 1 / 255))
        engine.step(rate)
        # Adam's first step is the learning rate itself, up or down.
        torch.testing.assert_close((weight - before).abs().max(), torch.tensor(rate), rtol=1e-3, atol=0)
