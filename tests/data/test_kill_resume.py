"""Ranks that are killed in the middle of an epoch, and others, of another number, that go on: each sample once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from place.config import DataConfig
from place.data.loader import PairLoader
from place.data.prepared import read_samples
from place.data.tokens import ReportTokenizer, train_tokenizer
from place.distributed import gather, read_node
from place.node import clean_node, note_shared_memory
from place.runlog import read_jsonl

GLOBAL_BATCH, KILLS, EPOCHS = 12, 20, 2


STUCK = """
import os, time
from torch.utils.data import DataLoader, IterableDataset
from place.data.loader import _start_worker

class Stuck(IterableDataset):
    def __iter__(self):
        yield os.getpid()
        time.sleep(600)

for pid in DataLoader(Stuck(), batch_size=None, num_workers=1, worker_init_fn=_start_worker):
    print(int(pid), flush=True)
"""


class Attempt(NamedTuple):
    """A start of the ranks: where it begins and the step behind which one of them is killed (0: none is)."""

    number: int
    world: int
    first_step: int
    killed_at: int
    num_workers: int


def draw_attempts(total_steps: int, seed: int) -> list[Attempt]:
    """Twenty kills at random steps of random worlds; the newest checkpoint is of any step since the last one."""
    rng = np.random.default_rng(seed)
    attempts: list[Attempt] = []
    saved = 0
    for number in range(KILLS):
        killed_at = min(total_steps, saved + int(rng.integers(1, 5)))
        attempts.append(Attempt(number, int(rng.integers(1, 5)), saved, killed_at, int(rng.choice([0, 0, 1, 2]))))
        saved = min(int(rng.integers(saved, killed_at + 1)), total_steps - 1)
    return [*attempts, Attempt(KILLS, int(rng.integers(1, 5)), saved, 0, 1)]


def run_attempts(attempts: list[Attempt], run_dir: Path, data_dir: str, tokenizer: str, steps_per_epoch: int) -> None:
    """In a process of its own, which ranks are forked from: starting Python for each would take minutes."""
    torch.set_num_threads(1)
    loaded = ReportTokenizer.load(tokenizer)
    context = multiprocessing.get_context("fork")
    for attempt in attempts:
        ranks = [
            context.Process(target=run_rank, args=(attempt, rank, run_dir, data_dir, loaded, steps_per_epoch))
            for rank in range(attempt.world)
        ]
        for process in ranks:
            process.start()
        victim = ranks[attempt.number % attempt.world]
        victim.join()
        assert victim.exitcode == (-signal.SIGKILL if attempt.killed_at else 0)
        for process in ranks:
            if attempt.killed_at and process is not victim:
                with suppress(ProcessLookupError):  # it may have died of the victim's silence already
                    os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        clean_node(run_dir)


def run_rank(
    attempt: Attempt, rank: int, run_dir: Path, data_dir: str, tokenizer: ReportTokenizer, steps_per_epoch: int
) -> None:
    """What a rank does with its batches here: it writes down which samples the world saw."""
    os.setpgrp()
    # The launcher calls every rank a node of its own, which they are not.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(attempt.world), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    meeting = f"file://{run_dir}/group.{attempt.number}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=attempt.world)
    loader = PairLoader(
        DataConfig(path=data_dir, image_size_px=32, num_canonical_nodes=4, num_workers=attempt.num_workers),
        "train",
        tokenizer,
        seed=7,
        local_batch=GLOBAL_BATCH // attempt.world,
        num_patches=16,
        train=True,
        cache=run_dir / f"cache.{attempt.number}",
    )
    if read_node().is_first:
        note_shared_memory(run_dir, [loader.shm_prefix])
    batches = loader.read_steps(attempt.first_step, EPOCHS * steps_per_epoch, steps_per_epoch, attempt.world)
    for step, batch in enumerate(batches, start=attempt.first_step + 1):
        ids = gather(batch.sample_id_B).tolist()
        if step == attempt.first_step + 1:
            children = [{"pid": child.pid} for child in multiprocessing.active_children()]
            (run_dir / f"loader.{attempt.number}.{rank}.json").write_text(json.dumps(children))
        if rank == 0:
            with (run_dir / "samples.jsonl").open("a") as file:
                file.write(json.dumps({"attempt": attempt.number, "step": step, "ids": ids}) + "\n")
        dist.barrier()
        if step == attempt.killed_at and rank == attempt.number % attempt.world:
            os.killpg(0, signal.SIGKILL)
    dist.barrier()
    dist.destroy_process_group()


def list_mapped() -> set[str]:
    """Shared memory that a process still uses: of another run on this machine, where no reader of ours is left."""
    found = set[str]()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            found |= {Path(line.split()[-1]).name for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return found


@pytest.mark.multiprocess
def test_killed_at_twenty_random_steps_on_random_worlds_every_epoch_holds_every_sample_once(
    prepared: Path, tmp_path: Path
) -> None:
    texts = (item["text"] for sample in read_samples(prepared, "train") for item in sample["sentences"])
    train_tokenizer(texts, 300, 80, 8).save(tmp_path / "tokenizer")
    samples = {sample["sample_id"] for sample in read_samples(prepared, "train")}
    steps_per_epoch = len(samples) // GLOBAL_BATCH
    attempts = draw_attempts(EPOCHS * steps_per_epoch, seed=3)
    before = set(os.listdir("/dev/shm"))
    driver = multiprocessing.get_context("spawn").Process(
        target=run_attempts, args=(attempts, tmp_path, str(prepared), str(tmp_path / "tokenizer"), steps_per_epoch)
    )
    driver.start()
    driver.join()
    assert driver.exitcode == 0
    records = list(read_jsonl(tmp_path / "samples.jsonl"))
    assert {record["attempt"] for record in records} == set(range(KILLS + 1))
    assert {attempt.world for attempt in attempts} == {1, 2, 3, 4}
    lineage = {record["step"]: record["ids"] for record in records}
    assert sorted(lineage) == list(range(1, EPOCHS * steps_per_epoch + 1))
    assert all(lineage[record["step"]] == record["ids"] for record in records), "a step done again saw other samples"
    for epoch in range(EPOCHS):
        steps = range(epoch * steps_per_epoch + 1, (epoch + 1) * steps_per_epoch + 1)
        seen = Counter(sample for step in steps for sample in lineage[step])
        assert set(seen) <= samples
        assert set(seen.values()) == {1}
        assert len(seen) == steps_per_epoch * GLOBAL_BATCH
    readers = [reader["pid"] for path in tmp_path.glob("loader.*.json") for reader in json.loads(path.read_text())]
    assert len(readers) > 20
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in readers if psutil.pid_exists(pid)], timeout=10)
    assert not alive, "loader workers of killed ranks are left"
    ours = {name for name in set(os.listdir("/dev/shm")) - before if name[:6].isdigit()}
    assert not ours - list_mapped(), "shared memory of killed ranks is left"


def test_a_loader_worker_that_waits_for_ever_ends_with_its_killed_rank() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        reader = psutil.Process(int(rank.stdout.readline()))
        rank.kill()
    _, alive = psutil.wait_procs([reader], timeout=10)
    for process in alive:
        process.kill()
    assert not alive
