"""Several data sets and several images a study: what an epoch takes, from folders and from S3, under a cache limit."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from small_sets import write_csv_source

from place.config import DataConfig, PassingError, RunError, UsageError, check_config
from place.data import mixture
from place.data.loader import PairLoader
from place.data.mixture import Part, draw_samples
from place.data.prepare import run_prepare
from place.data.prepared import read_card, read_samples
from place.data.tokens import ReportTokenizer, train_tokenizer

VIEWS = 3


def prepare_set(folder: Path, studies: int, output: str | None = None) -> str:
    """A data set with several images a study, many small shards, train and val only."""
    config = write_csv_source(folder, studies * VIEWS, rows_per_task=3, split=(0.75, 0.25, 0.0))
    frame = pd.read_csv(config.input)
    frame["exam"] = [f"{folder.name}-study-{row // VIEWS}" for row in frame.index]
    frame["who"] = [f"{folder.name}-patient-{row // VIEWS}" for row in frame.index]
    for name in frame["file"]:
        os.rename(f"{config.image_root}/{name}", f"{config.image_root}/{folder.name}-{name}")
    frame["file"] = folder.name + "-" + frame["file"]
    frame.to_csv(config.input, index=False)
    output = output or config.output
    run_prepare(config.model_copy(update={"output": output}))
    return output


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("salt")))
        folder = tmp_path_factory.mktemp("sets")
        return prepare_set(folder / "large", 24), prepare_set(folder / "small", 12)


@pytest.fixture(scope="module")
def tokenizer(sets: tuple[str, str]) -> ReportTokenizer:
    texts = (item["text"] for sample in read_samples(sets[0], "train") for item in sample["sentences"])
    return train_tokenizer(texts, 200, 80, 8)


def build_data(paths: tuple[str, ...], weights: list[dict] | None = None, **changes) -> DataConfig:
    weights = weights or [{}] * len(paths)
    streams = tuple({"path": path, **weight} for path, weight in zip(paths, weights))
    return DataConfig(streams=streams, image_size_px=32, num_canonical_nodes=2, num_workers=0, **changes)


def build_loader(data: DataConfig, tokenizer: ReportTokenizer, train: bool = True, batch: int = 6) -> PairLoader:
    split, cache = "train" if train else "val", Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))
    return PairLoader(data, split, tokenizer, seed=1, local_batch=batch, num_patches=16, train=train, cache=cache)


def read_ids(loader: PairLoader, steps: int, epoch: int = 0) -> list[int]:
    return [number for batch in loader.read_epoch(epoch, 0, steps, 1) for number in batch.sample_id_B.tolist()]


def stored_ids(path: str, split: str = "train") -> set[int]:
    return {sample["sample_id"] for sample in read_samples(path, split)}


def parts(chosen: list[int], samples: int = 10) -> list[Part]:
    return [Part("somewhere", samples, None, samples, number) for number in chosen]


def test_a_repeated_set_comes_as_often_as_it_is_told() -> None:
    counts = Counter(np.concatenate(draw_samples(parts([20, 4]), 0, 0)).tolist())
    assert [counts[number] for number in range(10)] == [2] * 10
    assert sorted(counts[number] for number in range(10, 20)) == [0] * 6 + [1] * 4


def test_what_is_left_of_whole_repeats_is_drawn_anew_in_each_epoch_and_the_same_for_all_ranks() -> None:
    first, again, other = (draw_samples(parts([4]), 0, epoch)[0] for epoch in (3, 3, 4))
    assert first.tolist() == again.tolist() == sorted(first)
    assert first.tolist() != other.tolist()


def test_one_image_of_each_study_is_drawn_and_all_come_in_time() -> None:
    studies = np.array([0, 0, 0, 1, 2, 2, 1, 3])
    seen: Counter[int] = Counter()
    for epoch in range(60):
        (draw,) = draw_samples([Part("somewhere", 8, studies, 4, 4)], 0, epoch)
        assert sorted(studies[draw]) == [0, 1, 2, 3]
        seen.update(draw.tolist())
    assert set(seen) == set(range(8))
    assert seen[7] == 60
    assert min(seen.values()) > 8


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        ([{}, {}], [1.0, 1.0]),
        ([{"repeat": 2}, {"repeat": 0.5}], [2.0, 0.5]),
    ],
)
def test_repeats_lengthen_an_epoch(weights: list[dict], chosen: list[float], sets: tuple[str, str]) -> None:
    found = mixture.list_parts(build_data(sets, weights), "train", train=True)
    assert [part.chosen for part in found] == [round(part.samples * share) for part, share in zip(found, chosen)]
    assert mixture.count_epoch(build_data(sets, weights), "train", train=True) == sum(part.chosen for part in found)


@pytest.mark.parametrize(
    ("proportions", "chosen"), [((1e-6, 1), [1, 53]), ((1, 1e-6), [53, 1]), ((1, 2), [18, 36]), ((1, 53), [1, 53])]
)
def test_a_small_proportion_still_draws_one(
    proportions: tuple[float, float], chosen: list[int], sets: tuple[str, str]
) -> None:
    streams = build_data(sets, [{"proportion": proportion} for proportion in proportions]).streams
    assert mixture._choose(streams, [36, 18]) == chosen


def test_proportions_share_out_an_epoch_of_the_same_length(sets: tuple[str, str]) -> None:
    data = build_data(sets, [{"proportion": 1}, {"proportion": 3}])
    large, small = mixture.list_parts(data, "train", train=True)
    assert large.chosen + small.chosen == large.samples + small.samples
    assert small.chosen == pytest.approx(3 * large.chosen, abs=2)


def test_validation_takes_each_sample_once_whatever_the_weights(
    sets: tuple[str, str], tokenizer: ReportTokenizer
) -> None:
    data = build_data(sets, [{"repeat": 3}, {"repeat": 0.5}])
    count = mixture.count_epoch(data, "val", train=False)
    ids = read_ids(build_loader(data, tokenizer, train=False, batch=3), count // 3, epoch=5)
    assert Counter(ids) == Counter(stored_ids(sets[0], "val") | stored_ids(sets[1], "val"))
    assert mixture.count_epoch(data, "holdout", train=False) == 0


def test_an_epoch_mixes_its_sets_as_told(sets: tuple[str, str], tokenizer: ReportTokenizer) -> None:
    data = build_data(sets, [{"repeat": 1}, {"repeat": 2}])
    count = mixture.count_epoch(data, "train", train=True)
    batch = next(size for size in (6, 5, 4, 3) if count % size == 0)
    counts = Counter(read_ids(build_loader(data, tokenizer, batch=batch), count // batch))
    assert counts == Counter(dict.fromkeys(stored_ids(sets[0]), 1) | dict.fromkeys(stored_ids(sets[1]), 2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_image_a_study_reaches_the_model(
    num_workers: int, sets: tuple[str, str], tokenizer: ReportTokenizer
) -> None:
    manifest = pq.read_table(Path(sets[0]) / "manifest.parquet", columns=["sample_id", "study", "split"]).to_pylist()
    study_of = {row["sample_id"]: row["study"] for row in manifest if row["split"] == "train"}
    data = build_data(sets[:1], views_per_study="one").model_copy(update={"num_workers": num_workers})
    count = mixture.count_epoch(data, "train", train=True)
    assert count == len(set(study_of.values())) < len(study_of)
    loader = build_loader(data, tokenizer, batch=1)
    first, second = (read_ids(loader, count, epoch) for epoch in (0, 1))
    assert sorted(study_of[number] for number in first) == sorted(set(study_of.values()))
    assert set(first) != set(second)


def test_a_manifest_that_does_not_fit_its_shards_is_one_line(sets: tuple[str, str], monkeypatch) -> None:
    monkeypatch.setattr(mixture, "count_samples", lambda path, split: 7)
    with pytest.raises(RunError, match="its shards 7 samples"):
        mixture.list_parts(build_data(sets[:1], views_per_study="one"), "train", train=True)


def test_the_fingerprint_follows_sets_weights_and_views(sets: tuple[str, str]) -> None:
    single = mixture.read_fingerprint(DataConfig(path=sets[0]))
    assert single == read_card(sets[0])["fingerprint"] == mixture.read_fingerprint(build_data(sets[:1]))
    others = [
        build_data(sets[:1], [{"repeat": 2}]),
        build_data(sets[:1], views_per_study="one"),
        build_data(sets),
        build_data(sets[::-1]),
        build_data(sets, [{"proportion": 1}, {"proportion": 2}]),
    ]
    assert len({single, *map(mixture.read_fingerprint, others)}) == 6


def test_statistics_are_those_of_what_an_epoch_draws(sets: tuple[str, str], monkeypatch) -> None:
    cards = {sets[0]: {"image": {"mean": 0.2, "std": 0.1}}, sets[1]: {"image": {"mean": 0.6, "std": 0.1}}}
    monkeypatch.setattr(mixture, "read_card", cards.get)
    assert mixture.read_intensity(DataConfig(path=sets[0])) == (0.2, 0.1)
    mean, std = mixture.read_intensity(build_data(sets, [{"proportion": 1}, {"proportion": 1}]))
    assert (mean, std) == (pytest.approx(0.4, abs=0.01), pytest.approx(np.hypot(0.1, 0.2), abs=0.01))


@pytest.mark.parametrize(
    ("streams", "words"),
    [
        ([{"path": "a", "proportion": 1}, {"path": "b"}], "proportion to all streams or to none"),
        ([{"path": "a", "proportion": 1, "repeat": 2}], "proportion or repeat, not both"),
    ],
)
def test_weights_that_contradict_each_other_are_one_line(streams: list[dict], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_config({"data": {"streams": streams}})
    assert "\n" not in str(caught.value)


def read_size(path: Path) -> int:
    """Bytes of a shard; none once a thread of streaming has thrown it out."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bucket_and_a_folder_are_streamed_together_under_a_cache_limit(
    num_workers: int, tmp_path: Path, bucket: str, sets: tuple[str, str], tokenizer: ReportTokenizer
) -> None:
    remote = prepare_set(tmp_path / "far", 20, f"{bucket}/sets/far")
    limit = 40_000
    data = build_data((remote, sets[1]), cache_limit=str(limit)).model_copy(update={"num_workers": num_workers})
    count = mixture.count_epoch(data, "train", train=True)
    loader = build_loader(data, tokenizer, batch=1)
    cache = Path(loader.dataset.streams[0].local).parent
    ids, largest = [], 0
    for batch in loader.read_epoch(0, 0, count, 1):
        ids += batch.sample_id_B.tolist()
        largest = max(largest, sum(map(read_size, list(cache.rglob("*.mds*")))))
    assert Counter(ids) == Counter(stored_ids(remote) | stored_ids(sets[1]))
    assert 0 < largest <= limit
    shards = [info for path in (remote, sets[1]) for info in mixture.read_shard_list(path, "train")]
    assert sum(info["raw_data"]["bytes"] for info in shards) > 2 * limit, "the limit was never met"


