"""GradCache: the loss sees the whole global batch though the activations of only one chunk are held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from place.batch import Batch, Losses, Outputs
from place.training.engine import Engine

Objective = Callable[[Outputs, Batch], Losses]
TRAINED = (
    "image_BE",
    "text_BE",
    "observations_BKE",
    "sentences_BSE",
    "z_BNE",
    "regions_BNE",
    "words_BTE",
    "logit_scales",
)


def backward_contrast(engine: Engine, batch: Batch, accumulation: int, objective: Objective) -> tuple[Losses, Tensor]:
    """Forward, loss and backward of one optimiser step, in one piece or in chunks.

    Chunks are encoded twice: first without gradient, so that the loss can be taken over all features and give the
    gradient of each; then with gradient and the same random numbers, to carry these gradients into the parameters. The
    sum equals the gradient of one piece.

    Returns:
        This rank's share of the losses, and the inverse temperatures (2,).
    Source: quoted (Gao et al. 2021, GradCache); the library of that name is not used.
    """
    if accumulation == 1:
        outputs = engine.forward(batch)
        losses = objective(outputs, batch)
        engine.backward(losses.total, is_last=True)
        return losses, outputs.logit_scales.detach()
    chunks = batch.chunks(accumulation)
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_read_rng(engine.device))
            parts.append(engine.forward(chunk))
    features = _join(parts)
    losses = objective(features, batch)
    # In fp16 the features' gradients are fp16 too, and lost without the scale that `engine.backward` puts on.
    scale = engine.scale.value
    (losses.total * scale).backward()
    gradients = _split_gradients(features, len(chunks[0].sample_id_B), accumulation)
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True), start=1):
        _restore_rng(engine.device, state)
        outputs = engine.forward(chunk)
        engine.backward(_surrogate(outputs, gradients[number - 1]) / scale, is_last=number == accumulation)
    return losses, features.logit_scales.detach()


def _join(parts: list[Outputs]) -> Outputs:
    """Features of all chunks as one, leaves of a new graph."""
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in Outputs._fields[:-1]}
    features = Outputs(**joined, logit_scales=parts[0].logit_scales)
    return features._replace(**{name: getattr(features, name).detach().requires_grad_() for name in TRAINED})


def _split_gradients(features: Outputs, size: int, accumulation: int) -> list[dict[str, Tensor]]:
    """The gradient of each feature by chunk; that of the temperatures, which have no batch, is shared out."""
    by_chunk: list[dict[str, Tensor]] = [{} for _ in range(accumulation)]
    for name in TRAINED:
        gradient = getattr(features, name).grad
        if gradient is None:
            continue
        pieces = [gradient / accumulation] * accumulation if name == "logit_scales" else gradient.split(size)
        for chunk, piece in zip(by_chunk, pieces, strict=True):
            chunk[name] = piece
    return by_chunk


def _surrogate(outputs: Outputs, gradients: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient by each feature is the cached one."""
    terms = [(getattr(outputs, name).float() * gradient).sum() for name, gradient in gradients.items()]
    return torch.stack(terms).sum()


def _read_rng(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_rng(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
