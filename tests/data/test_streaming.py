"""Streamed pairs: the same global batches for any ranks and loader workers, exact resume, and damage that is named."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from spawn import can_leave_machine, join_machine, run_ranks

from place.batch import Batch
from place.config import DataConfig, PassingError, RunError, UsageError
from place.data import loader as loader_module
from place.data.loader import PairLoader, _alone_on_node
from place.data.mixture import find_fault
from place.data.prepared import count_samples, list_splits, read_card, read_samples
from place.data.report import hash_text
from place.data.shards import COLUMNS
from place.data.streaming import select_sentences
from place.data.tokens import ReportTokenizer, train_tokenizer
from place.distributed import Node, barrier, broadcast_text, read_world
from place.model.projection import mean_by_sentence

GLOBAL_BATCH, STEPS = 24, 5
Step = dict[int, tuple[float, int]]


def build_data(path: Path, num_workers: int = 0) -> DataConfig:
    return DataConfig(
        path=str(path), image_size_px=32, num_canonical_nodes=2, num_workers=num_workers, shuffle_sentences=True
    )


def read_steps(
    path: str, tokenizer: str, num_workers: int, epoch: int, first: int, last: int, train: bool = True
) -> list:
    """What this rank gets of some steps: ids, and what augmentation made of image and report."""
    world = read_world()
    # One a machine: the name is the same everywhere, the folder for temporary files need not be.
    cache = Path(tempfile.gettempdir()) / Path(broadcast_text(tempfile.mkdtemp()) or "").name
    loader = PairLoader(
        build_data(Path(path), num_workers),
        "train" if train else "val",
        ReportTokenizer.load(tokenizer),
        seed=3,
        local_batch=GLOBAL_BATCH // world.world,
        num_patches=16,
        train=train,
        cache=cache,
    )
    steps = []
    begin = epoch * STEPS
    for batch in loader.read_steps(begin + first, begin + last, STEPS, world.world):
        assert batch.image_BCYX.shape == (GLOBAL_BATCH // world.world, 1, 32, 32)
        looks = batch.image_BCYX.double().flatten(1) @ torch.linspace(1, 2, 1024, dtype=torch.double)
        places = torch.arange(1, batch.token_ids_BT.shape[1] + 1)
        words = (batch.token_ids_BT * batch.attention_BT * places).sum(1)
        steps.append({"ids": batch.sample_id_B, "looks": looks, "words": words})
    barrier()
    shutil.rmtree(cache, ignore_errors=True)
    return steps


def read_cases(path: str, tokenizer: str) -> dict[str, Any]:
    """All that two ranks are asked for, in one start of the processes."""
    return {
        "whole": read_steps(path, tokenizer, 0, 1, 0, STEPS),
        "workers": read_steps(path, tokenizer, 2, 1, 0, STEPS),
        "resumed": read_steps(path, tokenizer, 0, 1, 2, STEPS),
    }


def join(ranks: list[list[dict]]) -> list[Step]:
    """Global batches: for each step what was made of each sample."""
    steps = []
    for parts in zip(*ranks, strict=True):
        step: Step = {}
        for part in parts:
            assert not step.keys() & set(part["ids"].tolist())
            step |= dict(zip(part["ids"].tolist(), zip(part["looks"].tolist(), part["words"].tolist())))
        steps.append(step)
    return steps


@pytest.fixture(scope="module")
def tokenizer(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (item["text"] for sample in read_samples(prepared, "train") for item in sample["sentences"])
    train_tokenizer(texts, 300, 160, 16).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def single(prepared: Path, tokenizer: str) -> list[Step]:
    """One process without loader workers: the order that all others must show."""
    return join([read_steps(str(prepared), tokenizer, 0, 1, 0, STEPS)])


@pytest.fixture(scope="module")
def double(prepared: Path, tokenizer: str) -> dict[str, list[Step]]:
    ranks = run_ranks(read_cases, 2, str(prepared), tokenizer)
    return {name: join([rank[name] for rank in ranks]) for name in ranks[0]}


def start_on_both(folder: str, first: int) -> bool:
    """One rank of a run on two nodes, which comes to node `first` a little earlier than to the other."""
    signal.alarm(40)  # a deadlock ends this process
    rank, root = read_world().rank, Path(folder)
    join_machine(root / f"node{rank}")
    (root / f"ready{first}{rank}").touch()
    while len(list(root.glob("ready*"))) < 4:
        time.sleep(0.01)
    time.sleep(0.0 if rank == first else 0.5)
    with _alone_on_node(Node(0, 1, rank)):
        taken = Path("/dev/shm/taken")
        taken.touch(exist_ok=False)
        time.sleep(0.2)
        taken.unlink()
    signal.alarm(0)
    return True


def test_two_runs_that_start_together_on_the_same_nodes_take_turns(tmp_path: Path) -> None:
    if not can_leave_machine():
        pytest.skip("no mount namespaces here")
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_ranks, start_on_both, 2, str(tmp_path), first) for first in range(2)]
        assert [run.result() for run in runs] == [[True, True]] * 2


def test_every_step_brings_other_samples(single: list[Step]) -> None:
    assert len(single) == STEPS
    assert len({sample for step in single for sample in step}) == STEPS * GLOBAL_BATCH


@pytest.fixture(scope="module")
def uneven(prepared: Path, tokenizer: str) -> dict[str, list[Step]]:
    """Three ranks on two machines, two on the one and one on the other."""
    if not can_leave_machine():
        pytest.skip("this user may not have a mount namespace, which stands for another machine")
    ranks = run_ranks(read_cases, 3, str(prepared), tokenizer, lone_ranks=(2,))
    return {name: join([rank[name] for rank in ranks]) for name in ranks[0]}


HOLD = """
import sys
from pathlib import Path
from place.config import DataConfig
from place.data.loader import PairLoader
from place.data.tokens import ReportTokenizer

