"""Batches for one training process, from any step of any epoch."""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import os
import random
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import parent_process, resource_tracker
from pathlib import Path

import cv2
import torch
from torch.utils.data import DataLoader, default_collate

from place.batch import Batch
from place.config import DataConfig, PassingError, RunError, UsageError
from place.data.mixture import find_fault
from place.data.streaming import THREAD_FAILED, Pair, ReportPairs
from place.data.tokens import ReportTokenizer
from place.distributed import Node, gather_objects, read_node, read_world
from place.kept import try_lock

_PR_SET_PDEATHSIG = 1
"""Of prctl: the signal that the kernel sends a process whose parent dies."""
AHEAD = 2
"""Batches that are taken over from the loader's workers while another trains."""


class PairLoader:
    """This rank's share of each global batch of a split. Final."""

    def __init__(
        self,
        data: DataConfig,
        split: str,
        tokenizer: ReportTokenizer,
        *,
        seed: int,
        local_batch: int,
        num_patches: int,
        train: bool,
        cache: Path,
    ):
        """Raises UsageError where the cache limit does not hold a few shards."""
        self.data, self.split, self.cache = data, split, cache
        # Here and not in the loader's workers: OpenCV's threads do not survive a fork, asking for one less would hang.
        cv2.setNumThreads(1)
        world, node = read_world(), read_node()
        try:
            with _alone_on_node(node):
                self.dataset = ReportPairs(data, split, tokenizer, seed, local_batch, train, cache, world, node)
        except ValueError as error:
            if "cache" not in str(error).lower() or not data.cache_limit:
                raise
            raise UsageError(f"data.cache_limit={data.cache_limit}: {error}") from None
        self.loader: DataLoader[Batch] = DataLoader(
            self.dataset,
            batch_size=local_batch,
            num_workers=data.num_workers,
            collate_fn=Collate(tokenizer, num_patches),
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=data.prefetch_batches if data.num_workers else None,
            persistent_workers=data.num_workers > 0,
            worker_init_fn=_start_worker if data.num_workers else None,
        )

    def read_steps(self, first_step: int, last_step: int, steps_per_epoch: int, world: int) -> Iterator[Batch]:
        """Batches of steps [first_step, last_step), counted over all epochs.

        The next batches are taken over, and the next epoch is begun, while the caller trains. Without loader workers
        nothing happens ahead: the caller's own process reads.

        Raises:
            RunError: as `read_epoch`.
        """
        batches = self._read_epochs(first_step, last_step, steps_per_epoch, world)
        return _read_ahead(batches, AHEAD) if self.data.num_workers else batches

    def _read_epochs(self, step: int, last_step: int, steps_per_epoch: int, world: int) -> Iterator[Batch]:
        while step < last_step:
            epoch, first = divmod(step, steps_per_epoch)
            last = min(steps_per_epoch, last_step - epoch * steps_per_epoch)
            yield from self.read_epoch(epoch, first, last, world)
            step += last - first

    def read_epoch(self, epoch: int, first_step: int, last_step: int, world: int) -> Iterator[Batch]:
        """Batches [first_step, last_step) of an epoch.

        Raises:
            RunError: a shard is damaged or missing, or its disk is full; the line names it. PassingError: one cannot be
                read now.
        """
        global_batch = world * (self.loader.batch_size or 1)
        self.dataset.start_at(epoch, first_step * global_batch)
        steps = first_step
        try:
            for batch in islice(self.loader, last_step - first_step):
                yield batch
                steps += 1
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, RunError):
                raise
            self._raise_fault(error)
            if THREAD_FAILED not in str(error):
                raise
        if steps < last_step:
            where = f"at step {steps} of {last_step} of epoch {epoch}"
            raise PassingError(f"split '{self.split}' ended {where}; start the run again")

    def _raise_fault(self, error: Exception) -> None:
        """Name the shard at fault, or the disk, if one is."""
        for path, number in self.dataset.list_failed():
            if fault := find_fault(path, self.split, number):
                raise RunError(f"{fault}; prepare the data set again or copy the shard anew") from error
        if self.dataset.is_out_of_room:
            raise RunError(
                f"no room for the next shard of '{self.split}' at {self.cache.parent} on {socket.gethostname()}; make "
                "room, choose another data.cache_dir, or set data.cache_limit"
            ) from error
        if "thrashing" in str(error):
            raise RunError(
                f"data.cache_limit={self.data.cache_limit} is too small: shards are thrown out before they are read; "
                "raise it, or lower data.predownload or data.num_workers"
            ) from error

    @property
    def shm_prefix(self) -> str:
        """Start of the names of the shared memory that streaming holds for this loader."""
        return f"{self.dataset._shm_prefix_int:06d}_"

    def close(self) -> None:
        """Free the names of the shared memory that this process made, once and for all.

        streaming frees them at the end of the process: by then they may be those of another run on this host. What is
        mapped stays so, for threads of streaming may still write to it.
        """
        held = self.dataset.list_shared()
        for shared in held:
            atexit.unregister(shared.cleanup)
        segments = {segment.name: segment for shared in held for segment in shared.created_shms}
        for lock in Path(tempfile.gettempdir()).glob(f"{self.shm_prefix}*_filelock") if segments else ():
            lock.unlink(missing_ok=True)
        mark = f"{self.shm_prefix}locals"
        # Whoever made the mark also frees what another rank made and was killed before it could.
        for path in Path("/dev/shm").glob(f"{self.shm_prefix}*") if mark in segments else ():
            if path.name not in segments:
                path.unlink(missing_ok=True)
        # While the mark is there nobody takes the names.
        for name in sorted(segments, key=lambda name: name == mark):
            try:
                segments[name].unlink()
            except FileNotFoundError:  # the rank that made the mark was first
                resource_tracker.unregister(f"/{name}", "shared_memory")


