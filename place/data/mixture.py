"""Prepared data sets that are trained on together: what an epoch takes of each, their statistics, their fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from place.config import DataConfig, PassingError, RunError, StreamConfig, UsageError
from place.data.manifest import MANIFEST_FILE, read_batches
from place.data.prepared import (
    count_samples,
    find_shard_fault,
    list_splits,
    read_card,
    read_samples,
    read_shard_list,
)
from place.data.storage import open_store


class Part(NamedTuple):
    """A data set's share of an epoch: of its stored samples, cut into units, `chosen` units are drawn.

    `unit_of_sample` int64, numbered from 0; a unit is a study of which one image is drawn, or None: each sample is one.
    """

    path: str
    samples: int
    unit_of_sample: NDArray[np.int64] | None
    units: int
    chosen: int


def list_parts(data: DataConfig, split: str, train: bool) -> list[Part]:
    """What an epoch takes of each data set; validation takes those that have the split, each unit once.

    Raises:
        UsageError: no data set has the split, or one lacks it in training.
    Source: ours.
    """
    streams = data.list_streams()
    if not train:
        streams = tuple(stream for stream in streams if split in list_splits(stream.path)) or streams[:1]
    parts = [_read_part(stream.path, split, data.views_per_study) for stream in streams]
    if not train:
        return parts
    chosen = _choose(streams, [part.units for part in parts])
    return [part._replace(chosen=number) for part, number in zip(parts, chosen)]


def count_epoch(data: DataConfig, split: str, train: bool) -> int:
    """Image-report pairs of an epoch; 0 where validation has no such split."""
    if not train and not any(split in list_splits(stream.path) for stream in data.list_streams()):
        return 0
    return sum(part.chosen for part in list_parts(data, split, train))


def read_intensity(data: DataConfig) -> tuple[float, float]:
    """Mean and standard deviation of training pixels, as shares of full scale, over what an epoch draws.

    Source: ours; images of several data sets count alike, whatever their sizes.
    """
    images = [read_card(stream.path)["image"] for stream in data.list_streams()]
    if len(images) == 1:
        return images[0]["mean"], images[0]["std"]
    parts = list_parts(data, data.train_split, train=True)
    shares = [part.chosen / sum(part.chosen for part in parts) for part in parts]
    mean = sum(share * image["mean"] for share, image in zip(shares, images))
    square = sum(share * (image["std"] ** 2 + image["mean"] ** 2) for share, image in zip(shares, images))
    return mean, math.sqrt(square - mean**2)


def check_reports(data: DataConfig) -> None:
    """Refuse data sets of images alone. Raises UsageError."""
    for stream in data.list_streams():
        missing = read_card(stream.path).get("without_report", 0)
        if missing:
            raise UsageError(
                f"{stream.path}: {missing} images have no report, and pretraining takes pairs; prepare it again with "
                "--min-words 1 or more"
            )


def read_fingerprint(data: DataConfig) -> str:
    """What identifies the samples of a run and their order: the data set's own fingerprint where there is only one.

    Source: ours.
    """
    streams = data.list_streams()
    prints = [read_card(stream.path)["fingerprint"] for stream in streams]
    if len(prints) == 1 and streams[0].repeat == 1 and data.views_per_study == "all":
        return prints[0]
    weights = [(stream.repeat, stream.proportion) for stream in streams]
    return hashlib.sha256(json.dumps([prints, weights, data.views_per_study]).encode()).hexdigest()


def read_training_samples(data: DataConfig) -> Iterator[dict[str, Any]]:
    """The stored columns of each training pair of all data sets, each once."""
    return chain.from_iterable(read_samples(stream.path, data.train_split) for stream in data.list_streams())


def find_fault(path: str, split: str, number: int) -> str:
    """The fault of one shard of a data set, empty where it has none. Raises PassingError: it cannot be read now."""
    try:
        return find_shard_fault(open_store(path), split, read_shard_list(path, split)[number])
    except OSError as error:
        raise PassingError(f"{path} cannot be read: {error.strerror or error}; start the run again") from None


def draw_samples(parts: list[Part], seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The samples of an epoch, numbered over all data sets in turn, each draw in stored order without a repeat.

    Units beyond whole repeats, and a study's image, are drawn anew in each epoch.
    Source: ours.
    """
    draws: list[NDArray[np.int64]] = []
    offset = 0
    for number, part in enumerate(parts):
        rng = np.random.default_rng([seed, epoch, number])
        repeats, rest = divmod(part.chosen, part.units)
        for _ in range(repeats):
            draws.append(offset + _draw_images(part, np.arange(part.units), rng))
        if rest:
            units = rng.choice(part.units, rest, replace=False)
            draws.append(offset + _draw_images(part, units, rng))
        offset += part.samples
    return draws


def _draw_images(part: Part, units: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    if part.unit_of_sample is None:
        return np.sort(units)
    by_unit = np.argsort(part.unit_of_sample, kind="stable")
    counts = np.bincount(part.unit_of_sample)
    pick = (rng.random(part.units) * counts).astype(np.int64)
    return np.sort(by_unit[(np.cumsum(counts) - counts + pick)[units]])


def _read_part(path: str, split: str, views_per_study: str) -> Part:
    samples = count_samples(path, split)
    if views_per_study == "all":
        return Part(path, samples, None, samples, samples)
    units = _read_units(path, split)
    if len(units) != samples:
        raise RunError(
            f"{path}: manifest.parquet has {len(units)} rows of split '{split}', its shards {samples} samples; "
            "run `place prepare` again into a new folder"
        )
    count = int(units.max()) + 1
    return Part(path, samples, units, count, count)


def _read_units(path: str, split: str) -> NDArray[np.int64]:
    """Number of each sample's study, in order of first appearance; rows of the manifest stand in the shards' order."""
    numbers: dict[str, int] = {}
    units = [
        numbers.setdefault(study, len(numbers))
        for batch in read_batches(open_store(path), MANIFEST_FILE, ["split", "study"])
        for found, study in zip(batch["split"].to_pylist(), batch["study"].to_pylist())
        if found == split
    ]
    return np.array(units, np.int64)


def _choose(streams: tuple[StreamConfig, ...], units: list[int]) -> list[int]:
    """Units drawn of each data set, at least one: its repeats, or its proportion of as many as there are in all."""
    if streams[0].proportion is None:
        return [max(1, round(stream.repeat * count)) for stream, count in zip(streams, units)]
    weights = np.array([stream.proportion for stream in streams], np.float64)
    bounds = np.round(np.cumsum(weights / weights.sum()) * sum(units)).astype(int)
    chosen = np.diff(bounds, prepend=0)
    chosen[chosen.argmax()] -= (chosen == 0).sum()
    return chosen.clip(min=1).tolist()
