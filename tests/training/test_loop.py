"""What a step of the loop draws."""

from __future__ import annotations

import pytest
import torch

from place.training.loop import seed_step


def test_draws_of_a_step_depend_on_seed_step_and_rank_alone() -> None:
    def draw(seed: int, step: int, rank: int) -> tuple[int, ...]:
        seed_step(seed, step, rank)
        return tuple(torch.randint(10**6, (3,)).tolist())

    places = [(3, 5, 1), (3, 5, 0), (3, 1, 5), (5, 3, 1)]
    drawn = [draw(*place) for place in places]
    assert len({*drawn}) == len(places)
    assert [draw(*place) for place in reversed(places)] == drawn[::-1]
    assert drawn[0] == (167919, 645405, 850774), "a run of before would go on with other draws"


@pytest.mark.gpu
def test_the_gpu_draws_by_them_too() -> None:
    torch.cuda.init()
    drawn = []
    for step in (7, 8, 7):
        seed_step(0, step, 0)
        drawn.append(torch.rand(3, device="cuda").tolist())
    assert drawn[0] == drawn[2] != drawn[1]