def test_a_cache_limit_below_a_few_shards_is_one_line(sets: tuple[str, str], tokenizer: ReportTokenizer) -> None:
    with pytest.raises(UsageError, match=r"data\.cache_limit=20kb.*too low") as caught:
        build_loader(build_data(sets[:1], cache_limit="20kb"), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_damaged_shard_of_a_bucket_is_named(tmp_path: Path, bucket: str, tokenizer: ReportTokenizer) -> None:
    from place.data.storage import open_store

    remote = prepare_set(tmp_path / "far", 8, f"{bucket}/sets/far")
    store, info = open_store(remote), mixture.read_shard_list(remote, "train")[0]
    name = f"train/{info['zip_data']['basename']}"
    stored = bytearray(store.read(name))
    stored[-3] ^= 4
    store.write(name, bytes(stored))
    with pytest.raises(RunError, match=f"shard {remote}/{name} is damaged"):
        read_ids(build_loader(build_data((remote,)), tokenizer, batch=1), 12)


def test_a_cache_that_loses_shards_before_they_are_read_is_one_line(
    sets: tuple[str, str], tokenizer: ReportTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build_loader(build_data(sets[:1], cache_limit="60kb"), tokenizer)
    monkeypatch.setattr(type(loader.dataset), "prepare_shard", lambda *_, **__: None)
    monkeypatch.setattr(type(loader.dataset), "_each_sample_id", lambda *_: iter([0]))
    with pytest.raises(RunError, match="cache_limit=60kb is too small") as caught:
        read_ids(loader, 1)
    assert "\n" not in str(caught.value)


def test_storage_that_cannot_be_reached_is_one_line(sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(mixture, "open_store", refuse)
    with pytest.raises(PassingError, match="cannot be read: connection refused"):
        mixture.find_fault(sets[0], "train", 0)