path, tokenizer, cache = sys.argv[1:]
data = DataConfig(path=path, image_size_px=32, num_workers=0)
loader = PairLoader(
    data, "val", ReportTokenizer.load(tokenizer), seed=0, local_batch=4, num_patches=16, train=False, cache=Path(cache)
)
for epoch in range(2):
    next(loader.read_epoch(epoch, 0, 1, 1))
held = {path.name for path in Path("/dev/shm").glob(f"{loader.shm_prefix}*")}
loader.close()
left = [path for path in Path("/dev/shm").glob(f"{loader.shm_prefix}*")]
for name in held:
    (Path("/dev/shm") / name).write_bytes(b"of another run")
print(len(left), *held)
"""


def test_memory_whose_names_another_run_took_since_is_not_removed(
    prepared: Path, tokenizer: str, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", HOLD, str(prepared), tokenizer, str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    left, *held = done.stdout.split()
    theirs = [Path("/dev/shm") / name for name in held]
    kept = [path for path in theirs if path.exists()]
    for path in kept:
        path.unlink()
    assert left == "0"
    assert len(theirs) > 5
    assert kept == theirs
    assert done.stderr == ""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("case", "first"), [("whole", 0), ("workers", 0), ("resumed", 2)])
def test_uneven_machines_get_the_global_batches_of_one_rank(
    case: str, first: int, single: list[Step], uneven: dict[str, list[Step]]
) -> None:
    assert uneven[case] == single[first:]


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", ["whole", "workers"])
def test_two_ranks_get_the_global_batches_of_one(case: str, single: list[Step], double: dict[str, list[Step]]) -> None:
    assert double[case] == single


def test_loader_workers_change_neither_order_nor_augmentation(
    prepared: Path, tokenizer: str, single: list[Step]
) -> None:
    assert join([read_steps(str(prepared), tokenizer, 2, 1, 0, STEPS)]) == single


@pytest.mark.multiprocess
def test_a_resumed_epoch_goes_on_exactly_where_it_stopped_on_other_ranks(single: list[Step], double: dict) -> None:
    assert double["resumed"] == single[2:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_goes_on_exactly_where_it_stopped(
    num_workers: int, prepared: Path, tokenizer: str, single: list[Step]
) -> None:
    assert join([read_steps(str(prepared), tokenizer, num_workers, 1, 3, STEPS)]) == single[3:]


def test_another_epoch_has_another_order_and_another_augmentation(
    prepared: Path, tokenizer: str, single: list[Step]
) -> None:
    other = join([read_steps(str(prepared), tokenizer, 0, 2, 0, STEPS)])
    assert [set(step) for step in other] != [set(step) for step in single]
    ours, theirs = ({k: v for step in steps for k, v in step.items()} for steps in (single, other))
    shared = ours.keys() & theirs.keys()
    assert len(shared) > GLOBAL_BATCH
    assert all(ours[sample][0] != theirs[sample][0] for sample in shared)
    assert sum(ours[sample][1] != theirs[sample][1] for sample in shared) > len(shared) / 2, (
        "sentences keep their order"
    )


def test_one_loader_reads_epoch_after_epoch(prepared: Path, tokenizer: str, single: list[Step], tmp_path: Path) -> None:
    loader = build_loader(prepared, tokenizer, tmp_path, num_workers=2)
    for epoch in (0, 1):
        ids = [set(batch.sample_id_B.tolist()) for batch in loader.read_epoch(epoch, 0, STEPS, 1)]
        assert (ids == [set(step) for step in single]) == (epoch == 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_go_on_over_the_ends_of_epochs(
    num_workers: int, prepared: Path, tokenizer: str, single: list[Step], tmp_path: Path
) -> None:
    first, last = STEPS - 2, 2 * STEPS + 1
    steps = build_loader(prepared, tokenizer, tmp_path / "a", num_workers).read_steps(first, last, STEPS, 1)
    ids = [batch.sample_id_B.tolist() for batch in steps]
    apart = build_loader(prepared, tokenizer, tmp_path / "b")
    cut = [(0, STEPS - 2, STEPS), (1, 0, STEPS), (2, 0, 1)]
    assert ids == [batch.sample_id_B.tolist() for part in cut for batch in apart.read_epoch(*part, 1)]
    assert [set(step) for step in ids[2:-1]] == [set(step) for step in single]


def test_batches_are_taken_over_before_they_are_asked_for(prepared: Path, tokenizer: str, tmp_path: Path) -> None:
    loader = build_loader(prepared, tokenizer, tmp_path, num_workers=1)
    asked: list[int] = []
    read = loader.read_epoch

    def count(epoch: int, first: int, last: int, world: int) -> Iterator[Batch]:
        for step, batch in enumerate(read(epoch, first, last, world), start=epoch * STEPS + first):
            asked.append(step)
            yield batch

    loader.read_epoch = count  # type: ignore[method-assign]
    steps = loader.read_steps(0, 2 * STEPS, STEPS, 1)
    for _ in range(STEPS - 1):
        next(steps)
    until = time.monotonic() + 30
    while STEPS not in asked and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # one that is a batch too far ahead would come by now
    assert asked == list(range(STEPS + 1)), "the next epoch begins before this one ends, and no further ahead"
    steps.close()  # type: ignore[attr-defined]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("place-loader")]


def test_validation_is_in_stored_order_and_not_augmented(prepared: Path, tokenizer: str) -> None:
    first, again = (join([read_steps(str(prepared), tokenizer, 0, epoch, 0, 2, train=False)]) for epoch in (0, 4))
    assert first == again
    stored = [sample["sample_id"] for sample in read_samples(prepared, "val")]
    assert {sample for step in first for sample in step} <= set(stored)


def test_what_the_host_knows_of_a_batch_is_what_the_device_has(prepared: Path, tokenizer: str, tmp_path: Path) -> None:
    batch = next(iter(build_loader(prepared, tokenizer, tmp_path, max_tokens=40).read_epoch(0, 0, 1, 1)))
    _, mask_BS = mean_by_sentence(torch.zeros(*batch.token_ids_BT.shape, 1), batch.sentence_of_token_BT, 16)
    assert batch.num_sentences_B.tolist() == mask_BS.sum(1).tolist()
    assert batch.length_B.tolist() == batch.attention_BT.sum(1).tolist()
    assert len(set(batch.num_sentences_B.tolist())) > 1
    assert batch.to("meta").num_sentences_B.device.type == "cpu"


def build_loader(
    data: Path, tokenizer: str, cache: Path, num_workers: int = 0, train: bool = True, **options: object
) -> PairLoader:
    return PairLoader(
        build_data(data, num_workers).model_copy(update=options),
        "train" if train else "val",
        ReportTokenizer.load(tokenizer),
        seed=3,
        local_batch=GLOBAL_BATCH,
        num_patches=16,
        train=train,
        cache=cache,
    )


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def find_shard(data: Path) -> Path:
    return next((data / "train").glob("shard.*.zstd"))


def flip_byte(path: Path, rng: np.random.Generator | None = None) -> None:
    stored = bytearray(path.read_bytes())
    at, change = (rng.integers(len(stored)), rng.integers(1, 256)) if rng else (len(stored) // 2, 1)
    stored[at] ^= int(change)
    path.write_bytes(stored)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_byte_is_named_by_the_loader(num_workers: int, copy: Path, tokenizer: str, tmp_path: Path) -> None:
    flip_byte(find_shard(copy))
    loader = build_loader(copy, tokenizer, tmp_path / "cache", num_workers)
    with pytest.raises(RunError, match="is damaged") as caught:
        list(loader.read_steps(0, STEPS, STEPS, 1))
    assert str(find_shard(copy)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_a_byte_flipped_anywhere_is_named_before_its_shard_trains(
    seed: int, copy: Path, tokenizer: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    shards = sorted((copy / "train").glob("shard.*.zstd"))
    path = shards[rng.integers(len(shards))]
    flip_byte(path, rng)
    loader = build_loader(copy, tokenizer, tmp_path / "cache")
    trained: set[int] = set()
    with pytest.raises(RunError, match=f"{path} is damaged"):
        trained.update(number for batch in loader.read_epoch(0, 0, STEPS, 1) for number in batch.sample_id_B.tolist())
    assert not trained & stored_in(copy, path.name)


def stored_in(data: Path, name: str) -> set[int]:
    """Sample ids of a shard, by the manifest, whose rows stand in the shards' order."""
    rows = pq.read_table(data / "manifest.parquet", columns=["sample_id", "split"]).to_pylist()
    ids = [row["sample_id"] for row in rows if row["split"] == "train"]
    begin = 0
    for info in json.loads((data / "train" / "index.json").read_text())["shards"]:
        if info["zip_data"]["basename"] == name:
            return set(ids[begin : begin + info["samples"]])
        begin += info["samples"]
    raise AssertionError(name)


