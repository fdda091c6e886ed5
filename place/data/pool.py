"""Maps tasks over the processes of this machine; `place.cluster` brings a map over Ray with the same signature."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_connection
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_processes(function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int) -> Iterator[Result]:
    """Yield results as they come, in any order; no more jobs are read than are under way or next.

    Args:
        function: importable by name.
        jobs: read lazily.
        num_workers: processes; 1 works in this one, 0 takes one a core.
    Source: ours.
    """
    num_workers = num_workers or count_cores()
    if num_workers == 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    # The slow imports happen once, in the server that the workers are forked from. None of ours: the server does not
    # get this process's sys.path, and might find another copy.
    context.set_forkserver_preload(
        ["torch", "pandas", "pyarrow.parquet", "pydicom.pixels", "sklearn.metrics", "transformers"]
    )
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield from _drain(pool, function, iter(jobs), 2 * num_workers)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _drain(
    pool: ProcessPoolExecutor, function: Callable[[Job], Result], jobs: Iterator[Job], ahead: int
) -> Iterator[Result]:
    running: set[Future[Result]] = {pool.submit(function, job) for job in itertools.islice(jobs, ahead)}
    while running:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        running |= {pool.submit(function, job) for job in itertools.islice(jobs, len(finished))}
        for future in finished:
            yield future.result()


def _end_with_parent() -> None:
    """Without this, workers wait for ever for tasks of a process that was killed and each has a traceback at Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        wait_connection([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
