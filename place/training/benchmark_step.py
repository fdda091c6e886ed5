"""A whole training step with the correlation loss off, as its definition, compiled, and as it is trained: time, memory.

    python -m place.training.benchmark_step --config configs/pretrain_vitb16.yaml --batch 64

Weights are random and reports as long as data.max_tokens: no data set and no download. First all ways must agree on the
loss; then each takes its steps in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from place.batch import Batch, Losses
from place.config import Config, build_config
from place.kernels.benchmark import Timer, describe_run, quantiles
from place.kernels.testing import measure_peak_bytes
from place.losses import correlation
from place.losses.objective import compute_losses
from place.model.place import build_model
from place.training.engine import TorchEngine
from place.training.footprint import find_report_encoder
from place.training.gradcache import backward_contrast

WAYS = {"off": "auto", "eager": "reference", "compiled": "reference", "fused": "auto"}
TOLERANCE = 2e-2
"""Of the correlation loss, relative: the definition sees bf16 features as fp32 ones, and so do all others."""
FLUSH_MIB = 256


def build_batch(config: Config, pairs: int, patch_px: int, vocab_size: int, length_B: Tensor | None = None) -> Batch:
    """Random pairs of reports as long as asked (default: data.max_tokens); sentences of equal length fill each."""
    data, rng = config.data, torch.Generator().manual_seed(0)
    length_B = torch.full((pairs,), data.max_tokens) if length_B is None else length_B
    attention_BT = torch.arange(data.max_tokens) < length_B[:, None]
    owner_BT = torch.arange(data.max_tokens) * data.max_sentences // length_B[:, None]
    return Batch(
        torch.randn(pairs, 1, data.image_size_px, data.image_size_px, generator=rng),
        torch.randint(vocab_size, (pairs, data.max_tokens), generator=rng),
        attention_BT,
        torch.where(attention_BT, owner_BT, -1),
        torch.arange(1, pairs * data.max_sentences + 1).view(pairs, -1),
        torch.arange(pairs),
        torch.arange(pairs),
        torch.ones(pairs, (data.image_size_px // patch_px) ** 2, dtype=torch.bool),
        length_B,
        length_B.clamp(max=data.max_sentences),
    )


def build_engine(config: Config, device: torch.device, mode: str | None = None) -> tuple[TorchEngine, int, int]:
    """The engine of a model of random weights, its patch in px, its vocabulary; hubs are not asked for anything.

    Args:
        mode: of torch.compile for the encoders; None leaves them eager.
    """
    definition, vocab_size, _ = find_report_encoder(config)
    vocab_size = vocab_size or definition.vocab_size  # type: ignore[union-attr]
    torch.manual_seed(0)
    scratch = config.model.vision.model_copy(update={"source": "scratch"})
    architecture = config.model.vision.source.removeprefix("timm:")
    if config.model.vision.source != "scratch":
        scratch = scratch.model_copy(update={"architecture": architecture})
    config = config.model_copy(update={"model": config.model.model_copy(update={"vision": scratch})})
    model, attention = build_model(config, vocab_size, device, definition)
    sys.stderr.write(f"{attention}\n")
    if mode:
        model.compile_encoders(mode)
    return TorchEngine(model, config, device), model.vision.patch_px, vocab_size


def build_step(config: Config, pairs: int, device: torch.device) -> Callable[[str], Losses]:
    """One optimiser step of a model of random weights by way; the ways share the model."""
    engine, patch_px, vocab_size = build_engine(config, device)
    batch = build_batch(config, pairs, patch_px, vocab_size).to(device)

    def take_step(way: str) -> Losses:
        loss = choose_loss(config, way)
        torch.manual_seed(0)
        with compiled_loss(way == "compiled"):
            losses, _ = backward_contrast(
                engine, batch, 1, lambda out, given: compute_losses(out, given, loss, 1 / 255)
            )
        engine.step(0.0)  # the weights stay, so that all ways see the same
        return losses

    return take_step


def choose_loss(config: Config, way: str) -> Any:
    """The run's objective with its correlation term computed in one of WAYS."""
    term = config.loss.correlation.model_copy(update={"method": WAYS[way]})
    term = term.model_copy(update={"weight": 0.0}) if way == "off" else term
    return config.loss.model_copy(update={"correlation": term})


_plain = correlation.patch_corr_loss
_compiled = torch.compile(_plain)


@contextmanager
def compiled_loss(wanted: bool) -> Iterator[None]:
    """Let torch.compile have the definition of the loss."""
    correlation.patch_corr_loss = _compiled if wanted else _plain
    try:
        yield
    finally:
        correlation.patch_corr_loss = _plain


def check_gate(take_step: Callable[[str], Losses]) -> list[str]:
    """A line for each way whose correlation loss is not that of the definition."""
    truth = take_step("eager").correlation.item()
    found = {way: take_step(way).correlation.item() for way in ("compiled", "fused")}
    return [
        f"{way}: correlation loss {value:.6f}, the definition's is {truth:.6f}"
        for way, value in found.items()
        if not abs(value - truth) <= TOLERANCE * abs(truth)
    ]


def measure_peak_mib(function: Callable[[], object], device: torch.device) -> float:
    """The most that a step allocates beyond what there was before, in MiB."""
    if device.type == "cpu":
        return measure_peak_bytes(function) / 2**20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Gate, JSON lines, table. Exit code 1 on a red gate, without any speed."""
    parser = argparse.ArgumentParser(prog="python -m place.training.benchmark_step", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the config")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    take_step = build_step(build_config(asked.config, asked.overrides), asked.batch, device)
    faults = check_gate(take_step)
    if faults:
        sys.stderr.write("benchmark_step: the losses differ, nothing was timed:\n" + "\n".join(faults) + "\n")
        return 1
    timer = Timer(
        asked.device, torch.empty(FLUSH_MIB << 20 if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    )
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(asked.repeats):
        for way, found in times.items():
            found.append(timer.measure(partial(take_step, way)))
    about, lines = (
        describe_run(asked.device),
        ["| correlation loss | step ms (p20 to p80) | peak MiB |", "| --- | ---: | ---: |"],
    )
    for way, found in times.items():
        row = quantiles(found) | {"peak_mib": measure_peak_mib(partial(take_step, way), device)}
        sys.stdout.write(json.dumps(about | {"batch": asked.batch, "way": way} | row) + "\n")
        lines.append(f"| {way} | {row['p50']:.1f} ({row['p20']:.1f} to {row['p80']:.1f}) | {row['peak_mib']:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