def test_a_byte_flipped_at_any_of_many_random_places_is_found(copy: Path) -> None:
    rng = np.random.default_rng(0)
    path = find_shard(copy)
    whole = path.read_bytes()
    for _ in range(500):
        flip_byte(path, rng)
        with pytest.raises(RunError, match=rf"^shard {path} is damaged \(its xxh64 differs from index\.json\); run "):
            list(read_samples(copy, "train"))
        path.write_bytes(whole)
    assert len(list(read_samples(copy, "train"))) == count_samples(copy, "train")


def test_a_missing_shard_is_named_by_the_loader(copy: Path, tokenizer: str, tmp_path: Path) -> None:
    shard = find_shard(copy)
    shard.unlink()
    loader = build_loader(copy, tokenizer, tmp_path / "cache")
    with pytest.raises(RunError, match="is missing") as caught:
        list(loader.read_epoch(0, 0, STEPS, 1))
    assert str(shard) in str(caught.value)


def replace_by_folder(shard: Path) -> bytes:
    """Whoever reads the shard is told something else than that it is missing. Returns what was in it."""
    whole = shard.read_bytes()
    shard.unlink()
    shard.mkdir()
    return whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_cannot_be_read_now_is_a_passing_fault(
    num_workers: int, copy: Path, tokenizer: str, tmp_path: Path
) -> None:
    replace_by_folder(find_shard(copy))
    loader = build_loader(copy, tokenizer, tmp_path / "cache", num_workers)
    with pytest.raises(PassingError, match=f"{copy} cannot be read: Is a directory; start the run again"):
        list(loader.read_epoch(0, 0, STEPS, 1))


