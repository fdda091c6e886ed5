"""Which rank the others wait for."""

from __future__ import annotations

from place.training.meter import describe_lag

HOSTS = ["a", "a", "b", "b"]


def test_the_rank_that_comes_last_by_much_is_named_with_its_host() -> None:
    assert describe_lag([0.1, 0.11, 0.5, 0.1], 0.6, HOSTS) == {"lag_s": 0.4, "straggler": "rank 2 on b"}


def test_a_lag_that_costs_little_is_a_number_and_no_straggler() -> None:
    assert describe_lag([0.30, 0.31, 0.36, 0.30], 1.0, HOSTS) == {"lag_s": 0.06}
    assert describe_lag([0.01, 0.01, 0.04, 0.01], 0.05, HOSTS) == {"lag_s": 0.03}


def test_of_two_ranks_the_slower_one_is_measured_against_the_faster() -> None:
    assert describe_lag([0.1, 0.4], 0.5, ["a", "b"]) == {"lag_s": 0.3, "straggler": "rank 1 on b"}


def test_a_rank_alone_has_nobody_to_wait_for() -> None:
    assert describe_lag([0.1], 0.2, ["a"]) == {}
