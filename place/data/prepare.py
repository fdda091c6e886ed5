"""`place prepare`: any source to a verified data set, in parts that survive a kill, with the same bytes each time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from functools import reduce
from pathlib import Path
from typing import IO, Any

from place.config import PrepareConfig, RunError, UsageError
from place.data.card import build_card, write_card
from place.data.counts import check_allowed, check_counts
from place.data.identity import SPLITS
from place.data.manifest import (
    HASHES_FILE,
    MANIFEST,
    MANIFEST_FILE,
    REJECTED,
    REJECTED_FILE,
    concat_tables,
    read_json,
    write_json,
)
from place.data.masks import MASKS, MASKS_FILE
from place.data.pool import map_in_processes
from place.data.protocol import read_protocol
from place.data.rows import Table
from place.data.shards import HASHES, write_index
from place.data.sources import open_source
from place.data.storage import Folder, Store, open_store
from place.data.task import (
    NOTHING,
    PARTS,
    Part,
    PartResult,
    Task,
    add_results,
    list_parts,
    name_table,
    read_parts,
    run_task,
)
from place.kept import FULL, PARTIAL, try_lock

MapTasks = Callable[[Callable[[Task], PartResult], Iterable[Task], int], Iterator[PartResult]]
"""Takes a function, tasks and a number of workers (0: all there are); yields results in any order."""
OnProgress = Callable[[int, int, int], None]
"""Takes the rows done, all rows and the rows rejected so far."""

PAGE = "inspect.html"
"""What `place data inspect` writes beside the data."""
_FILES = (MANIFEST_FILE, REJECTED_FILE, MASKS_FILE, "card.json", "card.md")
_LOCK = ".lock"
_OURS = {PARTS, _LOCK, PAGE, HASHES_FILE, *SPLITS, *_FILES}
_PATHS = ("input", "image_root", "reports", "salt_file", "boxes", "only", "protocol", "output")
_FREE = (*_PATHS, "launcher", "address", "num_workers", "allow_counts")
_REQUEST = f"{PARTS}/request.json"


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
        The data card; with `already_prepared` true if the data set was there as asked for, and nothing was done.
    Raises:
        UsageError: a wrong column, folder or setting.
        RunError: unreadable table, full disk, no usable row.
    Source: ours.
    """
    config = _resolve_paths(config)
    store = open_store(config.output)
    if config.protocol:
        check_allowed(read_protocol(config.protocol), config.allow_counts)
    table = _open_source(config)
    request = build_request(config, table)
    with _held(store):
        card = _read_card(store, request)
        if card is not None:
            _delete_unfinished(store)
            _check_protocol(config, store)
            return {**card, "already_prepared": True}
        try:
            _run_parts(config, table, request, store, map_tasks, on_progress)
            return _merge_parts(config, table, request, store)
        except BrokenProcessPool:
            raise RunError(
                "a worker process died, perhaps for lack of memory; run the same command again to continue, "
                "with fewer workers"
            ) from None
        except OSError as error:
            raise RunError(_describe(error, store)) from None


def _resolve_paths(config: PrepareConfig) -> PrepareConfig:
    """Paths that hold in every process, wherever it was started."""
    paths = {name: getattr(config, name) for name in _PATHS}
    return config.model_copy(
        update={name: os.path.abspath(path) for name, path in paths.items() if path and "://" not in path}
    )


def _open_source(config: PrepareConfig) -> Table:
    try:
        return open_source(config)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise RunError(
            f"the input cannot be read now ({error.strerror or error}): put that right and run the same command again"
        ) from None


