"""Time and number of operations of the batched assignment: `python -m place.kernels.assignment.benchmark`.

First each method has to reach scipy's cost; then times on this machine, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from place.kernels.assignment import assign
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountedOperations(TorchDispatchMode):
    """Counts what torch dispatches, at most one launch each; the one launch of `triton` comes on top."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def read_cost(cost_BSK: Tensor, column_BS: Tensor) -> Tensor:
    """Total cost of each pairing, in fp64."""
    taken_BS = cost_BSK.double().gather(2, column_BS.clamp(min=0)[..., None])[..., 0]
    return (taken_BS * (column_BS >= 0)).sum(1)


def measure(cost_BSK: Tensor, mask_BS: Tensor, method: str, repeats: int) -> tuple[list[float], int]:
    """p20, p50 and p80 in milliseconds, and the operations of one call."""
    with CountedOperations() as counted:
        assign(cost_BSK, mask_BS, method)
    times = []
    for _ in range(repeats):
        _wait(cost_BSK)
        start = time.perf_counter()
        assign(cost_BSK, mask_BS, method)
        _wait(cost_BSK)
        times.append(1e3 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=10)
    return [cuts[1], cuts[4], cuts[7]], counted.count


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def main() -> None:
    """Check, then print a row a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256, help="studies B")
    parser.add_argument("--sentences", type=int, default=16, help="rows S")
    parser.add_argument("--queries", type=int, default=16, help="columns K")
    parser.add_argument("--repeats", type=int, default=20, help="runs behind the quantiles")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(arguments.batch, arguments.sentences, arguments.queries, generator=generator)
    mask = torch.rand(cost.shape[:2], generator=generator) < 0.7
    best = read_cost(cost, assign(cost, mask, "scipy"))
    cost, mask = cost.to(device), mask.to(device)
    methods = {"cpu": ["scipy", "torch"], "cuda": ["torch", "triton"]}[device.type]
    for method in methods:
        torch.testing.assert_close(read_cost(cost, assign(cost, mask, method)).cpu(), best, rtol=0, atol=1e-9)
    print(f"torch {torch.__version__}, {name}, (B,S,K) = {tuple(cost.shape)}, every method at the least cost")
    print("| method | operations | p20 ms | p50 ms | p80 ms |\n| --- | ---: | ---: | ---: | ---: |")
    for method in methods:
        times, count = measure(cost, mask, method, arguments.repeats)
        print(f"| {method} | {count} | " + " | ".join(f"{value:.2f}" for value in times) + " |", flush=True)


if __name__ == "__main__":
    main()
