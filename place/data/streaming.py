"""A prepared MDS split as a stream of model inputs, in an order that neither ranks nor loader workers change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import numpy as np
import torch

from place.compat import patch_torchvision
from place.config import DataConfig
from place.data.mixture import draw_samples, list_parts, read_intensity
from place.data.order import compute_steps, share_steps
from place.data.prepared import HASH
from place.data.report import hash_text
from place.data.shard_file import MappedShard
from place.data.tokens import ReportTokenizer, TokenizedReport
from place.data.transforms import eval_transform, read_image, train_transform
from place.distributed import Node, World
from place.kept import FULL

patch_torchvision()
from streaming import Stream, StreamingDataset  # noqa: E402
from streaming.base.constant import TICK  # noqa: E402
from streaming.base.dataset import _ShardState  # noqa: E402
from streaming.base.shared.memory import SharedMemory  # noqa: E402
from streaming.base.world import World as StreamingWorld  # noqa: E402

ONE_OF = ("findings", "impression")
"""What `data.sections=one` draws from."""
COLUMNS = ("image", "sentences", "report_group", "sample_id")
"""Of a stored sample, what training reads."""
MOST_MAPPED = 256
"""Shards a loader process holds open."""
FAILED, NO_ROOM = 1, 2
"""Why a shard could not be fetched or read."""
THREAD_FAILED = "a thread that fetches shards failed"


class Pair(NamedTuple):
    """One image-report pair as the collator takes it: image fp32 (1,Y,X) and the tokenised report."""

    image_CYX: Any
    report: TokenizedReport
    report_group: int
    sample_id: int


class ReportPairs(StreamingDataset):
    """A prepared split, decoded, augmented and tokenised in the loader's workers.

    Source: mosaicml-streaming for order, shards and hashes.
    """

    def __init__(
        self,
        data: DataConfig,
        split: str,
        tokenizer: ReportTokenizer,
        seed: int,
        batch_size: int,
        train: bool,
        cache: Path,
        world: World,
        node: Node,
    ):
        self.data, self.tokenizer, self.seed, self.train = data, tokenizer, seed, train
        self._world, self._node = world, node
        self._mapped: dict[int, MappedShard] = {}
        self._resumes: list[SharedMemory] = []
        self.mean, self.std = read_intensity(data)
        self.parts = list_parts(data, split, train)
        self.epoch = 0
        super().__init__(
            # A prepared folder is read as if it were far away: each shard is checked as it comes into the cache, and
            # nothing is ever written beside the data.
            streams=[
                Stream(remote=f"{part.path.rstrip('/')}/{split}", local=str(cache / split / str(number)))
                for number, part in enumerate(self.parts)
            ],
            batch_size=batch_size,
            shuffle=train,
            shuffle_algo="py1e",
            shuffle_seed=seed,
            shuffle_block_size=data.shuffle_block_size,
            num_canonical_nodes=data.num_canonical_nodes,
            predownload=data.predownload or 8 * batch_size,
            cache_limit=data.cache_limit,
            validate_hash=HASH,
        )
        # Shared with the loader's workers, as who reads them tells why an epoch ended.
        self._failed = torch.zeros(self.num_shards, dtype=torch.int8).share_memory_()
        if self.cache_limit:
            # Loader workers that fetch further ahead than the cache holds throw out each other's shards.
            fetching = node.size * max(1, data.num_workers)
            shards = self.cache_limit // self.max_shard_size_across_all_streams // fetching
            self.predownload = min(data.predownload or 8 * batch_size, max(1, shards - 1))

    @property
    def _unique_rank_world(self) -> StreamingWorld:
        """Whom streaming waits for and shares a cache with: this node, whatever the other nodes look like."""
        return StreamingWorld(1, self._node.size, 1, self._node.rank)

    @_unique_rank_world.setter
    def _unique_rank_world(self, detected: StreamingWorld) -> None:
        """streaming's own guess from the environment takes all nodes to be of one size."""

    def _get_work(self, epoch: int, sample_in_epoch: int) -> Any:
        # The one place where streaming tells a loader worker which epoch it works on; augmentation depends on it.
        self.epoch = epoch
        world, worker = self._world, self._unique_worker_world
        steps_KG = compute_steps(
            draw_samples(self.parts, self.seed, epoch if self.train else 0),
            np.repeat(np.arange(self.num_shards), self.samples_per_shard),
            self.data.num_canonical_nodes,
            self.batch_size * world.world,
            sample_in_epoch,
            (self.seed, epoch, self.data.shuffle_block_size) if self.train else None,
        )
        return share_steps(steps_KG, world.rank, world.world, worker.worker_of_rank, worker.workers_per_rank)

    def __getitem__(self, at: int | slice | list[int] | np.ndarray) -> Any:
        sample = super().__getitem__(at)
        return self._build_pair(sample) if isinstance(sample, dict) else sample

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            self._failed[shard_id] = NO_ROOM if isinstance(error, OSError) and error.errno in FULL else FAILED
            # streaming leaves a shard that fails as 'preparing', and the other loader workers would wait for it for
            # ever. Called 'local', it makes them try, and meet the same failure.
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        # streaming ends without a word when one of its threads fails: a loader goes on with its other workers' batches.
        if self._event.is_set():
            raise RuntimeError(THREAD_FAILED)

    @property
    def is_out_of_room(self) -> bool:
        """Whether a shard did not fit onto the disk of the cache."""
        return bool((self._failed == NO_ROOM).any())

    def list_failed(self) -> list[tuple[str, int]]:
        """The shards that could not be fetched or read: path of the data set, and number in its split."""
        shards = np.flatnonzero(self._failed.numpy())
        numbers = shards - self.shard_offset_per_stream[self.stream_per_shard[shards]]
        return [(self.parts[stream].path, number) for stream, number in zip(self.stream_per_shard[shards], numbers)]

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        # Opening a file and parsing every column takes streaming a tenth of the time of a sample.
        number, at = self.spanner[sample_id]
        if number not in self._mapped:
            if self.cache_limit or len(self._mapped) == MOST_MAPPED:
                return super().get_item(sample_id, retry)
            super().get_item(sample_id, retry)  # it is in the cache now
            shard = self.shards[number]
            path = Path(shard.dirname, shard.split, shard.raw_data.basename)
            self._mapped[number] = MappedShard(path, shard.column_names, shard.column_encodings, shard.column_sizes)
        return self._mapped[number].read(at, COLUMNS)

    def _prepare_thread(self, it: Any) -> None:
        _leave_loudly(self._fetch, it)

    def _ready_thread(self, it: Any) -> None:
        _leave_loudly(self._follow, it)

    def _list_needs(self, it: Any) -> Iterator[tuple[int, int]]:
        """Where an epoch first needs a shard, once fewer than `predownload` samples are before it, and which shard.

        streaming asks, and takes a file lock, for each sample. Where a cache limit may throw a shard out, so do we.
        """
        shards = np.searchsorted(self.sample_offset_per_shard, it.sample_ids, side="right") - 1
        firsts = np.arange(it.total) if self.cache_limit else np.sort(np.unique(shards, return_index=True)[1])
        for first in firsts.tolist():
            while self.predownload < first - it.yield_index and not self._must_stop(it):
                sleep(TICK)
            if self._must_stop(it):
                return
            yield first, int(shards[first])

    def _must_stop(self, it: Any) -> bool:
        return it.should_exit() or self._event.is_set()

    def _fetch(self, it: Any) -> None:
        for _, shard in self._list_needs(it):
            if self._shard_states[shard] != _ShardState.LOCAL:
                self.prepare_shard(shard, blocking=False)
        it.on_exit()

    def _follow(self, it: Any) -> None:
        # streaming's own waits for ever for a shard that the cache limit throws out again while it waits.
        for first, shard in self._list_needs(it):
            it.ready_index = first
            while (state := self._shard_states[shard]) != _ShardState.LOCAL and not self._must_stop(it):
                if state == _ShardState.REMOTE:
                    self.prepare_shard(shard, blocking=False)
                else:
                    sleep(TICK)
        if not self._must_stop(it):
            it.ready_index = it.total
        it.on_exit()

    def on_exception(self, future: Future) -> None:
        # streaming raises in here, which prints a traceback; the loader names a damaged shard or a full disk in a line.
        if isinstance(future.exception(), ValueError | FileNotFoundError) or self.is_out_of_room:
            self._event.set()
        else:
            super().on_exception(future)

    def start_at(self, epoch: int, sample_in_epoch: int) -> None:
        """Make the next iteration begin there; call it on every rank."""
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": sample_in_epoch,
                "num_canonical_nodes": self.data.num_canonical_nodes,
                "shuffle_seed": self.seed,
            }
        )
        # streaming forgets the one before, which made the memory and frees its name at the end of the process.
        self._resumes.append(self._resume_shm)

    def list_shared(self) -> list[SharedMemory]:
        """All shared memory that this process made or opened for it."""
        return [*_list_shared(self), *self._resumes]

    def _build_pair(self, sample: dict[str, Any]) -> Pair:
        image_YX, size = read_image(sample["image"]), self.data.image_size_px
        rng = np.random.default_rng([self.seed, self.epoch, sample["sample_id"]])
        if self.train:
            image_CYX = train_transform(image_YX, size, self.mean, self.std, self.data.augment, rng)
        else:
            image_CYX = eval_transform(image_YX, size, self.mean, self.std)
        sections: str = self.data.sections
        if self.train and sections == "one":
            sections = ONE_OF[int(rng.integers(len(ONE_OF)))]
        sentences, group = read_report(sample, sections)
        if self.train and self.data.shuffle_sentences:
            rng.shuffle(sentences)
        return Pair(image_CYX, self.tokenizer.encode(sentences), group, sample["sample_id"])


