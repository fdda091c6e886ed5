"""What a fault is called: the rank that was the cause, and its host."""

from __future__ import annotations

import pytest
from place.cluster.launch import describe_fault

HOSTS = ["h1", "h2", "h3"]
DEAD = RuntimeError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR\nMore.")
RESET = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [10.0.0.3]:1: Connection reset by peer. Typically")


class Failed(Exception):
    """As Ray Train's WorkerGroupError: errors by rank."""

    def __init__(self, worker_failures: dict[int, BaseException]):
        super().__init__("failed")
        self.worker_failures = worker_failures


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        ({0: RESET, 1: DEAD, 2: RESET}, "1 of 3 workers failed: rank 1 on h2 died"),
        ({0: RESET, 1: RESET}, "1 of 3 workers failed: rank 2 on h3 is not heard of any more"),
        ({2: RuntimeError("it died since its node has died. Id 7")}, "rank 2 on h3 died with its host"),
        ({1: ValueError("a\nb: bad")}, "1 of 3 workers failed: rank 1 on h2 said: b: bad"),
        ({0: RESET, 1: RESET, 2: RESET}, "3 of 3 workers failed: rank 0 on h1 lost the connection to another rank"),
    ],
)
def test_the_cause_of_a_fault_is_named_and_not_its_consequences(failures: dict, line: str) -> None:
    assert line in describe_fault(Failed(failures), HOSTS)


def test_workers_that_did_not_start_say_why() -> None:
    assert describe_fault(RuntimeError("no\nroom"), HOSTS) == "workers did not start: room"
