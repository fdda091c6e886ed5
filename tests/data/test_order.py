"""The order of an epoch: the same for every world, each sample at most once, few shards a rank."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from place.data.order import compute_positions, compute_steps, share_steps

GLOBAL_BATCH, CANONICAL = 24, 8


def build_steps(samples: int = 480, first: int = 0, seed: int = 5, epoch: int = 1, canonical: int = CANONICAL):
    shards = np.arange(samples) // 50
    return compute_steps([np.arange(samples)], shards, canonical, GLOBAL_BATCH, first, (seed, epoch, 1 << 18))


def read_as(steps_KG: np.ndarray, world: int, num_workers: int) -> np.ndarray:
    """Global batches as a world trains them: ranks side by side, each taking its loader workers in turn."""
    local = steps_KG.shape[1] // world
    read = np.full_like(steps_KG, -1)
    for rank, worker in itertools.product(range(world), range(num_workers)):
        part = share_steps(steps_KG, rank, world, worker, num_workers).reshape(-1, local)
        read[worker::num_workers, rank * local : (rank + 1) * local] = part
    return read


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_world_trains_the_same_samples_in_the_same_order(world: int, num_workers: int) -> None:
    steps = build_steps(500)
    assert (read_as(steps, world, num_workers) == steps).all()


@pytest.mark.parametrize("samples", [480, 481, 499, 503])
def test_no_sample_comes_twice_and_only_the_tail_is_left_out(samples: int) -> None:
    steps = build_steps(samples)
    assert len(steps) == samples // GLOBAL_BATCH
    assert len(np.unique(steps)) == steps.size
    if samples == 480:
        assert sorted(steps.ravel()) == list(range(480))


@pytest.mark.parametrize("done", [1, 7, 19, 20])
def test_an_epoch_goes_on_exactly_behind_what_was_trained(done: int) -> None:
    assert (build_steps(503, first=done * GLOBAL_BATCH) == build_steps(503)[done:]).all()


def test_order_hangs_on_seed_epoch_and_canonical_nodes() -> None:
    base = build_steps()
    assert (build_steps() == base).all()
    for other in (build_steps(seed=6), build_steps(epoch=2), build_steps(canonical=4)):
        assert (other != base).any()


def test_without_shuffling_canonical_nodes_are_read_in_turn() -> None:
    assert compute_positions(7, 3).tolist() == [0, 2, 4, 1, 3, 5, 6]
    steps = compute_steps([np.arange(6)], np.zeros(6, int), 3, 6, 0, None)
    assert steps.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_rank_reads_the_shards_of_its_canonical_nodes_alone() -> None:
    samples = 4800
    shards = np.arange(samples) // 50
    steps = compute_steps([np.arange(samples)], shards, CANONICAL, GLOBAL_BATCH, 0, (5, 1, 1 << 18))
    seen = [set(shards[share_steps(steps, rank, 4, 0, 1)]) for rank in range(4)]
    # A quarter of 96 shards, and those that a border of canonical nodes cuts.
    assert max(map(len, seen)) <= 24 + CANONICAL


def test_fewer_samples_than_canonical_nodes_are_read_once_each() -> None:
    steps = compute_steps([np.arange(6)], np.zeros(6, int), 8, 2, 0, (5, 1, 1 << 18))
    assert sorted(steps.ravel()) == list(range(6))


def test_a_sample_drawn_twice_is_read_twice() -> None:
    shards = np.arange(60) // 10
    steps = compute_steps([np.arange(60), np.arange(0, 60, 5)], shards, 4, 12, 0, (5, 1, 1 << 18))
    assert np.bincount(steps.ravel(), minlength=60).tolist() == [2, 1, 1, 1, 1] * 12
