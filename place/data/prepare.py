"""`place prepare`: any source to a verified data set, in parts that survive a kill, with the same bytes each time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from place.config import PrepareConfig, RunError, UsageError
from place.data.card import build_card, write_card
from place.data.identity import SPLITS
from place.data.manifest import MANIFEST, REJECTED, concat_tables, write_json
from place.data.pool import count_cores, map_in_processes
from place.data.rows import Table
from place.data.shards import merge_split
from place.data.sources import SOURCES
from place.data.task import PartResult, Task, part_folder, read_result, run_task

MapTasks = Callable[[Callable[[Task], PartResult], Iterable[Task], int], Iterator[PartResult]]
"""Takes a function, tasks and a number of workers; yields results in any order."""
OnProgress = Callable[[int, int, int], None]
"""Takes the rows done, all rows and the rows rejected so far."""

_FILES = ("manifest.parquet", "rejected.parquet", "card.json", "card.md")
_OURS = {".parts", *SPLITS, *_FILES, *(f"{name}.partial" for name in _FILES)}
_FREE = ("output", "num_workers", "input", "image_root", "salt_file")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_prepare(
    config: PrepareConfig,
    map_tasks: MapTasks = map_in_processes,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write the prepared data set of `config` to `config.output`, or continue or leave alone what is there.

    Args:
        config: what to prepare.
        map_tasks: how tasks are spread; the result does not depend on it.
        on_progress: called when a part is finished.
    Returns:
        The data card; with `already_prepared` true if the folder held just this data set, and nothing was done.
    Raises:
        UsageError: a wrong column, folder or setting.
        RunError: unreadable table, full disk, no usable row.
    Source: ours.
    """
    table = SOURCES[config.source](config)
    output = Path(config.output)
    request = build_request(config, table)
    with _opened(output):
        card = _read_card(output, request)
        if card is not None:
            shutil.rmtree(output / ".parts", ignore_errors=True)
            return {**card, "already_prepared": True}
        try:
            results = _run_parts(config, table, request, map_tasks, on_progress)
            return _merge_parts(config, table, request, results)
        except BrokenProcessPool:
            raise RunError(
                "a worker process died, perhaps for lack of memory; run the same command again to continue, "
                "with fewer workers or rows_per_task"
            ) from None
        except OSError as error:
            raise RunError(_describe(error, output)) from None


def build_request(config: PrepareConfig, table: Table) -> dict[str, Any]:
    """All that the result depends on, without a path: two equal requests give the same data set. Source: ours."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    return {**settings, "content": table.content, "rows": len(table.rows)}


@contextmanager
def _opened(output: Path) -> Iterator[None]:
    """Make the folder and hold it, so that two runs never write into one."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        foreign = sorted({path.name for path in output.iterdir()} - _OURS)
        handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"cannot write to {output}: {error.strerror}; choose another --output") from None
    try:
        if foreign:
            raise UsageError(
                f"{output} holds other files ({foreign[0]}); --output must be a new folder or a prepared data set"
            )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another prepare is writing to {output}; wait for it or choose another --output"
            ) from None
        yield
    finally:
        os.close(handle)


