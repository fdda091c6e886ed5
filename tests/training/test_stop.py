"""Wishes to stop: the first one stays, and a wish to grow never takes another with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spawn import run_ranks

from place.distributed import read_world
from place.training.loop import _Vote
from place.training.stop import RESIZE, ask_to_stop, is_asked, read_stop, withdraw_resize, withdraw_stop


def test_the_first_reason_stays_until_it_is_taken_back(tmp_path: Path) -> None:
    assert not is_asked(tmp_path)
    assert read_stop(tmp_path) == ""
    ask_to_stop(tmp_path, "SIGUSR1")
    ask_to_stop(tmp_path, "SIGTERM")
    assert is_asked(tmp_path)
    assert read_stop(tmp_path) == "SIGUSR1"
    withdraw_stop(tmp_path)
    assert not is_asked(tmp_path)


@pytest.mark.parametrize("order", [(RESIZE, "SIGTERM"), ("SIGTERM", RESIZE)])
def test_a_signal_outlives_a_wish_to_grow(order: tuple[str, str], tmp_path: Path) -> None:
    for why in order:
        ask_to_stop(tmp_path, why)
    assert read_stop(tmp_path) == "SIGTERM"
    withdraw_resize(tmp_path)
    assert is_asked(tmp_path)
    assert read_stop(tmp_path) == "SIGTERM"


def test_a_wish_to_grow_is_taken_back(tmp_path: Path) -> None:
    ask_to_stop(tmp_path, RESIZE)
    assert is_asked(tmp_path)
    assert read_stop(tmp_path) == RESIZE
    withdraw_resize(tmp_path)
    assert not is_asked(tmp_path)
    ask_to_stop(tmp_path, RESIZE)
    withdraw_stop(tmp_path)
    assert read_stop(tmp_path) == ""


def vote_at_the_third_step() -> list[bool]:
    vote = _Vote(torch.device("cpu"))
    return [vote.take(read_world().rank == 1 and step == 3) for step in range(1, 6)]


@pytest.mark.multiprocess
def test_all_ranks_know_at_their_next_step_what_one_wants() -> None:
    assert run_ranks(vote_at_the_third_step, 2) == [[False, False, False, True, False]] * 2


def test_a_rank_alone_knows_at_once() -> None:
    assert vote_at_the_third_step() == [False] * 5
    assert _Vote(torch.device("cpu")).take(True)
