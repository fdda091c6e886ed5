"""Spreads the tasks of `place prepare` over Ray: one started here, or a cluster whose hosts see the same output."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import place
from place.config import RunError, UsageError
from place.data.pool import count_cores

Job = TypeVar("Job")
Result = TypeVar("Result")

OBJECT_STORE_BYTES = 256 << 20
"""Tasks and results are small; Ray would take a third of the memory."""
RETRIES = 3
"""Times that a task whose worker or host died is tried again elsewhere."""
_CARRIED = ("S3_ENDPOINT_URL", "AWS_")
"""What of the environment workers on other hosts are told: how to reach the output."""


def map_over_ray(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int, address: str | None = None
) -> Iterator[Result]:
    """Yield results as they come, in any order; no more jobs are read than are under way.

    Args:
        function: importable by name on every host.
        jobs: read lazily.
        num_workers: processes; 0 takes one a core of all hosts.
        address: a Ray cluster; none takes RAY_ADDRESS, or starts a Ray on this host for as long as this runs.
    Raises:
        UsageError: no Ray at the address.
        RunError: workers died more than `RETRIES` times over one job.
    Source: ours.
    """
    import ray

    started = start_ray(address, num_workers)
    try:
        carried = {name: value for name, value in os.environ.items() if name.startswith(_CARRIED)}
        run = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(_run)
        yield from _drain(lambda job: run.remote(function, job, carried), iter(jobs), num_workers)
    finally:
        if started:
            ray.shutdown()


def start_ray(address: str | None, num_workers: int) -> bool:
    """Connect to `address` or RAY_ADDRESS, or start a Ray of our own on this host. Returns whether there was none yet.

    Raises:
        UsageError: no Ray at the address.
    Source: ours.
    """
    import ray

    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS")
    own = {
        "num_cpus": num_workers or count_cores(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    try:
        # `local`, or Ray would join whatever cluster was last started on this host.
        with _at_home():
            ray.init(address=address or "local", log_to_driver=False, logging_level="error", **({} if address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no Ray at {address or 'this host'} ({str(error).splitlines()[0]}); give the --address of a running "
            "cluster, or --launcher local to do without"
        ) from None
    return True


@contextmanager
def _at_home() -> Iterator[None]:
    """Ray's workers look for packages first where Ray was started; so that they find this PLACE, and no other."""
    before = os.getcwd()
    os.chdir(Path(place.__file__).parents[1])
    try:
        yield
    finally:
        os.chdir(before)


def _run(function: Callable[[Job], Result], job: Job, environment: dict[str, str]) -> Result:
    os.environ.update(environment)
    return function(job)


def _drain(submit: Callable[[Any], Any], jobs: Iterator[Any], num_workers: int) -> Iterator[Any]:
    import ray

    running: list[Any] = []
    while True:
        # Asked each time: hosts come and go.
        limit = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        running += [submit(job) for job in itertools.islice(jobs, max(0, limit - len(running)))]
        if not running:
            return
        finished, running = ray.wait(running, num_returns=1)
        yield from map(_get, finished)


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
            raise RunError(
                f"a worker cannot begin ({str(error.cause).splitlines()[0]}); every host needs the same PLACE, "
                "installed or by `ray job submit --working-dir`"
            ) from None
        raise error.cause from None  # what the function raised, without Ray's wrapping
    except ray.exceptions.RayError as error:
        raise RunError(
            f"workers died {RETRIES + 1} times over one task ({type(error).__name__}), perhaps for lack of memory; "
            "run the same command again to continue, with fewer workers"
        ) from None