def _leave_loudly(thread: Callable[[Any], None], it: Any) -> None:
    """Run a thread of streaming; one that fails is counted out, or the end of the epoch would wait for it for ever."""
    try:
        thread(it)
    except Exception:
        it.on_exit()
        raise


def read_report(sample: dict[str, Any], sections: str) -> tuple[list[str], int]:
    """Sentences of a sample that the model reads, and the group of reports that read alike.

    Where the model reads only one section, that section decides: two reports with one impression are one group.
    """
    sentences = select_sentences(sample["sentences"], sections)
    return sentences, sample["report_group"] if sections == "all" else hash_text(" ".join(sentences))


def select_sentences(sentences: list[dict[str, str]], sections: str) -> list[str]:
    """Texts of the wanted sections, of `one` the findings; a report without them keeps all of its sentences."""
    sections = ONE_OF[0] if sections == "one" else sections
    wanted = [item["text"] for item in sentences if sections in ("all", item["section"])]
    return wanted or [item["text"] for item in sentences]


def _list_shared(holder: object) -> Iterator[SharedMemory]:
    """Shared memory that a data set of streaming holds, itself or in arrays, scalars and barriers of its own."""
    for value in vars(holder).values():
        if isinstance(value, SharedMemory):
            yield value
        elif type(value).__module__.startswith("streaming.base.shared"):
            yield from _list_shared(value)