def test_a_fault_that_has_passed_is_one_line_and_no_other_shard_is_looked_at(
    copy: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, asked = find_shard(copy), []
    whole = replace_by_folder(shard)

    def look(*where: Any) -> str:
        asked.append(where)
        shard.rmdir()
        shard.write_bytes(whole)
        return find_fault(*where)

    monkeypatch.setattr(loader_module, "find_fault", look)
    with pytest.raises(PassingError, match="split 'train' ended at step 0 of 5 of epoch 0; start the run again"):
        list(build_loader(copy, tokenizer, tmp_path / "cache").read_epoch(0, 0, STEPS, 1))
    assert asked == [(str(copy), "train", 0)]


def test_a_flipped_byte_is_named_by_the_reader(copy: Path) -> None:
    flip_byte(find_shard(copy))
    with pytest.raises(RunError, match="is damaged") as caught:
        list(read_samples(copy, "train"))
    assert str(find_shard(copy)) in str(caught.value)


def test_a_missing_shard_is_named_by_the_reader(copy: Path) -> None:
    shard = find_shard(copy)
    shard.unlink()
    with pytest.raises(RunError, match="is missing") as caught:
        list(read_samples(copy, "train"))
    assert str(shard) in str(caught.value)


def test_reading_writes_nothing_into_the_prepared_folder(copy: Path, tokenizer: str, tmp_path: Path) -> None:
    def look() -> dict[str, tuple[int, int]]:
        paths = [copy, *copy.rglob("*")]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    before = look()
    list(build_loader(copy, tokenizer, tmp_path / "cache", 2).read_epoch(0, 0, STEPS, 1))
    list(read_samples(copy, "train"))
    assert look() == before


def test_the_reader_gives_every_sample_once_and_whole(prepared: Path) -> None:
    samples = list(read_samples(prepared, "train"))
    assert len({sample["sample_id"] for sample in samples}) == len(samples) == count_samples(prepared, "train")
    assert set(samples[0]) == set(COLUMNS)


def test_a_folder_that_is_not_prepared_is_one_line(tmp_path: Path) -> None:
    for ask in (lambda: read_card(tmp_path), lambda: count_samples(tmp_path, "train")):
        with pytest.raises(UsageError, match="run `place prepare"):
            ask()


def test_a_damaged_card_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"image": 1})[:-3])
    with pytest.raises(RunError, match=r"card\.json is damaged"):
        read_card(tmp_path)


