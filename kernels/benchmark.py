"""Speed, memory and error of the patch-correlation loss beside plain torch. A red gate prints no speed.

python -m place.kernels.benchmark                          # all shapes on the GPU, Markdown at the end
python -m place.kernels.benchmark --shape 8,196,128,256 --repeats 5     # also runs on a CPU

Features are bf16. Targets are bf16, as in training, and fp32, which takes other tiles and never the panel.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from place.kernels.contenders import Contender, build_contenders, run_eager
from place.kernels.patch_correlation.autograd import has_triton, patch_corr, patch_corr_gradient
from place.kernels.patch_correlation.reference import Options
from place.kernels.roofline import compute_bound_us, find_device
from place.kernels.testing import (
    SHAPES,
    Case,
    Inputs,
    Result,
    build_inputs,
    compute_plain,
    compute_truth,
    measure_error,
    measure_peak_bytes,
)
from torch import Tensor

Shape = tuple[int, int, int, int]
FLUSHES = 40
"""Of 256 MiB, before each call that is timed: 3 ms of an H200."""
PASSES = ("forward", "backward", "both")
TARGETS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TRUTH_IMAGES = 2
"""Images on which errors are measured: float64 of more would not fit beside the largest shape."""
GATE_CASES = [
    Case(patches, dtype=dtype, target_dtype=target, focus=focus, options=options, target_width=33, noise=noise)
    for patches in (1, 37, 196, 300)
    for dtype, target in (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
    )
    for focus, options, noise in (
        (False, Options(), None),
        (True, Options(False, "smooth_l1", 0.5), None),
        (False, Options(), 0.1),
    )
]


def check_gate(device: str) -> list[str]:
    """What is wrong with the kernels on a device: errors against float64, and 20 reruns that must be bit-equal."""
    faults = []
    for case in GATE_CASES:
        inputs = build_inputs(case, device)
        truth, plain = compute_truth(inputs, case.options), compute_plain(inputs, case.options)
        for implementation in list_implementations(device, case.options):
            result = run_operator(inputs, case.options, implementation)
            allowed = (
                [1e-5] * 2 if case.dtype == torch.float32 else [max(2 * e, 1e-5) for e in find_errors(plain, truth)]
            )
            errors = find_errors(result, truth)
            if any(not error <= limit for error, limit in zip(errors, allowed)):
                faults.append(f"{implementation} {case}: errors {errors}, allowed {allowed}")
            if not torch.equal(result.pairs_B, truth.pairs_B):
                faults.append(
                    f"{implementation} {case}: {result.pairs_B.tolist()} pairs, {truth.pairs_B.tolist()} right"
                )
            faults += [] if is_repeatable(inputs, case.options, implementation, result) else [f"{case}: not repeatable"]
    return faults


def list_implementations(device: str, options: Options) -> list[str]:
    """What can run on a device."""
    tiled = "triton" if device == "cuda" and has_triton() else "chunked"
    return [tiled, "gram"] if options.loss == "mse" else [tiled]


def run_operator(inputs: Inputs, options: Options, implementation: str) -> Result:
    """Totals, pairs and the gradient to x by one implementation."""
    total_B, pairs_B = patch_corr(*inputs[:4], *options, implementation)
    to_x = patch_corr_gradient(inputs.weight_B, *inputs[:4], *options, implementation)
    return Result(total_B, pairs_B, to_x, None)


def find_errors(result: Result, truth: Result) -> list[float]:
    """Relative errors of totals and of the gradient to x."""
    return [measure_error(result.total_B, truth.total_B), measure_error(result.to_x, truth.to_x)]


def is_repeatable(inputs: Inputs, options: Options, implementation: str, first: Result, times: int = 20) -> bool:
    """Whether reruns give the same bits."""
    again = (run_operator(inputs, options, implementation) for _ in range(times))
    return all(torch.equal(a.total_B, first.total_B) and torch.equal(a.to_x, first.to_x) for a in again)


class Timer(NamedTuple):
    """Measures one call in milliseconds; on a GPU with its L2 cache flushed before.

    Flushed so often that the host has started the call's kernels before the GPU gets to them, as in a training step:
    else the time of a small shape is that of the host.
    """

    device: str
    flush: Tensor

    def measure(self, function: Any) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self.flush.zero_()
        start_event.record()
        function()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event)


def build_shape(shape: Shape, device: str, target: str = "bf16") -> tuple[Tensor, Tensor]:
    """bf16 features, and targets of a key of `TARGETS`, whose correlations are alike, as in training."""
    batch, patches, width, target_width = shape
    rng = torch.Generator(device).manual_seed(0)
    shared = torch.randn(batch, patches, 16, generator=rng, device=device)
    sides = []
    for columns in (width, target_width):
        mix = torch.randn(16, columns, generator=rng, device=device)
        noise = torch.randn(batch, patches, columns, generator=rng, device=device)
        sides.append(shared @ mix + noise)
    return sides[0].bfloat16(), sides[1].to(TARGETS[target])


def measure_shape(
    shape: Shape, target: str, contenders: dict[str, Contender], device: str, repeats: int
) -> list[dict[str, Any]]:
    """A row for each contender that runs at this shape, interleaved so that drift meets all alike."""
    x_BND, y_BNT = build_shape(shape, device, target)
    x_BND.requires_grad_()
    timer = Timer(device, torch.empty(64 << 20 if device == "cuda" else 1, dtype=torch.int32, device=device))
    rows, alive = {}, {}
    for name, contender in contenders.items():
        try:
            rows[name] = {"contender": name, **measure_errors(contender, x_BND, y_BNT)}
            rows[name]["peak_mib"] = measure_peak_mib(contender, x_BND, y_BNT, device)
            alive[name] = contender
        except torch.OutOfMemoryError:
            rows[name] = {"contender": name, "failed": "out of memory"}
        gc.collect()
    samples: dict[str, dict[str, list[float]]] = {name: {key: [] for key in PASSES} for name in alive}
    for repeat in range(repeats + 3):
        for name, contender in alive.items():
            for key, value in measure_passes(contender, x_BND, y_BNT, timer).items():
                if repeat >= 3:
                    samples[name][key].append(value)
    for name, passes in samples.items():
        rows[name] |= {key: quantiles(values) for key, values in passes.items()}
    return [{"shape": shape, "target": target, **row} for row in rows.values()]


def measure_passes(contender: Contender, x_BND: Tensor, y_BNT: Tensor, timer: Timer) -> dict[str, float]:
    """Milliseconds forward, backward and both."""
    x_BND.grad = None
    kept: list[Tensor] = []
    forward = timer.measure(lambda: kept.append(contender(x_BND, y_BNT)))
    backward = timer.measure(kept[0].backward)
    kept.clear()
    x_BND.grad = None
    return dict(zip(PASSES, (forward, backward, timer.measure(lambda: contender(x_BND, y_BNT).backward()))))


def measure_errors(contender: Contender, x_BND: Tensor, y_BNT: Tensor) -> dict[str, float]:
    """Relative errors of loss and gradient against float64, on the first images."""
    results = []
    for run, dtypes in ((run_eager, [torch.float64] * 2), (contender, [x_BND.dtype, y_BNT.dtype])):
        x, y = (side[:TRUTH_IMAGES].detach().to(dtype) for side, dtype in zip((x_BND, y_BNT), dtypes))
        loss = run(x.requires_grad_(), y)
        loss.backward()
        results.append((loss.detach(), x.grad))
    (true_loss, true_gradient), (loss, gradient) = results
    assert gradient is not None
    assert true_gradient is not None
    # A mean over pairs has small gradients: they are compared with their own size only.
    errors = measure_error(loss, true_loss, 0.0), measure_error(gradient, true_gradient, 0.0)
    return dict(zip(("loss_error", "gradient_error"), errors))


def measure_peak_mib(contender: Contender, x_BND: Tensor, y_BNT: Tensor, device: str) -> float:
    """Peak memory of a step over what was there, the gradient included."""
    contender(x_BND, y_BNT).backward()
    x_BND.grad = None
    if device == "cpu":
        return measure_peak_bytes(lambda: contender(x_BND, y_BNT).backward()) / 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender(x_BND, y_BNT).backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    points = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return dict(zip(("p20", "p50", "p80"), points))


def describe_run(device: str) -> dict[str, str]:
    """What a result must name to be believed."""
    import triton

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return {"device": name, "commit": commit.stdout.strip() or "unknown", **versions}


def format_table(rows: list[dict[str, Any]], device_name: str) -> str:
    """Markdown: a line a contender, with the bound of the roofline for the whole step where the device is known."""
    device = find_device(device_name)
    lines = [
        "| B, N, D, Dt | contender | target | forward ms | backward ms | both ms (p20 to p80) | roofline ms | peak MiB "
        "| loss error | gradient error |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        start = f"| {', '.join(map(str, row['shape']))} | {row['contender']} | {row['target']} |"
        if "failed" in row:
            lines.append(f"{start} {row['failed']} | | | | | | |")
            continue
        target_bytes = TARGETS[row["target"]].itemsize
        bound = f"{sum(compute_bound_us(row['shape'], device, target_bytes)) / 1e3:.3f}" if device else ""
        both = row["both"]
        lines.append(
            f"{start} {row['forward']['p50']:.3f} | {row['backward']['p50']:.3f} | {both['p50']:.3f} "
            f"({both['p20']:.3f} to {both['p80']:.3f}) | {bound} | {row['peak_mib']:.0f} | {row['loss_error']:.1e} | "
            f"{row['gradient_error']:.1e} |"
        )
    return "\n".join(lines)


def parse_shape(text: str) -> Shape:
    """`B,N,D,Dt`."""
    batch, patches, width, target_width = map(int, text.split(","))
    return batch, patches, width, target_width


def main(arguments: list[str] | None = None) -> int:
    """Gate, then measurements as JSON lines, then the table. Exit code 1 on a red gate, without any speed."""
    parser = argparse.ArgumentParser(prog="python -m place.kernels.benchmark", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", help="B,N,D,Dt; repeatable; default: the five")
    parser.add_argument("--target", choices=TARGETS, action="append", help="of y; repeatable; default: both")
    parser.add_argument("--contender", action="append", help="by name; repeatable; default: all")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON lines here")
    asked = parser.parse_args(arguments)
    faults = check_gate(asked.device)
    if faults:
        sys.stderr.write("benchmark: the kernels are wrong, nothing was timed:\n" + "\n".join(faults) + "\n")
        return 1
    about = describe_run(asked.device)
    contenders = build_contenders(asked.device)
    contenders = {name: run for name, run in contenders.items() if not asked.contender or name in asked.contender}
    rows: list[dict[str, Any]] = []
    for shape, target in itertools.product(asked.shape or SHAPES, asked.target or TARGETS):
        torch.compiler.reset()
        for row in measure_shape(shape, target, contenders, asked.device, asked.repeats):
            rows.append(row)
            line = json.dumps(about | row)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            if asked.output:
                with asked.output.open("a") as file:
                    file.write(line + "\n")
    sys.stdout.write(format_table(rows, about["device"]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
