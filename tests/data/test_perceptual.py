"""Pairs of alike hashes, over tiles of any size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from place.data import perceptual
from place.data.perceptual import MAX_BITS, find_similar


@pytest.mark.parametrize("rows", [1, 3, 7, 4096])
def test_alike_hashes_are_found_in_order_over_tiles_of_both_sides(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(perceptual, "_ROWS", rows)
    rng = np.random.default_rng(0)
    a_NH, b_MH = rng.random((11, 256)) < 0.5, rng.random((17, 256)) < 0.5
    b_MH[[2, 16]] = a_NH[5]
    b_MH[9] = ~a_NH[0]  # a negative
    b_MH[4] = a_NH[10]
    b_MH[4, :MAX_BITS] ^= True
    b_MH[5] = a_NH[10]
    b_MH[5, : MAX_BITS + 1] ^= True
    assert find_similar(a_NH, b_MH) == [(0, 9), (5, 2), (5, 16), (10, 4)]


def test_memory_follows_the_tile_and_not_the_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_ROWS", 64)
    rng = np.random.default_rng(0)
    a_NH, b_MH = rng.random((64, 256)) < 0.5, rng.random((20_000, 256)) < 0.5
    tracemalloc.start()
    find_similar(a_NH, b_MH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, "all of the other side at once takes 5 MiB, and 20 as numbers"