def _read_ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same batches, `depth` of them fetched by a thread before they are asked for."""

    def take(_: Batch | None) -> Batch | None:
        return next(batches, None)

    cuda = torch.cuda.is_available()
    # A new thread is on GPU 0, and memory would be pinned from there.
    start = (torch.cuda.set_device, (torch.cuda.current_device(),)) if cuda else (None, ())
    pool = ThreadPoolExecutor(1, "place-loader", *start)
    # Unmapping the shared memory of a batch takes 2 ms: the thread holds it last, once the caller has let go.
    spent: deque[Batch | None] = deque([None, None])
    try:
        # The first by this thread: loader workers that the pool's thread forked could not leave in peace.
        batch = take(None)
        # One fewer: the loop asks for another before it hands a batch out.
        ahead = deque(pool.submit(take, None) for _ in range(depth - 1))
        while batch is not None:
            spent.append(batch)
            ahead.append(pool.submit(take, spent.popleft()))
            yield batch
            batch = ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _alone_on_node(node: Node) -> Iterator[None]:
    """Hold the shared memory of all nodes while streaming picks names in it: two runs starting at once would clash.

    All or none, and again after a while: a run that kept its one node while it waits for another could wait for ever
    for a run that does the same. The lock is on the folder itself: temporary folders, where a lock file would be,
    differ between runs.
    """
    folder = os.open("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir(), os.O_RDONLY)
    try:
        while not _lock_all(folder, node):
            # Not of the seeds of a run, which two may share.
            time.sleep(random.SystemRandom().uniform(0.05, 0.5))
        yield
    finally:
        os.close(folder)


def _lock_all(folder: int, node: Node) -> bool:
    """Try to lock the folder on every node: a collective call, which locks none where one is taken."""
    is_free = not node.is_first or try_lock(folder)
    if all(answer["is_free"] for answer in gather_objects({"is_free": is_free})):
        return True
    fcntl.flock(folder, fcntl.LOCK_UN)
    return False


class Collate:
    """Pairs to a Batch; every patch of a square image is valid. Final."""

    def __init__(self, tokenizer: ReportTokenizer, num_patches: int):
        self.tokenizer, self.num_patches = tokenizer, num_patches

    def __call__(self, pairs: list[Pair]) -> Batch:
        ids_BT, attention_BT, owner_BT, hash_BS = self.tokenizer.collate([pair.report for pair in pairs])
        return Batch(
            # Into shared memory where this is a loader worker; a plain stack would be copied once more.
            default_collate([pair.image_CYX for pair in pairs]),
            ids_BT,
            attention_BT,
            owner_BT,
            hash_BS,
            torch.tensor([pair.report_group for pair in pairs]),
            torch.tensor([pair.sample_id for pair in pairs]),
            torch.ones(len(pairs), self.num_patches, dtype=torch.bool),
            attention_BT.sum(1),
            (hash_BS != 0).sum(1),
        )


def _start_worker(_: int) -> None:
    # torchrun sends SIGTERM to a rank's process group: without its loader the rank could not end its step.
    os.setpgid(0, 0)
    # A killed rank leaves none behind: streaming would wait in it for ever for a shard that nobody brings.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = parent_process()
    if rank is None or not rank.is_alive():
        os._exit(1)
    torch.set_num_threads(1)