def build_request(config: PrepareConfig, table: Table) -> dict[str, Any]:
    """All that the result depends on, without a path: two equal requests give the same data set. Source: ours."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    return {**settings, "content": table.content, "rows": len(table.rows)}


@contextmanager
def _held(store: Store) -> Iterator[None]:
    """Make sure that the place is ours; a folder is also made and held, so that two runs never write into one."""
    lock = None
    try:
        foreign = sorted(name for name in store.list_top() if not _is_ours(name))
        if foreign:
            raise UsageError(
                f"{store} holds other files ({foreign[0]}); --output must be a new folder or a prepared data set"
            )
        if isinstance(store, Folder) and store.size("card.json") is None:  # a finished one may be read-only
            store.root.mkdir(parents=True, exist_ok=True)
            lock = (store.root / _LOCK).open("a")  # NFS tells other hosts of locks on files that are written, alone
        is_free = lock is None or _take(lock)
    except OSError as error:
        raise UsageError(f"cannot write to {store}: {error.strerror or error}; choose another --output") from None
    with lock or nullcontext():
        if not is_free:
            raise UsageError(f"another prepare is writing to {store}; wait for it or choose another --output")
        if isinstance(store, Folder):
            _drop_drafts(store.root)
        yield


def _take(lock: IO[Any]) -> bool:
    """Take the lock, or find that another prepare has it; on storage without locks nobody is kept out."""
    try:
        return try_lock(lock.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return True


def _delete_unfinished(store: Store) -> None:
    """Delete what a finished data set does not need."""
    store.delete(PARTS)
    store.delete(_LOCK)


def _is_ours(name: str) -> bool:
    """Whether a name at the top is one of a data set, or a draft of one."""
    is_draft = name.endswith(PARTIAL) and name.lstrip(".").startswith(tuple(f"{own}." for own in _OURS))
    return name in _OURS or is_draft


def _drop_drafts(root: Path) -> None:
    """Delete what killed commands were writing; nobody else may be writing to the folder."""
    for folder in (root, root / PARTS, *(root / split for split in SPLITS)):
        for stale in folder.glob(f"*{PARTIAL}"):
            with suppress(OSError):  # a finished data set may be read-only
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def _read_card(store: Store, request: dict[str, Any]) -> dict[str, Any] | None:
    """The card of a finished data set; checks that what is there, finished or not, is of the same request."""
    found = _read_if_there(store, "card.json")
    before = found["request"] if found else _read_if_there(store, _REQUEST) or request
    differing = sorted(name for name in {*before, *request} if before.get(name) != request.get(name))
    if differing:
        told = ", ".join(_tell_difference(name, before.get(name), request.get(name)) for name in differing)
        raise UsageError(
            f"{store} was prepared with other settings: {told}; choose another --output or delete that folder"
        )
    return found


def _read_if_there(store: Store, name: str) -> dict[str, Any] | None:
    try:
        return read_json(store, name)
    except FileNotFoundError:
        return None
    except ValueError:
        raise RunError(
            f"{store}/{name} is damaged: delete that file and run the same command as before, or delete {store}"
        ) from None


def _tell_difference(name: str, before: Any, after: Any) -> str:
    if name == "content":
        return "another table, image root or salt"
    return f"{name}={json.dumps(before)}, not {json.dumps(after)}"


def _run_parts(
    config: PrepareConfig,
    table: Table,
    request: dict[str, Any],
    store: Store,
    map_tasks: MapTasks,
    on_progress: OnProgress | None,
) -> None:
    """Finish all parts."""
    done, size = read_parts(store, list_parts(store)), config.rows_per_task
    missing = sorted({*_number_parts(config, table)} - done.keys())
    _check_disk(config, len(missing) * size)
    _begin_parts(store, request)
    tasks = (Task(at, table.rows[at * size : (at + 1) * size], config.output, config) for at in missing)
    total = _add_parts(done)
    _report(on_progress, total, len(table.rows))
    for result in map_tasks(run_task, tasks, min(config.num_workers, len(missing)) if len(missing) > 1 else 1):
        total = add_results(total, result)
        _report(on_progress, total, len(table.rows))


def _number_parts(config: PrepareConfig, table: Table) -> range:
    return range(-(-len(table.rows) // config.rows_per_task))


def _add_parts(parts: dict[int, Part]) -> PartResult:
    return reduce(add_results, (part.result for part in parts.values()), NOTHING)


def _begin_parts(store: Store, request: dict[str, Any]) -> None:
    try:
        write_json(store, _REQUEST, request)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UsageError(f"cannot write to {store}: {error.strerror or error}; choose another --output") from None


def _report(on_progress: OnProgress | None, total: PartResult, rows: int) -> None:
    if on_progress:
        on_progress(total.rows, rows, sum(total.reasons.values()))


def estimate_bytes(config: PrepareConfig, rows: int) -> int:
    """Disk that so many rows take, rather too much than too little: 0.4 bytes a pixel of a 4:3 image, and the report.

    Source: ours.
    """
    return round(rows * (config.size_px**2 * 4 / 3 * 0.4 + 4096))


def _check_disk(config: PrepareConfig, rows: int) -> None:
    if "://" in config.output:
        return
    rows = min(rows, config.count) if config.source == "phantom" else rows
    free, need = shutil.disk_usage(config.output).free, estimate_bytes(config, rows)
    if need > free:
        raise RunError(
            f"too little disk at {config.output}: about {_gib(need)} needed, {_gib(free)} free; "
            "free some, choose another --output or a smaller size_px"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _describe(error: OSError, store: Store) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{error.filename or error} is gone: run the same command again, finished parts stay"
    if error.errno in FULL:
        return f"disk full at {store} ({error.strerror}): free some and run the same command again, finished parts stay"
    return f"cannot write to {store} ({error.strerror or error}): put that right and run the same command again"


def _merge_parts(config: PrepareConfig, table: Table, request: dict[str, Any], store: Store) -> dict[str, Any]:
    """Join the finished parts. Every step can be repeated; the card comes last: with it, all is there."""
    parts = read_parts(store, _number_parts(config, table))
    total = _add_parts(parts)
    if total.rows != len(table.rows):
        raise RunError(
            f"{total.rows} of {len(table.rows)} rows are accounted for, the unfinished parts are damaged: "
            "run the same command again, whole parts stay"
        )
    rejected = concat_tables(store, (name_table(part, "rejected") for part in parts), REJECTED_FILE, REJECTED)
    _check_any_kept(store, total)
    shards = _merge_shards(store, parts)
    kept = concat_tables(store, (name_table(part, "manifest") for part in parts), MANIFEST_FILE, MANIFEST)
    _merge_masks(store, parts)
    hashes = [info["raw_data"]["hashes"][HASHES[0]] for split in SPLITS for info in shards[split]]
    card = build_card(config, table, total, hashes, store)
    _check_merged(store, shards, card, kept + rejected)
    card["request"] = request
    card |= _check_protocol(config, store)
    if _read_if_there(store, _REQUEST) != request:  # object storage has no lock
        raise RunError(f"another prepare has been writing to {store}; delete it and prepare again, one at a time")
    card = write_card(store, card)
    _delete_unfinished(store)
    return card


def _check_protocol(config: PrepareConfig, store: Store) -> dict[str, Any]:
    """What the card says of the protocol. Raises RunError where its counts are not met."""
    if config.protocol is None:
        return {}
    return {"protocol": check_counts(read_protocol(config.protocol), store, config.allow_counts)}


def _merge_masks(store: Store, parts: dict[int, Part]) -> None:
    """Join the masks of the parts that have some; a data set without masks has no such file."""
    names = [name_table(number, "masks") for number, part in parts.items() if "masks" in part.tables]
    if names:
        concat_tables(store, names, MASKS_FILE, MASKS)


def _merge_shards(store: Store, parts: dict[int, Part]) -> dict[str, list[dict[str, Any]]]:
    """Write each split's index over the shards that the parts published. Returns its entries."""
    shards = {split: [info for part in parts.values() for info in part.shards[split]] for split in SPLITS}
    for split in SPLITS:
        write_index(store, split, shards[split])
    return shards


def _check_merged(store: Store, shards: dict[str, list[dict[str, Any]]], card: dict[str, Any], rows: int) -> None:
    """Raise RunError where the tables do not have each row of the input, or the shards not each image of the tables."""
    told = [(rows, card["counts"]["input"], "rows of the input are in the tables")]
    for split in SPLITS:
        samples = sum(info["samples"] for info in shards[split])
        told.append((samples, card["counts"][split]["images"], f"images of {split} are in the shards"))
    for found, expected, what in told:
        if found != expected:
            raise RunError(f"{found} of {expected} {what}: delete {store} and prepare again, one at a time")


def _check_any_kept(store: Store, total: PartResult) -> None:
    rows = total.rows
    if sum(total.reasons.values()) == rows:
        worst = sorted(total.reasons.items(), key=lambda item: -item[1])[:3]
        top = ", ".join(f"{reason} {count}" for reason, count in worst)
        store.delete(PARTS)  # so that a corrected command may use the folder
        raise RunError(f"all {rows} rows were rejected ({top}); {store}/{REJECTED_FILE} has the reason of each")
