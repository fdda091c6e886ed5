"""`place data stats`: mean and standard deviation of the stored pixels, exact, for normalisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from place.data.pool import map_in_processes
from place.data.prepared import list_splits, read_card, read_shard, read_shard_list
from place.data.storage import open_store


class PixelSums(NamedTuple):
    """Whole numbers: their sum does not depend on the order."""

    images: int = 0
    pixels: int = 0
    total: int = 0
    squares: int = 0

    def add(self, other: PixelSums) -> PixelSums:
        """The sums over both."""
        return PixelSums(*(a + b for a, b in zip(self, other)))

    @property
    def mean(self) -> float:
        """As a share of full scale."""
        return self.total / self.pixels / 255

    @property
    def std(self) -> float:
        """As a share of full scale."""
        return ((self.squares * self.pixels - self.total**2) / self.pixels**2) ** 0.5 / 255


class _Job(NamedTuple):
    data_dir: str
    split: str
    shard: dict[str, Any]


def compute_stats(
    data_dir: str | Path, num_workers: int = 0, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, PixelSums]:
    """Decode every stored image once, a shard at a time, and sum up its pixels.

    Args:
        data_dir: folder or s3:// address of a prepared data set.
        num_workers: processes; 0 takes one a core.
        on_progress: takes the shards read and all shards.
    Returns:
        The sums of each split that has samples.
    Raises:
        UsageError: no data set there.
        RunError: a damaged shard.
    Source: ours.
    """
    read_card(data_dir)
    sums = {split: PixelSums() for split in list_splits(data_dir)}
    jobs = [_Job(str(data_dir), split, info) for split in sums for info in read_shard_list(data_dir, split)]
    for done, (split, found) in enumerate(map_in_processes(_sum_shard, jobs, num_workers), 1):
        sums[split] = sums[split].add(found)
        if on_progress:
            on_progress(done, len(jobs))
    return sums


def _sum_shard(job: _Job) -> tuple[str, PixelSums]:
    from place.data.transforms import read_image

    sums = PixelSums()
    for sample in read_shard(open_store(job.data_dir), job.split, job.shard):
        values = read_image(sample["image"]).astype(np.int64)
        sums = sums.add(PixelSums(1, values.size, int(values.sum()), int((values * values).sum())))
    return job.split, sums
