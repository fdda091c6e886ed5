"""What a run did, read from its logs: attempts, the lineage that counts, work that was lost, samples of each epoch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from place.config import RunError
from place.runlog import ATTENTION, read_jsonl
from place.runs import Recorded, read_recorded, tell_damage

Record = dict[str, Any]


class Attempt(NamedTuple):
    """One worker group, from its start to the last thing heard of it; times in seconds since 1970."""

    number: int
    began: float
    ended: float
    from_step: int | None
    """Step of the checkpoint that it began with; None where it did not come so far."""
    to_step: int | None
    """Last step that it logged; None where it logged none."""
    workers: list[Record]
    notes: list[str]
    """What it said of itself."""
    reasons: list[str]
    """Why it ended, and what was done about it."""

    @property
    def num_gpus(self) -> int | None:
        """GPUs that it held; None where its workers did not say what they compute on."""
        devices = [worker.get("device") for worker in self.workers]
        return None if None in devices else sum(device != "cpu" for device in devices)


class Epoch(NamedTuple):
    """What an epoch saw, over the lineage that counts."""

    number: int
    """From 1."""
    steps: int
    pairs: int
    distinct: int
    """Pairs with a sample id of their own."""


class History(NamedTuple):
    """All that a report shows of a run."""

    recorded: Recorded
    attempts: list[Attempt]
    steps: list[Record]
    """Training records of the lineage that counts, a step once."""
    lost: list[Record]
    """Training records of steps that a later attempt did again, or has yet to do again."""
    validations: list[Record]
    epochs: list[Epoch]
    attention: list[Record]
    """Attention of the V-PORs in one image at validations of the lineage that counts."""


def read_history(run: Path) -> History:
    """Read a run's logs; to be called within `tell_damage`. Raises RunError where it is known which file is damaged."""
    recorded = read_recorded(run)
    with tell_damage(run / "metrics.jsonl"):
        metrics = list(read_jsonl(run / "metrics.jsonl"))
    attempts = build_attempts(recorded.attempts, metrics)
    limits = compute_limits(attempts)
    kept = [record for record in metrics if counts(record, limits)]
    steps = {record["step"]: record for record in kept if "total" in record}
    validations = {record["step"]: record for record in kept if "val_total" in record}
    with tell_damage(run / ATTENTION):
        seen = {record["step"]: record for record in read_jsonl(run / ATTENTION) if counts(record, limits)}
    with tell_damage(run / "samples.jsonl"):
        epochs = count_epochs(read_lines(run / "samples.jsonl"), limits)
    return History(
        recorded,
        attempts,
        [steps[step] for step in sorted(steps)],
        [record for record in metrics if "total" in record and steps.get(record["step"]) is not record],
        [validations[step] for step in sorted(validations)],
        epochs,
        [seen[step] for step in sorted(seen)],
    )


def build_attempts(records: Iterable[Record], metrics: Iterable[Record]) -> list[Attempt]:
    """Worker groups in their order, from attempts.jsonl and metrics.jsonl.

    A note without an attempt is of the launcher: it says why the group before it ended, and who goes on; one of a
    command that has started none yet is of the group to come.
    Raises:
        RunError: metrics of an attempt that attempts.jsonl does not know.
    Source: ours.
    """
    found: list[Attempt] = []
    before: list[str] = []
    is_open = False
    for record in records:
        if "command" in record:
            is_open = False
        elif "launch" in record:
            number, when = record["attempt"], record["time"]
            found.append(Attempt(number, when, when, None, None, record["workers"], before, []))
            before, is_open = [], True
        elif "from_step" in record and is_open:
            found[-1].notes.extend(record["notes"])
            found[-1] = found[-1]._replace(from_step=record["from_step"], ended=record["time"])
        elif is_open:
            found[-1] = _add_reasons(found[-1], record)
        else:
            before += _list_reasons(record)
    by_number = {attempt.number: place for place, attempt in enumerate(found)}
    for record in metrics:
        if record["attempt"] not in by_number:
            raise RunError(f"attempts.jsonl lacks attempt {record['attempt']}, which metrics.jsonl names; restore it")
        place = by_number[record["attempt"]]
        attempt = found[place]
        found[place] = attempt._replace(to_step=record["step"], ended=max(attempt.ended, record["time"]))
    return found


def _add_reasons(attempt: Attempt, record: Record) -> Attempt:
    """The attempt with what the launcher notes about its end; it ended when the first of that was noted."""
    ended = attempt.ended if attempt.reasons else record["time"]
    return attempt._replace(reasons=[*attempt.reasons, *_list_reasons(record)], ended=ended)


def _list_reasons(record: Record) -> list[str]:
    outcome = [": ".join(filter(None, (record["outcome"], record.get("why"))))] if "outcome" in record else []
    return [*record.get("notes", []), *outcome]


def compute_limits(attempts: list[Attempt]) -> dict[int, int]:
    """Last step of each attempt that counts: no later one began before it. Source: ours."""
    limits, limit = {}, 1 << 62
    for attempt in reversed(attempts):
        limits[attempt.number] = limit
        if attempt.from_step is not None:
            limit = min(limit, attempt.from_step)
    return limits


def read_lines(path: Path) -> Iterator[Record]:
    """Objects of a long log, one in memory at a time; lines that a killed writer left are passed over."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def counts(record: Record, limits: dict[int, int]) -> bool:
    """Whether a record is of the lineage that counts: its attempt was built upon as far as its step."""
    return bool(record["step"] <= limits.get(record["attempt"], 0))


def count_epochs(records: Iterable[Record], limits: dict[int, int]) -> list[Epoch]:
    """Steps and pairs of each epoch, by the lines of samples.jsonl in the order of attempts.

    Args:
        limits: last step of each attempt that counts.
    Source: ours.
    """
    steps: dict[int, int] = {}
    pairs: dict[int, int] = {}
    seen: dict[int, set[int]] = {}
    for record in records:
        if counts(record, limits):
            epoch = record["epoch"]
            steps[epoch] = steps.get(epoch, 0) + 1
            pairs[epoch] = pairs.get(epoch, 0) + len(record["ids"])
            seen.setdefault(epoch, set()).update(record["ids"])
    return [Epoch(epoch + 1, steps[epoch], pairs[epoch], len(seen[epoch])) for epoch in sorted(steps)]


def compute_working_s(attempts: list[Attempt]) -> float:
    """Seconds that worker groups were there."""
    return sum(attempt.ended - attempt.began for attempt in attempts)


def compute_gpu_hours(attempts: list[Attempt]) -> float | None:
    """GPUs times hours of all attempts; None where one did not say what it computes on."""
    counts = [attempt.num_gpus for attempt in attempts]
    if None in counts:
        return None
    return sum((count or 0) * (item.ended - item.began) for count, item in zip(counts, attempts)) / 3600
