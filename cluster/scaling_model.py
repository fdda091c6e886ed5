"""A model of a step's time, fitted to the rungs that were measured, and what it says of sizes that were not.

    step = wait + compute + rest + communication
    compute       c0 + c1 x FLOPs of a worker                        forward, loss, backward, optimiser
    communication r x rounds + k x bytes of a worker / bandwidth     exposed: what is waited for in collectives
                  on GPUs, whose phases hold it: what compute takes beyond that of one worker with its share
    wait, rest    as measured, mean over steps and rungs             data, copies, logging

On another network r changes by what its latency differs by, where both latencies are known, and is never below 0.
Rounds are the messages that follow each other in one collective: 2(N-1) on a ring, 2 log2 N on a tree. All factors are
at least 0 (non-negative least squares), and each is fitted on the phases that it explains, not on the sum.
Source: ours; rounds and bytes of a collective as Thakur et al. 2005 count them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy.optimize import nnls

from place.config import Section

COMPUTE = ("forward", "loss", "backward", "optimiser")
COMMUNICATION = ("gather", "communication")
RESAMPLES = 200
ALIKE = 1.5
"""Where the FLOPs of a worker differ by less over the rungs fitted, c0 and c1 are not told apart: intervals then reach
from compute that does not grow with them to compute that grows as they do."""
RunPhases = Sequence[Sequence[dict[str, float]]]
"""For each run the phases of its steps, in seconds."""


class Network(Section):
    """A network between nodes."""

    name: str = "network"
    """What it is called."""
    bandwidth_gbit: float = Field(gt=0)
    """Bandwidth of one worker in one direction, in Gbit/s."""
    latency_us: float = Field(0.0, ge=0)
    """Time of one message of no size, in microseconds; 0: not known, and no difference to other networks is made."""
    topology: Literal["ring", "tree"] = "ring"
    """How a collective goes around."""


class Point(NamedTuple):
    """A rung as the model sees it: the seconds of its runs, and its work."""

    runs: Sequence[np.ndarray]
    """Of each run the seconds of each step (steps, 3): compute, communication, rest."""
    flop_worker: float
    bytes_worker: float
    rounds: float
    bandwidth: float
    """Bytes a second."""
    latency_s: float = 0.0
    """Of one message; 0: not known."""
    alone: Sequence[np.ndarray] = ()
    """Of each run of one worker with its share, the compute of each step, where that of `runs` holds communication."""


class Model(NamedTuple):
    """Factors: c0, c1 (seconds, seconds a FLOP), r (seconds a round), k (1 where the wire is all there is), rest."""

    start_s: float
    per_flop_s: float
    per_round_s: float
    per_wire: float
    rest_s: float
    latency_s: float = 0.0
    """What is within r, the mean over the rungs fitted; 0: not known."""

    def predict(
        self, flop_worker: float, bytes_worker: float, rounds: float, bandwidth: float, latency_s: float = 0.0
    ) -> dict[str, float]:
        """Seconds of a step by term."""
        compute = self.start_s + self.per_flop_s * flop_worker
        beyond_s = latency_s - self.latency_s if latency_s and self.latency_s else 0.0
        exposed = max(self.per_round_s + beyond_s, 0.0) * rounds + self.per_wire * bytes_worker / bandwidth
        return {"compute": compute, "exposed": exposed, "rest": self.rest_s, "step": compute + exposed + self.rest_s}


def compute_rounds(world: int, topology: str) -> float:
    """Messages that follow each other in an all-reduce of `world` workers."""
    if world == 1:
        return 0.0
    return 2 * math.log2(world) if topology == "tree" else 2.0 * (world - 1)


def describe_network(network: Network, world: int) -> tuple[float, float, float]:
    """What `Model.predict` takes of a network: rounds, bytes a second, seconds of latency."""
    return compute_rounds(world, network.topology), network.bandwidth_gbit * 1e9 / 8, network.latency_us / 1e6


def build_point(
    row: dict[str, Any],
    runs: RunPhases,
    alone: tuple[dict[str, Any], RunPhases] | None = None,
) -> Point:
    """A measured rung.

    Args:
        row, runs: of the whole run, and the phases of the steps of each repeat; without a network there are no rounds.
        alone: the same of one worker with its share of the batch, where the phases of the whole run hold their
            communication: compute is then that of this worker, in proportion to FLOPs, and what goes beyond it exposed.
    """
    own = []
    if alone is not None:
        own = [_sum_phases(phases)[:, 0] * row["flop_worker"] / alone[0]["flop_worker"] for phases in alone[1]]
    network = describe_network(Network(**row["network"]), row["workers"]) if row["network"] else (0.0, 1.0, 0.0)
    return Point([_sum_phases(phases) for phases in runs], row["flop_worker"], row["bytes_worker"], *network, own)


def _sum_phases(phases: Sequence[dict[str, float]]) -> np.ndarray:
    known = (*COMPUTE, *COMMUNICATION)
    parts = [
        (
            sum(phase.get(name, 0.0) for name in COMPUTE),
            sum(phase.get(name, 0.0) for name in COMMUNICATION),
            sum(value for name, value in phase.items() if name not in known),
        )
        for phase in phases
    ]
    return np.array(parts)


def fit(
    points: Sequence[Point], rng: np.random.Generator | None = None, growth: Literal["fitted", "none", "all"] = "fitted"
) -> Model:
    """Fit to the typical step of each point; with `rng`, of runs and steps that are drawn with replacement.

    Args:
        growth: how much of compute grows with FLOPs.
    """
    seconds_P3 = np.stack([compute_typical(point, rng) for point in points])
    flops = np.array([point.flop_worker for point in points])
    # Solved in units of the largest, for the numbers differ by a dozen orders.
    columns = np.stack([np.full_like(flops, growth != "all"), flops / flops.max() * (growth != "none")])
    start, per_flop = _solve(columns, seconds_P3[:, 0])
    rounds = np.array([point.rounds for point in points])
    wire = np.array([point.bytes_worker / point.bandwidth for point in points])
    latency_s = float(np.mean([point.latency_s for point in points if point.rounds and point.latency_s] or [0.0]))
    # Of a rung whose latency is another, r holds as much more or less.
    beyond = np.array([point.latency_s - latency_s if point.latency_s else 0.0 for point in points])
    per_round, per_wire = _solve([rounds, wire], seconds_P3[:, 1] - rounds * beyond)
    return Model(start, per_flop / flops.max(), per_round, per_wire, float(np.mean(seconds_P3[:, 2])), latency_s)


def fit_resampled(points: Sequence[Point], count: int = RESAMPLES, seed: int = 0) -> list[Model]:
    """The fit, and then fits to resampled runs and steps, for intervals: of their noise, not of the model's form.

    With rungs that are alike in FLOPs, half of these have no compute that grows with them, half no other.
    """
    rng = np.random.default_rng(seed)
    growths: tuple[Literal["none", "all", "fitted"], ...] = ("none", "all") if are_alike(points) else ("fitted",)
    return [fit(points), *(fit(points, rng, growths[number % len(growths)]) for number in range(count))]


def are_alike(points: Sequence[Point]) -> bool:
    """Whether the rungs differ too little in FLOPs to tell what of compute grows with them."""
    flops = [point.flop_worker for point in points]
    return max(flops) < ALIKE * min(flops)


def predict_interval(
    models: Sequence[Model],
    flop_worker: float,
    bytes_worker: float,
    rounds: float,
    bandwidth: float,
    latency_s: float = 0.0,
) -> dict[str, tuple[float, float, float]]:
    """Of each term: value, and the 2.5 and 97.5 percentiles over the resamples."""
    found = [model.predict(flop_worker, bytes_worker, rounds, bandwidth, latency_s) for model in models]
    intervals = {}
    for name in found[0]:
        low, high = np.percentile([one[name] for one in found[1:]] or [found[0][name]], [2.5, 97.5])
        intervals[name] = (found[0][name], float(low), float(high))
    return intervals


def compute_typical(point: Point, rng: np.random.Generator | None = None) -> np.ndarray:
    """Medians of compute and communication; the mean of the rest, for batches that come in bursts are waited for."""
    seconds_S3 = _draw(point.runs, rng)
    compute, exposed = np.median(seconds_S3[:, :2], axis=0)
    if point.alone:
        compute = np.median(_draw(point.alone, rng))
        exposed = np.median(np.maximum(seconds_S3[:, 0] - compute, 0))
    return np.array([compute, exposed, seconds_S3[:, 2].mean()])


def _draw(runs: Sequence[np.ndarray], rng: np.random.Generator | None) -> np.ndarray:
    """All steps; with `rng`, of runs drawn with replacement steps drawn so: steps of one run are alike."""
    if rng is not None:
        drawn = [runs[place] for place in rng.integers(len(runs), size=len(runs))]
        runs = [run[rng.integers(len(run), size=len(run))] for run in drawn]
    return np.concatenate(runs)


def _solve(columns: Sequence[np.ndarray], target: np.ndarray) -> tuple[float, float]:
    first, second = nnls(np.stack(columns, axis=1), target)[0]
    return float(first), float(second)
