"""How fast samples come, against what users would do instead: `python -m place.data.benchmark`.

One process decodes, augments and tokenises, so that rates are per core: samples over the processor time of that
process. Cold: pages of the stored files are dropped first (and the cache of unpacked shards is empty). Every rival has
the JPEG bytes of the shards, the same reports, tokenizer and collation; torchvision's transforms have the same ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from place.batch import Batch
from place.config import AugmentConfig, DataConfig, PrepareConfig, RunError
from place.data import rivals
from place.data.loader import Collate, PairLoader
from place.data.mixture import read_intensity
from place.data.prepare import run_prepare
from place.data.prepared import read_card, read_samples
from place.data.streaming import select_sentences
from place.data.tokens import ReportTokenizer, train_tokenizer
from place.data.transforms import eval_transform, read_image

NUM_PATCHES, WARM_STEPS, WAIT_STEPS, SLEEP_S = 196, 4, 100, 0.1
Read = Callable[[bool, float], Iterator[Batch]]
"""Takes whether caches are cold and the share of the epoch to skip; yields batches."""


class Way(NamedTuple):
    """One way to feed a model: how it reads, and the files it reads."""

    read: Read
    files: list[Path]


class Bench(NamedTuple):
    """What all ways share."""

    data: DataConfig
    rows: list[rivals.Row]
    tokenizer: ReportTokenizer
    batch: int
    folder: Path


def build_ways(bench: Bench) -> dict[str, Way]:
    """Write the rivals' files and build all ways. Source: ours."""
    data, rows, tokenizer, folder = bench.data, bench.rows, bench.tokenizer, bench.folder
    mean, std = read_intensity(data)
    by_torchvision, by_place = rivals.build_torchvision(data, mean, std), rivals.build_own(data, mean, std)
    for kind in ("jpg", "png"):
        rivals.write_files(folder / kind, rows, kind)
    rivals.write_tars(folder / "tar", rows)
    rivals.write_hdf(folder / "pixels.h5", rows, min(min(read_image(row.image).shape) for row in rows))
    sets: dict[str, tuple[Any, Path]] = {
        "JPEG files, PIL + torchvision": (
            rivals.FilePairs(folder / "jpg", rows, "jpg", tokenizer, by_torchvision), folder / "jpg",
        ),
        "PNG files, PIL + torchvision": (
            rivals.FilePairs(folder / "png", rows, "png", tokenizer, by_torchvision), folder / "png",
        ),
        "WebDataset, PIL + torchvision": (
            rivals.TarPairs(folder / "tar", tokenizer, by_torchvision, decode=True), folder / "tar",
        ),
        "WebDataset, transforms of PLACE": (
            rivals.TarPairs(folder / "tar", tokenizer, by_place, decode=False), folder / "tar",
        ),
        "HDF5 of pixels, torchvision": (
            rivals.HdfPairs(folder / "pixels.h5", tokenizer, by_torchvision), folder / "pixels.h5",
        ),
    }  # fmt: skip
    shards = Path(data.path) / data.train_split
    ways = {"PLACE": Way(_read_place(bench), rivals.list_files([shards]))}
    return ways | {
        name: Way(_read_rival(bench, made), rivals.list_files([path])) for name, (made, path) in sets.items()
    }


def _read_place(bench: Bench) -> Read:
    loaders: list[PairLoader] = []
    epochs = iter(range(1 << 30))

    def read(cold: bool, skip: float) -> Iterator[Batch]:
        if cold or not loaders:
            loaders[:] = [build_loader(bench, Path(tempfile.mkdtemp(dir=bench.folder)))]
        steps = len(bench.rows) // bench.batch
        return loaders[0].read_epoch(next(epochs), int(steps * skip), steps, 1)

    return read


