"""Batches on their way to the device: in order, not ahead on a CPU, beside the step before on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import build_batch

from place.batch import Batch
from place.training.transfer import send_ahead


def read(batches: list[Batch], taken: list[int]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        taken.append(number)
        yield batch


def test_on_a_cpu_batches_come_as_they_are_and_none_is_fetched_ahead() -> None:
    batches, taken = [build_batch(4, seed) for seed in range(3)], []
    for number, sent in enumerate(send_ahead(read(batches, taken), torch.device("cpu"))):
        assert taken == list(range(number + 1))
        assert all(map(torch.equal, sent.receive(), batches[number]))
    assert taken == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_ends_while_the_step_before_still_runs_and_is_read_after_it_ended() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batches, taken = [build_batch(64, seed) for seed in range(4)], []
    pinned = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in batches]
    sums: list[torch.Tensor] = []
    step_end: torch.cuda.Event | None = None
    for number, sent in enumerate(send_ahead(read(pinned, taken), device)):
        assert taken == list(range(min(number + 2, 4)))
        batch = sent.receive()
        assert sent.arrival is not None
        if step_end is not None:
            sent.arrival.synchronize()
            assert not step_end.query()
        torch.cuda._sleep(1_000_000_000)  # cycles, about half a second
        sums.append(batch.image_BCYX.double().sum())
        del batch, sent  # whose memory the next copy but one may take
        step_end = torch.cuda.Event()
        step_end.record()
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack([b.image_BCYX.double().sum() for b in batches]))
