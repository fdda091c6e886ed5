"""Whole training steps of PLACE beside open_clip's and beside a plain loop of MGCA's structure, in one run.

    python -m place.training.benchmark --batch 256 --output benchmark.jsonl

Instance alignment alone, at the same work: ViT-B/16 at 224 px, a text tower of 12 layers of 512, 77 tokens a report,
bf16 autocast, both eager and both compiled. The whole method: ViT-B/16 and BERT base, 160 tokens. Weights are random,
batches lie on the device: neither data nor the network is measured. First PLACE's instance loss must be open_clip's on
the same features, and compiled steps must give the losses of eager ones. Needs open_clip_torch (the extra `bench`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from place.batch import Batch, Losses, Outputs
from place.compat import patch_torchvision
from place.config import Config, check_config
from place.kernels.benchmark import describe_run
from place.losses.instance import instance_loss
from place.losses.objective import compute_losses
from place.training.benchmark_step import build_batch, build_engine
from place.training.footprint import find_report_encoder
from place.training.gradcache import backward_contrast
from place.training.peers import Step, build_mgca, build_open_clip

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""bf16 with fp32 sums, dense, SXM parts. Source: quoted (NVIDIA's data sheets)."""
REPORT_TOKENS = (23, 28, 31, 36, 40, 44, 51, 60, 76)
"""Deciles of the length of 980 reports of Open-i, findings and impression, in word pieces of their own vocabulary."""
TOLERANCE = 2e-2
"""Of losses of compiled and eager bf16 steps, relative."""
WAYS = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
"""Each way of taking a step, and its mode of torch.compile. The mode of CUDA graphs has none on a CPU."""
ROUNDS, STEPS = 5, 8
LOOPED = "MGCA's structure, eager"
"""Takes seconds a step: its word pieces are joined one by one."""


class Row(NamedTuple):
    """A contender: how its step is built, and whose rates it is compared with."""

    build: Callable[[], Step]
    peers: tuple[str, ...] = ()


def build_configs() -> dict[str, Config]:
    """`ita`: open_clip's ViT-B-16 in our terms; `full`: configs/pretrain_vitb16.yaml with one process's engine."""
    base: dict[str, Any] = {"engine": {"kind": "torch", "precision": "bf16"}, "cluster": {"launcher": "local"}}
    text = {"source": "scratch", "width": 512, "depth": 12, "num_heads": 8, "vocab_size": 49408, "dropout": 0.0}
    vision: dict[str, Any] = {"source": "scratch", "architecture": "vit_base_patch16_224"}
    off = {"pathology": {"weight": 0.0}, "correlation": {"weight": 0.0}}
    ita = {"data": {"image_size_px": 224, "max_tokens": 77}, "loss": off, **base}
    full = {"data": {"image_size_px": 224, "max_tokens": 160}, **base}
    return {
        "ita": check_config(ita | {"model": {"vision": vision, "text": text, "joint_width": 512}}),
        "full": check_config(full | {"model": {"vision": vision, "joint_width": 512}}),
    }


def build_place(config: Config, pairs: int, device: torch.device, mode: str | None, packed: bool) -> Step:
    """A step as the training loop takes it, with the plain torch engine."""
    engine, patch_px, vocab_size = build_engine(config, device, mode)
    length_B = draw_lengths(pairs, config.data.max_tokens) if packed else None
    batch = build_batch(config, pairs, patch_px, vocab_size, length_B).to(device)

    def objective(outputs: Outputs, given: Batch) -> Losses:
        return compute_losses(outputs, given, config.loss, 1 / 255)

    def take_step() -> Tensor:
        losses, _ = backward_contrast(engine, batch, 1, objective)
        engine.step(0.0)
        return losses.total.detach()

    return take_step


