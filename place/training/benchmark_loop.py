"""What a step costs beside model, loss and optimiser, how long a run takes to its first step, and what its log costs.

    python -m place.training.benchmark_loop --config configs/demo.yaml --folder DIR data.path=datasets/demo

For each launcher a `place pretrain` of its own in DIR, logged at every step, tells when the first step is done. One
more, with one loader worker and the config's log, tells what of a step is not forward, loss, backward, communication or
optimiser: waiting for a batch, moving it, metrics, checks, the record of samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from place.runlog import RunLog, read_jsonl

OWN = ("wait", "copy", "other")
STEP_MS = 100.0
"""A step of which the loop may take 3 %, a line of metrics 0.1 %."""
LINES, SAMPLES = 2000, 1024


def run_place(config: Path, run_dir: Path, overrides: list[str]) -> float:
    """Run it to the end; seconds from the command to the first line of metrics.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    asked = [f"run.dir={run_dir}", *overrides]
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "place", "pretrain", "--config", str(config), *asked],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return next(read_jsonl(run_dir / "metrics.jsonl"))["time"] - began


def measure_loop(run_dir: Path) -> list[float]:
    """Milliseconds a step of the loop's own, in each line of metrics but the first, whose steps wait for workers."""
    records = [record for record in read_jsonl(run_dir / "metrics.jsonl") if "phase_s" in record]
    return [1e3 * sum(record["phase_s"].get(name, 0.0) for name in OWN) for record in records[1:]]


def measure_log(folder: Path, record: dict[str, float]) -> tuple[float, float]:
    """Milliseconds that a line of metrics takes, and one of 1,024 samples, written to this folder."""
    log = RunLog(folder, 0)
    ids = list(range(10**9, 10**9 + SAMPLES))
    began = time.perf_counter()
    for step in range(LINES):
        log.write_metrics(step, record)
    between = time.perf_counter()
    for step in range(LINES):
        log.write_samples(step, 0, ids)
    ended = time.perf_counter()
    log.close()
    return 1e3 * (between - began) / LINES, 1e3 * (ended - between) / LINES


def main(arguments: list[str] | None = None) -> int:
    """A line a figure; all as JSON in DIR/loop.json."""
    parser = argparse.ArgumentParser(prog="python -m place.training.benchmark_loop", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="runs are written below it; must not be there yet")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the config")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True)
    local = [*asked.overrides, "cluster.launcher=local"]
    starts = {"local": local, "ray, 2 workers": [*asked.overrides, "cluster.launcher=ray", "cluster.num_workers=2"]}
    found: dict[str, Any] = {}
    for name, overrides in starts.items():
        few = [*overrides, "run.log_every_steps=1", "train.max_steps=2"]
        found[f"{name}: first step, s"] = first_s = run_place(asked.config, asked.folder / name.split(",")[0], few)
        sys.stdout.write(f"{name}: first step after {first_s:.1f} s\n")
    run_place(asked.config, asked.folder / "loop", [*local, "run.time_phases=true", "data.num_workers=1"])
    own = measure_loop(asked.folder / "loop")
    found["loop, ms"] = loop_ms = statistics.median(own)
    sys.stdout.write(f"loop: {loop_ms:.2f} ms a step (median of {len(own)} lines), {loop_ms / STEP_MS:.2%} of 100 ms\n")
    record = max(read_jsonl(asked.folder / "loop" / "metrics.jsonl"), key=len)
    line_ms, samples_ms = measure_log(asked.folder, record)
    sys.stdout.write(f"metrics.jsonl: {line_ms:.3f} ms a line, {line_ms / STEP_MS:.3%} of 100 ms\n")
    sys.stdout.write(f"samples.jsonl: {samples_ms:.3f} ms a line of {SAMPLES:,} pairs\n")
    found |= {"metrics.jsonl, ms": line_ms, "samples.jsonl, ms": samples_ms}
    (asked.folder / "loop.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