def _read_card(output: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The card of a finished data set; checks that what is there, finished or not, is of the same request."""
    card, begun = output / "card.json", output / ".parts" / "request.json"
    found = json.loads(card.read_text()) if card.is_file() else None
    before = found["request"] if found else json.loads(begun.read_text()) if begun.is_file() else request
    differing = sorted(name for name in {*before, *request} if before.get(name) != request.get(name))
    if differing:
        told = ", ".join(_tell_difference(name, before.get(name), request.get(name)) for name in differing)
        raise UsageError(
            f"{output} was prepared with other settings: {told}; choose another --output or delete that folder"
        )
    return found


def _tell_difference(name: str, before: Any, after: Any) -> str:
    if name == "content":
        return "another table, image root or salt"
    return f"{name}={json.dumps(before)}, not {json.dumps(after)}"


def _run_parts(
    config: PrepareConfig, table: Table, request: dict[str, Any], map_tasks: MapTasks, on_progress: OnProgress | None
) -> list[PartResult]:
    parts_dir = Path(config.output) / ".parts"
    _begin_parts(parts_dir, request)
    count = -(-len(table.rows) // config.rows_per_task)
    done = [read_result(folder) for folder in (part_folder(parts_dir, at) for at in range(count)) if folder.exists()]
    missing = sorted(set(range(count)) - {result.number for result in done})
    _check_disk(config, len(missing) * config.rows_per_task)
    workers = max(1, min(config.num_workers or count_cores(), len(missing)))
    tasks = (
        Task(at, table.rows[at * config.rows_per_task : (at + 1) * config.rows_per_task], str(parts_dir), config)
        for at in missing
    )
    results = list(done)
    _report(on_progress, results, len(table.rows))
    for result in map_tasks(run_task, tasks, workers):
        results.append(result)
        _report(on_progress, results, len(table.rows))
    return sorted(results)


def _begin_parts(parts_dir: Path, request: dict[str, Any]) -> None:
    try:
        parts_dir.mkdir(exist_ok=True)
        for stale in parts_dir.glob("*.partial"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        write_json(parts_dir / "request.json", request)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise UsageError(f"cannot write to {parts_dir.parent}: {error.strerror}; choose another --output") from None


def _report(on_progress: OnProgress | None, results: list[PartResult], total: int) -> None:
    if on_progress:
        rejected = sum(sum(result.reasons.values()) for result in results)
        on_progress(sum(result.rows for result in results), total, rejected)


def estimate_bytes(config: PrepareConfig, rows: int) -> int:
    """Disk that so many rows take, rather too much than too little: 0.4 bytes a pixel of a 4:3 image, and the report.

    Source: ours.
    """
    return round(rows * (config.size_px**2 * 4 / 3 * 0.4 + 4096))


def _check_disk(config: PrepareConfig, rows: int) -> None:
    rows = min(rows, config.count) if config.source == "phantom" else rows
    free, need = shutil.disk_usage(config.output).free, estimate_bytes(config, rows)
    if need > free:
        raise RunError(
            f"too little disk at {config.output}: about {_gib(need)} needed, {_gib(free)} free; "
            "free some, choose another --output or a smaller size_px"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _describe(error: OSError, output: Path) -> str:
    if error.errno in _FULL:
        return (
            f"disk full at {output} ({error.strerror}): free some and run the same command again, finished parts stay"
        )
    return f"cannot write to {output} ({error.strerror or error}): put that right and run the same command again"


def _merge_parts(
    config: PrepareConfig, table: Table, request: dict[str, Any], results: list[PartResult]
) -> dict[str, Any]:
    """Join the finished parts. Every step can be repeated; the card comes last: with it, all is there."""
    output = Path(config.output)
    parts = [part_folder(output / ".parts", result.number) for result in results]
    concat_tables([part / "rejected.parquet" for part in parts], output / "rejected.parquet", REJECTED)
    _check_counts(output, table, results)
    hashes = [digest for split in SPLITS for digest in merge_split([part / split for part in parts], output / split)]
    concat_tables([part / "manifest.parquet" for part in parts], output / "manifest.parquet", MANIFEST)
    card = build_card(config, table, results, hashes, output / "manifest.parquet")
    card["request"] = request
    write_card(output, card)
    shutil.rmtree(output / ".parts")
    return card


def _check_counts(output: Path, table: Table, results: list[PartResult]) -> None:
    done = sum(result.rows for result in results)
    if done != len(table.rows):
        raise RunError(f"{done} of {len(table.rows)} rows are accounted for; delete {output} and prepare again")
    reasons: dict[str, int] = {}
    for result in results:
        for reason, count in result.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    if sum(reasons.values()) == done:
        top = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:3])
        shutil.rmtree(output / ".parts")  # so that a corrected command may use the folder
        raise RunError(f"all {done} rows were rejected ({top}); {output / 'rejected.parquet'} has the reason of each")