def build_loader(bench: Bench, cache: Path) -> PairLoader:
    """The loader of a training run."""
    data, tokenizer = bench.data, bench.tokenizer
    return PairLoader(
        data, data.train_split, tokenizer, seed=0, local_batch=bench.batch, num_patches=NUM_PATCHES, train=True,
        cache=cache,
    )  # fmt: skip


def _read_rival(bench: Bench, made: Any) -> Read:
    collate = Collate(bench.tokenizer, NUM_PATCHES)

    def read(_: bool, skip: float) -> Iterator[Batch]:
        skipped = int(len(bench.rows) // bench.batch * skip)
        if isinstance(made, rivals.TarPairs):  # it cannot begin elsewhere: what was trained is read again
            whole = DataLoader(made, batch_size=bench.batch, collate_fn=collate, drop_last=True)
            return islice(whole, skipped, None)
        batches = list(BatchSampler(RandomSampler(made), bench.batch, drop_last=True))[skipped:]
        return iter(DataLoader(made, batch_sampler=batches, collate_fn=collate))

    return read


def check_ways(bench: Bench, ways: dict[str, Way]) -> None:
    """Every way gives every sample of whole batches once, and without augmentation the image that PLACE shows.

    Raises:
        RunError: one does not; no speed is worth a figure then.
    """
    mean, std = read_intensity(bench.data)
    size = bench.data.image_size_px
    shown = {row.sample_id: eval_transform(read_image(row.image), size, mean, std) for row in bench.rows}
    for name, way in ways.items():
        seen: set[int] = set()
        worst = 0.0
        for batch in way.read(True, 0.0):
            for number, image_CYX in zip(batch.sample_id_B.tolist(), batch.image_BCYX):
                worst = max(worst, float((image_CYX - shown[number]).abs().mean()) * std * 255)
                seen.add(number)
        if len(seen) != len(bench.rows) // bench.batch * bench.batch or worst > 4:
            raise RunError(
                f"{name}: {len(seen)} of {len(shown)} samples, up to {worst:.1f} grey levels off; no figures"
            )


def time_epoch(way: Way, cold: bool) -> tuple[float, float]:
    """Samples a second of processor time, and of wall time."""
    if cold:
        drop_pages(way.files)
    cpu, wall = time.process_time(), time.perf_counter()
    samples = sum(len(batch.sample_id_B) for batch in way.read(cold, 0.0))
    return samples / (time.process_time() - cpu), samples / (time.perf_counter() - wall)


def time_resume(way: Way) -> float:
    """Seconds from a cold start to the first batch behind the middle of an epoch."""
    drop_pages(way.files)
    began = time.perf_counter()
    next(iter(way.read(True, 0.5)))
    return time.perf_counter() - began


def drop_pages(files: list[Path]) -> None:
    """Ask the system to forget what it holds of these files in memory."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_wait(bench: Bench, num_workers: int) -> float:
    """Share of the time that steps of 100 ms wait for their batches of 64, epoch starts but the first included."""
    bench = bench._replace(data=bench.data.model_copy(update={"num_workers": num_workers}), batch=64)
    loader = build_loader(bench, Path(tempfile.mkdtemp(dir=bench.folder)))
    waits: list[float] = []
    batches = loader.read_steps(0, WARM_STEPS + WAIT_STEPS, len(bench.rows) // bench.batch, 1)
    asked = time.perf_counter()
    for _batch in batches:  # held for a step, as training does
        waits.append(time.perf_counter() - asked)
        time.sleep(SLEEP_S)
        asked = time.perf_counter()
    waited = sum(waits[WARM_STEPS:])
    return waited / (waited + SLEEP_S * WAIT_STEPS)


def measure(bench: Bench, rounds: int, num_workers: int) -> dict[str, Any]:
    """All figures, ways interleaved in each round, medians over rounds. Source: ours."""
    plain = bench._replace(
        data=bench.data.model_copy(update={"augment": AugmentConfig(crop_scale_min=1, rotation_deg=0, intensity=0)}),
        folder=bench.folder / "check",
    )
    plain.folder.mkdir()
    check_ways(plain, build_ways(plain))
    shutil.rmtree(plain.folder)
    ways = build_ways(bench)
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found = rates[name]
            for state, cold in (("cold", True), ("warm", False)):
                core, wall = time_epoch(way, cold)
                found.setdefault(f"{state}_per_core_s", []).append(core)
                found.setdefault(f"{state}_per_wall_s", []).append(wall)
            found.setdefault("resume_s", []).append(time_resume(way))
    table = {name: {key: median(values) for key, values in found.items()} for name, found in rates.items()}
    for name, way in ways.items():
        table[name]["bytes_per_sample"] = sum(path.stat().st_size for path in way.files) / len(bench.rows)
    return {"ways": table, "data_wait_share": time_wait(bench, num_workers), "loader_workers": num_workers}


def format_table(record: dict[str, Any]) -> str:
    """The figures as text, with ratios to PLACE."""
    ways = record["ways"]
    base = ways["PLACE"]
    lines = [f"{'samples/s of one core':34}{'cold':>8}{'warm':>8}{'PLACE is':>10}{'resume s':>10}{'bytes/sample':>14}"]
    for name, row in ways.items():
        ratio = base["warm_per_core_s"] / row["warm_per_core_s"]
        lines.append(
            f"{name:34}{row['cold_per_core_s']:8.0f}{row['warm_per_core_s']:8.0f}{ratio:9.2f}x"
            f"{row['resume_s']:10.2f}{row['bytes_per_sample']:14,.0f}"
        )
    share = record["data_wait_share"]
    lines.append(f"{record['loader_workers']} loader workers, steps of 100 ms on 64 pairs: {share:.2%} of time waited")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prepare phantoms (or take a prepared folder), measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m place.data.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="prepared folder; none prepares phantoms at 256 px, quality 95")
    parser.add_argument("--count", type=int, default=1500, help="phantoms prepared")
    parser.add_argument("--size", type=int, default=224, help="side of the image the model sees, in pixels")
    parser.add_argument("--batch", type=int, default=64, help="pairs of a batch")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; medians are shown")
    parser.add_argument("--workers", type=int, default=2, help="loader workers for the share of waiting")
    parser.add_argument("--output", type=Path, help="file that the figures are written to as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="place-benchmark-") as name:
        folder = Path(name)
        bench = build_bench(arguments.data, arguments.count, arguments.size, arguments.batch, folder)
        record = measure(bench, arguments.rounds, arguments.workers)
        image = read_card(bench.data.path)["image"]
    record |= {"samples": len(bench.rows), "stored": image, "size_px": arguments.size, "cpus": os.cpu_count()}
    sys.stdout.write(
        f"{len(bench.rows)} samples, short side {image['size_px']} px, JPEG quality {image['quality']}, "
        f"seen at {arguments.size} px\n{format_table(record)}"
    )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def build_bench(path: str | None, count: int, size_px: int, batch: int, folder: Path) -> Bench:
    """Prepare what is missing and read what the rivals' files are made of."""
    if path is None:
        path = str(folder / "phantoms")
        run_prepare(PrepareConfig(source="phantom", count=count, output=path, split=(1.0, 0.0, 0.0)))
    data = DataConfig(path=path, image_size_px=size_px, num_workers=0)
    rows = [
        rivals.Row(
            sample["image"], select_sentences(sample["sentences"], "all"), sample["report_group"], sample["sample_id"]
        )
        for sample in read_samples(path, data.train_split)
    ]
    tokenizer = train_tokenizer((text for row in rows for text in row.sentences), 2000, 160, 16)
    return Bench(data, rows, tokenizer, min(batch, len(rows)), folder)


if __name__ == "__main__":
    np.random.seed(0)  # noqa: NPY002  torchvision and WebDataset draw from the global generators
    torch.manual_seed(0)
    main()
