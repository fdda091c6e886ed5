"""A run goes on at any world size, ZeRO stage and engine, as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from curves import build_engine, run_steps
from spawn import run_ranks
from tiny import build_tiny_config

from place.config import Config
from place.distributed import read_world
from place.training.checkpoint import agree_on_checkpoint, read_state
from place.training.saver import Saver

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]
SAVED_AT, STEPS = 3, 13
CASES = [("torch", 0), *(("deepspeed", stage) for stage in range(4))]
CHANGES = [(2, 1), (1, 2), (2, 3), (3, 2)]


def build_case(kind: str, stage: int) -> Config:
    return build_tiny_config(
        engine={"kind": kind, "zero_stage": stage},
        train={"global_batch": 12, "max_micro_batch": 6},
        optim={"clip_norm": 1.0},
    )


def run_and_save(folder: Path, case: tuple[str, int]) -> torch.Tensor:
    """The undisturbed curve after the step whose checkpoint lies in folder/CASE-WORLD."""
    config = build_case(*case)
    engine = build_engine(config, 0)
    run_steps(engine, config, 0, SAVED_AT)
    saver = Saver(folder / name_case(case, read_world().world), engine, 2, 60)
    saver.save({"step": SAVED_AT, "best_step": None})
    curve = run_steps(engine, config, SAVED_AT, STEPS)
    saver.wait()
    return curve


def resume(folder: Path, case: tuple[str, int], run: Path) -> torch.Tensor:
    """The curve of a fresh engine, with other weights, that goes on from a checkpoint."""
    config = build_case(*case)
    engine = build_engine(config, 1)
    found, _ = agree_on_checkpoint(folder / run)
    assert found is not None
    engine.load(found, read_state(found)["numbers"])
    return run_steps(engine, config, SAVED_AT, STEPS)


def name_case(case: tuple[str, int], world: int) -> str:
    return f"{case[0]}-{case[1]}-{world}"


def work(folder: str, fresh: bool, came_from: tuple[int, ...]) -> dict[str, Any]:
    """On one world size: undisturbed runs of all cases, and runs that go on from checkpoints of other sizes."""
    root, curves = Path(folder), {}
    world = read_world().world
    for case in CASES:
        if fresh:
            curves[name_case(case, world)] = run_and_save(root, case)
        for other in came_from:
            curves[f"{name_case(case, other)}>{world}"] = resume(root, case, Path(name_case(case, other)))
    return curves


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def curves(folder: Path) -> dict[str, torch.Tensor]:
    """Every curve by name, as rank 0 saw it."""
    made: dict[str, torch.Tensor] = {}
    for world, fresh, came_from in ((2, True, ()), (1, True, (2,)), (3, True, (2,)), (2, False, (1, 3))):
        made.update(run_ranks(work, world, str(folder), fresh, came_from)[0])
    return made


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}to{change[1]}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{case[1]}")
def test_a_run_goes_on_at_another_world_size(case: tuple, change: tuple, curves: dict[str, torch.Tensor]) -> None:
    before, after = change
    undisturbed = curves[name_case(case, before)]
    torch.testing.assert_close(curves[f"{name_case(case, before)}>{after}"], undisturbed, rtol=1e-5, atol=1e-6)
    assert (undisturbed[:, 0] - undisturbed[0, 0]).abs().max() > 0.05, "the curve is flat: nothing was compared"
