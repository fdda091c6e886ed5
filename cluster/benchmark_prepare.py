"""`place prepare` with 1 and 2 Ray workers: same bytes, speed-up, memory of a worker, and a SIGKILL in the middle.

python -m place.cluster.benchmark_prepare --count 20000 --repeats 3 --folder /tmp/scaling      # ends with 1 on a fault

Ray's start and the workers' imports are left out of the times. All bytes of a data set are compared but the time in its
card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from place.cluster.prepare import map_over_ray, start_ray

from place.compat import read_peak_mib
from place.config import PrepareConfig
from place.data.prepare import run_prepare
from place.data.task import PARTS, PartResult, Task

WORKERS = (1, 2)
MAX_WORKER_MIB, MIN_SPEED_UP = 1024, 1.6


def hash_set(folder: Path) -> str:
    """One hash over the names and bytes of all files, without the time in the cards."""
    created = json.loads((folder / "card.json").read_text())["created"].encode()
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(data.replace(created, b"") if path.name.startswith("card.") else data)
    return digest.hexdigest()


class PeakMap:
    """`map_over_ray` that also keeps the largest memory of a worker, in MiB. Final."""

    def __init__(self) -> None:
        self.peak_mib = 0.0

    def __call__(
        self, function: Callable[[Task], PartResult], tasks: Iterable[Task], num_workers: int
    ) -> Iterator[PartResult]:
        for result, peak_mib in map_over_ray(_measured, ((function, task) for task in tasks), num_workers):
            self.peak_mib = max(self.peak_mib, peak_mib)
            yield result


def _measured(job: tuple[Callable[[Task], PartResult], Task]) -> tuple[PartResult, float]:
    function, task = job
    result = function(task)
    return result, read_peak_mib()


def configure(arguments: argparse.Namespace, name: str, num_workers: int, **changes: Any) -> PrepareConfig:
    """Phantom DICOM studies into a folder of that name."""
    settings = {
        "source": "phantom",
        "phantom_format": "dicom",
        "count": arguments.count,
        "size_px": arguments.size_px,
        "output": str(arguments.folder / name),
        "num_workers": num_workers,
        "rows_per_task": max(8, min(512, arguments.count // 32)),
    }
    return PrepareConfig(**{**settings, **changes})


def measure_scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of both in turns, the hash of each data set, and the largest memory of a worker. Source: ours."""
    import ray

    spread = PeakMap()
    start_ray(None, max(WORKERS))
    warm = configure(arguments, "warm", max(WORKERS), count=64, rows_per_task=8)
    run_prepare(warm, spread)
    seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    hashes = set()
    for repeat in range(arguments.repeats):
        for workers in WORKERS:
            config = configure(arguments, f"{workers}-{repeat}", workers)
            began = time.perf_counter()
            run_prepare(config, spread)
            seconds[workers].append(time.perf_counter() - began)
            hashes.add(hash_set(Path(config.output)))
            print(f"{workers} workers: {seconds[workers][-1]:.1f} s", flush=True)
            shutil.rmtree(config.output)
    ray.shutdown()
    return {"seconds": seconds, "hashes": sorted(hashes), "peak_mib": spread.peak_mib}


def run_killed(arguments: argparse.Namespace) -> str:
    """The hash of a data set whose first run got SIGKILL when half of its parts were finished. Source: ours."""
    config = configure(arguments, "killed", max(WORKERS))
    names = ("source", "phantom_format", "count", "size_px", "rows_per_task", "num_workers", "output")
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    command = [sys.executable, "-m", "place", "prepare", *options]
    half = -(-config.count // config.rows_per_task) // 2
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list((Path(config.output) / PARTS).glob("0*.json"))) < half:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = hash_set(Path(config.output))
    shutil.rmtree(config.output)
    return found


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description="place prepare with 1 and 2 Ray workers.")
    parser.add_argument("--count", type=int, default=20_000, help="phantom DICOM studies")
    parser.add_argument("--size-px", type=int, default=256, help="side of the images")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for the data sets, removed at the end")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        killed = run_killed(arguments)
        found = measure_scaling(arguments)
    finally:
        shutil.rmtree(arguments.folder)
    one, two = (statistics.median(found["seconds"][workers]) for workers in WORKERS)
    speed_up = one / two
    same = len({*found["hashes"], killed}) == 1
    print(
        f"{arguments.count} phantom DICOM studies of {arguments.size_px} px on {os.cpu_count()} cores, median of each"
    )
    print(
        f"1 worker {one:.1f} s ({arguments.count / one:.1f} studies/s), 2 workers {two:.1f} s, speed-up {speed_up:.2f}"
    )
    print(f"largest memory of a worker {found['peak_mib']:.0f} MiB")
    print(f"bytes of all runs, the killed and continued one included: {'equal' if same else 'DIFFERENT'}")
    return 0 if same and speed_up >= MIN_SPEED_UP and found["peak_mib"] < MAX_WORKER_MIB else 1


if __name__ == "__main__":
    raise SystemExit(main())
