"""Batches on their way to the device, beside the step before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from place.batch import ON_HOST, Batch


class Sent(NamedTuple):
    """A batch on the device, and the end of its copy where that runs on a stream of its own."""

    batch: Batch
    arrival: torch.cuda.Event | None

    def receive(self) -> Batch:
        """The batch; what the device is asked for from here on waits for its copy, the host does not."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.batch.image_BCYX.device)
            stream.wait_event(self.arrival)
            for name, tensor in self.batch._asdict().items():
                if name not in ON_HOST:
                    # Or its memory, which belongs to the stream of copies, would be written while a kernel reads it.
                    tensor.record_stream(stream)
        return self.batch


def send_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Sent]:
    """The same batches on the device. On a GPU one more is fetched, and its copy begun, before a batch is handed out:
    the copy runs beside the step before, also where that makes the host wait. On a CPU nothing happens ahead.

    Args:
        batches: in pinned memory, or the host waits for each copy.
    """
    if device.type != "cuda":
        for batch in batches:
            yield Sent(batch.to(device), None)
        return
    stream = torch.cuda.Stream(device)

    def send(batch: Batch | None) -> Sent | None:
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            copied = batch.to(device)
            arrival = torch.cuda.Event()
            arrival.record()
        return Sent(copied, arrival)

    coming = send(next(batches, None))
    while (sent := coming) is not None:
        coming = send(next(batches, None))
        yield sent