def test_splits_are_those_with_samples(prepared: Path) -> None:
    assert sorted(list_splits(prepared)) == ["test", "train", "val"]
    with pytest.raises(UsageError, match="splits there are"):
        count_samples(prepared, "holdout")


def test_sections_are_chosen_and_never_leave_a_report_empty() -> None:
    report = [{"section": "findings", "text": "a"}, {"section": "impression", "text": "b"}]
    assert select_sentences(report, "all") == ["a", "b"]
    assert select_sentences(report, "impression") == ["b"]
    assert select_sentences(report[:1], "impression") == ["a"]


def read_batches(path: Path, tokenizer: str, cache: Path, epoch: int, train: bool, **options: object) -> list[Batch]:
    """Batches of an epoch, of the first split that is trained on or validated with, sentences in their order."""
    loader = build_loader(path, tokenizer, cache, train=train, shuffle_sentences=False, **options)
    return list(loader.read_steps(epoch * STEPS, epoch * STEPS + (STEPS if train else 1), STEPS, 1))


def test_reports_whose_section_reads_alike_are_one_group_of_a_batch(
    prepared: Path, tokenizer: str, tmp_path: Path
) -> None:
    """Other findings do not make them two: the model never reads those."""
    samples = {sample["sample_id"]: sample for sample in read_samples(prepared, "train")}
    seen = {}
    for batch in read_batches(prepared, tokenizer, tmp_path, 0, True, sections="impression"):
        seen |= dict(zip(batch.sample_id_B.tolist(), batch.report_group_B.tolist(), strict=True))
    texts = {number: " ".join(select_sentences(samples[number]["sentences"], "impression")) for number in seen}
    assert len({(texts[number], group) for number, group in seen.items()}) == len(set(texts.values()))
    assert len(set(seen.values())) == len(set(texts.values())) < len({samples[n]["report_group"] for n in seen})


def test_one_section_of_a_report_is_drawn_for_the_epoch(prepared: Path, tokenizer: str, tmp_path: Path) -> None:
    samples = {sample["sample_id"]: sample for split in ("train", "val") for sample in read_samples(prepared, split)}
    read = ReportTokenizer.load(tokenizer)

    def name_sections(epoch: int, train: bool) -> dict[int, str]:
        """Section that each sample of an epoch was read in, by its tokens and by its group."""
        found = {}
        for batch in read_batches(prepared, tokenizer, tmp_path / f"{epoch}{train}", epoch, train, sections="one"):
            rows = zip(
                batch.sample_id_B.tolist(), batch.token_ids_BT, batch.attention_BT, batch.report_group_B.tolist()
            )
            for number, ids_T, attention_T, group in rows:
                for name in ("findings", "impression"):
                    texts = select_sentences(samples[number]["sentences"], name)
                    if ids_T[attention_T].tolist() == read.encode(texts).token_ids:
                        assert group == hash_text(" ".join(texts))
                        found[number] = name
                assert number in found
        return found

    first, again, second = (name_sections(epoch, True) for epoch in (0, 0, 1))
    assert {*first.values()} == {*second.values()} == {"findings", "impression"}
    assert first == again
    assert any(first[number] != second[number] for number in first.keys() & second.keys())
    assert {*name_sections(0, False).values()} == {"findings"}
