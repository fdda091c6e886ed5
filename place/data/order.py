"""The order of an epoch's samples: a function of seed, epoch, canonical nodes and global batch, and of no world."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from place.compat import patch_torchvision

patch_torchvision()
from streaming.base.shuffle import get_shuffle  # noqa: E402

Ids = NDArray[np.int64]


def compute_positions(num_samples: int, num_canonical_nodes: int) -> Ids:
    """Positions 0..n-1 as they are read: canonical nodes hold even stretches of them and are read in turn.

    Source: inferred (mosaicml-streaming, partition/orig.py), which repeats a sample where stretches differ in length;
    here none is.
    """
    nodes = min(num_canonical_nodes, num_samples)
    bounds = np.arange(nodes + 1) * num_samples // nodes
    table = np.full((int(np.diff(bounds).max()), nodes), -1, np.int64)
    for node, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        table[: end - begin, node] = np.arange(begin, end)
    order = table.ravel()
    return order[order >= 0]


def compute_steps(
    draws: list[Ids],
    shard_of_sample: Ids,
    num_canonical_nodes: int,
    global_batch: int,
    first_sample: int,
    shuffle: tuple[int, int, int] | None,
) -> Ids:
    """Sample numbers of each whole global batch that is left of an epoch, int64 (steps, global_batch).

    Within a step samples stand by canonical node, so that ranks, which take it in equal pieces, each read the shards
    of few nodes.

    Args:
        draws: the epoch's samples; a draw holds each sample at most once, in stored order.
        shard_of_sample: shard number of each stored sample.
        first_sample: samples of the epoch that were trained already.
        shuffle: seed, epoch and block size of streaming's py1e order; None keeps the stored one.
    Source: ours; shuffling by mosaicml-streaming.
    """
    drawn = np.concatenate(draws)
    positions = compute_positions(len(drawn), num_canonical_nodes)[first_sample:]
    steps = len(positions) // global_batch
    positions_KG = np.sort(positions[: steps * global_batch].reshape(steps, global_batch), axis=1)
    if shuffle is None:
        return drawn[positions_KG]
    seed, epoch, block = shuffle
    counts = np.concatenate([np.bincount(shard_of_sample[draw]) for draw in draws])
    nodes = min(num_canonical_nodes, len(drawn))
    return drawn[get_shuffle("py1e", counts[counts > 0], nodes, seed, epoch, block)[positions_KG]]


def share_steps(steps_KG: Ids, rank: int, world: int, worker: int, num_workers: int) -> Ids:
    """What one loader worker of one rank reads, flat: the rank's piece of every num_workers-th step.

    Source: ours.
    """
    local_batch = steps_KG.shape[1] // world
    return steps_KG[worker::num_workers, rank * local_batch : (rank + 1) * local_batch].ravel()
