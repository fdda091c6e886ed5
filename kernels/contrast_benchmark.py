"""Memory and time of the contrastive loss, in one piece against tiles: `python -m place.kernels.contrast_benchmark`.

Each case runs in a process of its own on the CPU, forward and backward, both directions, one rank's rows against the
columns of all. Memory is the peak of the process less what it held with the features alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch
from place.kernels.contrast import Pairs, contrast

from place.compat import read_peak_mib

# A global batch in one process, and the share of one of 16 or 32 ranks.
ROWS_AND_COLUMNS = [
    (1024, 1024),
    (2048, 2048),
    (4096, 4096),
    (8192, 8192),
    (1024, 16384),
    (1024, 32768),
    (16384, 16384),
    (32768, 32768),
]
PLAIN_UP_TO_PAIRS = 1 << 28  # more would take over 9 GiB


def run_case(rows: int, columns: int, width: int, method: str, repeats: int) -> tuple[float, float]:
    """Peak memory in MiB over the features, and the median time in seconds, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, rows, columns, width, method, repeats))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return float("nan"), float("nan")  # the process ran out of memory
    finally:
        process.join()


def _measure(pipe: Connection, rows: int, columns: int, width: int, method: str, repeats: int) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.nn.functional.normalize(torch.randn(size, width, generator=generator)).requires_grad_()
        for size in (rows, columns, rows, columns)
    ]
    keys = torch.randint(0, columns // 2, (columns,), generator=generator)
    pairs = Pairs(torch.arange(rows), keys[:rows], keys, equal_is_positive=True)
    scale = torch.tensor(14.0, requires_grad=True)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()  # what the first product allocates for good
    before = read_peak_mib()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        forth = contrast(features[0], features[1], scale, pairs, method)
        back = contrast(features[2], features[3], scale, pairs, method)
        (forth.mean() + back.mean()).backward()
        times.append(time.perf_counter() - start)
    pipe.send((read_peak_mib() - before, statistics.median(times)))


def main() -> None:
    """Print a table of all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512, help="width E of the features")
    parser.add_argument("--repeats", type=int, default=3, help="runs behind a median time")
    parser.add_argument("--only-tiled", action="store_true", help="leave out the plain way, which needs the memory")
    parser.add_argument("--rows", type=int, help="one case of so many rows, with --columns")
    parser.add_argument("--columns", type=int, help="columns of that case")
    arguments = parser.parse_args()
    cases = [(arguments.rows, arguments.columns)] if arguments.rows else ROWS_AND_COLUMNS
    print(f"torch {torch.__version__}, CPU, one thread, fp32, E = {arguments.width}, several positives")
    print("| rows x columns | plain MiB | tiled MiB | ratio | plain s | tiled s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for rows, columns in cases:
        plain = float("nan"), float("nan")
        if rows * columns <= PLAIN_UP_TO_PAIRS and not arguments.only_tiled:
            plain = run_case(rows, columns, arguments.width, "plain", arguments.repeats)
        tiled = run_case(rows, columns, arguments.width, "tiled", arguments.repeats)
        print(
            f"| {rows} x {columns} | {plain[0]:.0f} | {tiled[0]:.0f} | {plain[0] / tiled[0]:.1f} "
            f"| {plain[1]:.2f} | {tiled[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