def draw_lengths(pairs: int, longest: int) -> Tensor:
    """Lengths of reports as they are, evenly through their deciles."""
    lengths = torch.tensor(REPORT_TOKENS).repeat(-(-pairs // len(REPORT_TOKENS)))[:pairs]
    return lengths.clamp(max=longest)


def list_rows(pairs: int, device: torch.device) -> dict[str, Row]:
    """The contenders by name, in the order in which they are shown."""
    configs = build_configs()
    ita, full = configs["ita"], configs["full"]
    place = partial(build_place, pairs=pairs, device=device)
    definition, _, _ = find_report_encoder(full)
    same = build_batch(ita, pairs, 16, ita.model.text.vocab_size).to(device)
    long = build_batch(full, pairs, 16, 28996).to(device)
    rows = {}
    for way, mode in WAYS.items():
        peer = f"open_clip, {way}"
        rows[peer] = Row(partial(build_open_clip, same, mode))
        rows[f"PLACE ITA, {way}"] = Row(partial(place, ita, mode=mode, packed=False), (peer,))
    # Not with CUDA graphs: each step has other lengths, and for each there would be a graph.
    lengths = Row(partial(place, ita, mode="default", packed=True), ("open_clip, compiled",))
    rows["PLACE ITA, compiled, real lengths"] = lengths
    rows[LOOPED] = Row(partial(build_mgca, long, definition, True))
    bare = "MGCA's structure without that loop, eager"
    rows[bare] = Row(partial(build_mgca, long, definition, False))
    for way, mode in WAYS.items():
        rows[f"PLACE, {way}"] = Row(partial(place, full, mode=mode, packed=False), (bare, LOOPED))
    rows["PLACE, compiled, real lengths"] = Row(partial(place, full, mode="default", packed=True), (bare, LOOPED))
    return rows


def check_gate(device: torch.device) -> list[str]:
    """Lines where our instance loss is not open_clip's on the same features."""
    from open_clip import ClipLoss

    rng = torch.Generator().manual_seed(0)
    image_BE, text_BE = (
        torch.nn.functional.normalize(torch.randn(64, 512, generator=rng), dim=-1).to(device) for _ in range(2)
    )
    scale, group_B = torch.tensor(100 / 7, device=device), torch.arange(64, device=device)
    ours, theirs = instance_loss(image_BE, text_BE, scale, group_B), ClipLoss()(image_BE, text_BE, scale)
    if abs(ours - theirs) <= 1e-5 * abs(theirs):
        return []
    return [f"instance loss {ours.item():.7f}, open_clip's is {theirs.item():.7f}"]


def prepare(name: str, row: Row, device: torch.device) -> dict[str, Any]:
    """Build a contender and warm it up; its loss, peak memory, host syncs of a step, seconds to it; or a reason."""
    gc.collect()
    before, began = read_memory(device), time.perf_counter()
    try:
        step = row.build()
        loss = step().item()
        for _ in range(0 if name == LOOPED else 3):
            step()
        syncs = count_syncs(step, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    except RuntimeError as error:
        torch.cuda.empty_cache()
        reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{error}".strip().splitlines()[0]
        return {"name": name, "failed": reason[:120]}
    return {
        "name": name,
        "step": step,
        "loss": loss,
        "peak_gib": peak / 2**30,
        "syncs": syncs,
        "start_s": time.perf_counter() - began,
    }


def read_memory(device: torch.device) -> int:
    """Bytes that tensors hold on the device."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def count_syncs(step: Step, device: torch.device) -> int | None:
    """How often the host waits for the device in a step, as torch knows; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{warning.filename}:{warning.lineno}" for warning in caught if "called a sync" in str(warning.message)]
    for place, times in Counter(places).most_common(3):
        sys.stderr.write(f"  waits for the device {times} times a step at {place}\n")
    return len(places)


def list_kernels(step: Step, device: torch.device) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of each kernel of a step, the longest first; none on a CPU."""
    if device.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [(event.key, event.count, event.self_device_time_total / 1e3) for event in seen.key_averages()]
    return sorted(kernels, key=lambda kernel: -kernel[2])


def count_flops(step: Step) -> int:
    """FLOPs of a step's products, forward and backward, run eagerly. Source: torch.utils.flop_counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def time_steps(step: Step, steps: int, device: torch.device) -> float:
    """Seconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def format_table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = ["step", "ms (least to most)", "of it kernels", "samples/s", "over its peers", "TFLOP", "MFU", "peak GiB"]
    titles += ["host syncs", "start s"]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for row in found:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} |" + " |" * (len(titles) - 2))
            continue
        ratio = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        tflop = f"{row['flops'] / 1e12:.1f}" if row["flops"] else ""
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        kernels = f"{row['kernels_ms']:.1f}" if row["kernels_ms"] else ""
        syncs = "" if row["syncs"] is None else row["syncs"]
        lines.append(
            f"| {row['name']} | {row['step_ms']:.1f} ({row['least_ms']:.1f} to {row['most_ms']:.1f}) | {kernels} "
            f"| {row['samples_per_s']:.0f} | {ratio} | {tflop} | {mfu} | {row['peak_gib']:.1f} | {syncs} "
            f"| {row['start_s']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Gate, JSON lines, table. Exit code 1 on a red gate, without any speed, and where a row failed."""
    parser = argparse.ArgumentParser(prog="python -m place.training.benchmark", description=__doc__)
    parser.add_argument("--batch", type=int, default=256, help="pairs a step")
    parser.add_argument("--only", action="append", help="rows whose name begins so; repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kernels", type=int, default=0, help="also show so many of the longest kernels of each row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON lines here")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    patch_torchvision()
    if faults := check_gate(device):
        sys.stderr.write("benchmark: nothing was timed:\n" + "\n".join(faults) + "\n")
        return 1
    rows = list_rows(asked.batch, device)
    rows = {name: row for name, row in rows.items() if not asked.only or name.startswith(tuple(asked.only))}
    found = {}
    for name, row in rows.items():
        found[name] = prepare(name, row, device)
        sys.stderr.write(f"{name}: {found[name].get('failed') or format(found[name]['start_s'], '.1f') + ' s'}\n")
    alive = {name: row for name, row in found.items() if "failed" not in row}
    if faults := compare_losses(alive):
        sys.stderr.write("benchmark: compiled and eager steps differ, nothing was timed:\n" + "\n".join(faults) + "\n")
        return 1
    flops = {name: count_flops(row["step"]) for name, row in alive.items() if name != LOOPED}
    for name, seen in alive.items():
        kernels = list_kernels(seen["step"], device) if name != LOOPED else []
        seen["kernels_ms"] = sum(time_ms for *_, time_ms in kernels)
        shown = [f"  {time_ms:8.3f} ms {calls:5d} x {key[:120]}" for key, calls, time_ms in kernels[: asked.kernels]]
        sys.stderr.write("".join(f"{line}\n" for line in [f"kernels of {name}", *shown] if shown))
    about = describe_run(device.type) | {"batch": asked.batch}
    steps = {name: row.pop("step") for name, row in alive.items()}
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(asked.rounds):
        for name, step in steps.items():
            times[name].append(time_steps(step, 1 if name == LOOPED else STEPS, device))
        summarise(rows, alive, times, flops, about)
        if asked.output:  # after every round, so that a run that is cut off has shown something
            asked.output.write_text("".join(json.dumps(about | row) + "\n" for row in found.values()))
    sys.stdout.write(format_table(list(found.values())) + "\n")
    return 0 if len(alive) == len(found) else 1


def summarise(
    rows: dict[str, Row],
    alive: dict[str, dict[str, Any]],
    times: dict[str, list[float]],
    flops: dict[str, int],
    about: dict[str, Any],
) -> None:
    """Put times, rates, MFU and the ratio to the peer into the rows."""
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in about["device"]), None)
    for name, row in alive.items():
        step_s = statistics.median(times[name])
        known = flops.get(name)
        row |= {
            "step_ms": 1e3 * step_s,
            "least_ms": 1e3 * min(times[name]),
            "most_ms": 1e3 * max(times[name]),
            "samples_per_s": about["batch"] / step_s,
            "flops": known,
            "mfu": known / step_s / peak / 1e12 if known and peak else None,
        }
    for name, row in alive.items():
        peers = [alive[peer] for peer in rows[name].peers if peer in alive]
        row["ratios"] = [row["samples_per_s"] / peer["samples_per_s"] for peer in peers]


def compare_losses(alive: dict[str, dict[str, Any]]) -> list[str]:
    """Lines where a compiled step began with another loss than the eager one of the same model."""
    faults = []
    for model, way in itertools.product(("PLACE ITA", "PLACE"), WAYS):
        eager, other = alive.get(f"{model}, eager"), alive.get(f"{model}, {way}")
        if eager and other and not abs(other["loss"] - eager["loss"]) <= TOLERANCE * abs(eager["loss"]):
            faults.append(f"{model}, {way}: loss {other['loss']:.5f}, eager {eager['loss']:.5f}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
