"""`place data verify|stats|inspect`: damage is named, numbers are exact, the page is whole and safe."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_sets import edit_table, write_csv_source

from place.cli import main
from place.config import DataConfig, PassingError, PrepareConfig
from place.data.inspect_page import iterate_bins
from place.data.prepare import run_prepare
from place.data.prepared import list_splits, read_card, read_samples, read_shard, read_shard_list
from place.data.stats import compute_stats
from place.data.storage import open_store
from place.data.streaming import ReportPairs, _ShardState
from place.data.tokens import train_tokenizer
from place.data.verify import find_faults
from place.distributed import read_node, read_world


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms in several shards a split."""
    folder = tmp_path_factory.mktemp("several") / "set"
    run_prepare(
        PrepareConfig(source="phantom", count=120, size_px=48, rows_per_task=30, num_workers=1, output=str(folder))
    )
    return folder


@pytest.fixture
def copy(several: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(several, tmp_path / "set"))


def flip(path: Path, position: int, bits: int = 1) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def test_a_whole_data_set_has_no_faults(prepared, capsys):
    assert list(find_faults(prepared)) == []
    assert main(["data", "verify", str(prepared)]) == 0
    assert re.search(r"\d shards, manifest and card are whole", capsys.readouterr().out)


def test_any_flipped_byte_of_any_shard_is_named(copy):
    rng, shards = random.Random(0), sorted(copy.glob("*/shard*"))
    assert len(shards) >= 3
    for _ in range(400):
        shard = rng.choice(shards)
        at, bits = rng.randrange(shard.stat().st_size), rng.randrange(1, 256)
        flip(shard, at, bits)
        (fault,) = find_faults(copy)
        assert fault == f"shard {shard} is damaged (its xxh64 differs from index.json)", (shard, at, bits)
        flip(shard, at, bits)
    assert list(find_faults(copy)) == []


def test_any_flipped_byte_of_any_shard_is_detected_before_it_trains(copy, tmp_path):
    texts = (item["text"] for sample in read_samples(copy, "train") for item in sample["sentences"])
    tokenizer = train_tokenizer(texts, 300, 160, 16)
    data = DataConfig(path=str(copy), image_size_px=32, num_canonical_nodes=1)
    pairs = ReportPairs(data, "train", tokenizer, 0, 4, True, tmp_path / "cache", read_world(), read_node())
    rng, shards = random.Random(1), sorted(copy.glob("train/shard*"))
    assert len(shards) == len(pairs.samples_per_shard) > 2
    first = np.cumsum([0, *pairs.samples_per_shard])
    for _ in range(200):
        number = rng.randrange(len(shards))
        at, bits = rng.randrange(shards[number].stat().st_size), rng.randrange(1, 256)
        flip(shards[number], at, bits)
        with pytest.raises(ValueError, match="Checksum failure"):
            pairs[int(first[number])]
        flip(shards[number], at, bits)
        (bad,) = (tmp_path / "cache").rglob("*.mds*")
        assert bad.suffix == ".zstd", "a damaged shard was unpacked"
        bad.unlink()
        pairs._shard_states[number] = _ShardState.REMOTE
    assert [pairs[int(at)].sample_id for at in first[:-1]] == [
        next(sample["sample_id"] for sample in read_shard(open_store(copy), "train", info))
        for info in read_shard_list(copy, "train")
    ]


@pytest.mark.parametrize("name", ["manifest.parquet", "rejected.parquet", "card.md", "val/index.json"])
def test_a_damaged_or_missing_file_beside_the_shards_is_named(copy, name):
    size = (copy / name).stat().st_size
    for at in (0, size // 3, size - 1):
        flip(copy / name, at)
        (fault,) = find_faults(copy)
        assert fault.startswith(f"{copy}/{name} is damaged")
        flip(copy / name, at)
    (copy / name).unlink()
    (fault,) = find_faults(copy)
    assert fault.startswith(f"{copy}/{name} is missing")


@pytest.mark.parametrize(("action", "name"), [("stats", "val/index.json"), ("inspect", "manifest.parquet")])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_a_damaged_file_beside_the_shards_is_one_line_for_whoever_reads_it(action, name, content, copy, capsys):
    (copy / name).write_bytes(content)
    assert main(["data", action, str(copy)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"place data: {copy}/{name} ")


def test_a_list_of_shards_that_cannot_be_read_now_is_a_passing_fault(copy):
    (copy / "val" / "index.json").unlink()
    (copy / "val" / "index.json").mkdir()
    with pytest.raises(PassingError, match=f"{copy} cannot be read: Is a directory"):
        read_shard_list(copy, "val")


def test_a_changed_card_is_named(copy):
    card = (copy / "card.json").read_text()
    mean = str(json.loads(card)["image"]["mean"])
    (copy / "card.json").write_text(card.replace(mean, "0.4"))
    assert list(find_faults(copy)) == [f"card {copy}/card.json is damaged (it differs from the digest in it)"]


def test_verify_names_each_fault_and_ends_with_one(copy, capsys):
    first, second = sorted(copy.glob("train/shard*"))[:2]
    flip(first, 9)
    second.unlink()
    flip(copy / "manifest.parquet", 99)
    assert main(["data", "verify", str(copy)]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{copy}/manifest.parquet is damaged (its SHA-256 differs from card.json)",
        f"shard {first} is damaged (its xxh64 differs from index.json)",
        f"shard {second} is missing",
    ]
    assert said.err.startswith(f"place data: 3 damaged or missing in {copy}: copy them anew")


@pytest.mark.parametrize("action", ["verify", "stats", "inspect"])
def test_a_folder_without_data_is_wrong_use(action, tmp_path, capsys):
    assert main(["data", action, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no prepared data set" in line


def test_stats_are_those_of_all_stored_pixels(prepared, capsys):
    sums = compute_stats(prepared, num_workers=1)
    assert set(sums) == set(list_splits(prepared))
    for split, found in sums.items():
        stored = [np.asarray(Image.open(io.BytesIO(sample["image"]))) for sample in read_samples(prepared, split)]
        pixels = np.concatenate([image.ravel() for image in stored]).astype(np.float64) / 255
        assert (found.images, found.pixels) == (len(stored), pixels.size)
        assert (found.mean, found.std) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-12)
    image = read_card(prepared)["image"]
    assert (sums["train"].mean, sums["train"].std) == pytest.approx((image["mean"], image["std"]), abs=2e-3)
    assert main(["data", "stats", str(prepared), "--num-workers", "1"]) == 0
    assert f"{sums['train'].mean:.6f}" in capsys.readouterr().out


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.words += data


def inspect(folder: str | Path, *options: str) -> Page:
    assert main(["data", "inspect", str(folder), *options]) == 0
    return Page((Path(folder) / "inspect.html").read_text())


@pytest.fixture
def dirty(tmp_path: Path) -> PrepareConfig:
    """A prepared table with rejects, twins and a report that is HTML."""
    config = write_csv_source(tmp_path, count=24)
    for row in range(6):
        edit_table(config, row, note="IMPRESSION: No acute <script>disease</script> here.")
    edit_table(config, 6, note="")
    (tmp_path / "images" / "secret-file-7.jpg").unlink()
    run_prepare(config)
    return config


def test_the_page_shows_splits_rejects_reports_and_twins(dirty):
    words = inspect(dirty.output).words
    card = read_card(dirty.output)
    assert f"{card['counts']['kept']}" in words
    for told in ("missing_image", "empty_report", "row 6", "row 7", "edema", "A 2.5 cm nodule is seen.", "6 ×"):
        assert told in words, told
    assert "6 images in 1 groups with the same report" in words


def test_the_page_needs_nothing_but_itself_and_runs_nothing(dirty):
    page = inspect(dirty.output)
    assert "script" not in page.tags
    assert "<script>disease</script>" in page.words
    assert page.sources
    for source in page.sources:
        assert source.startswith("data:image/jpeg;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size
    assert not re.search(r"https?://", (Path(dirty.output) / "inspect.html").read_text())


def test_the_page_has_no_identifier(dirty):
    page = Path(dirty.output) / "inspect.html"
    inspect(dirty.output)
    assert "secret" not in page.read_text().lower()


def test_a_data_set_stays_what_it_is_when_it_is_looked_at(dirty):
    inspect(dirty.output, "--per-split", "2")
    assert list(find_faults(dirty.output)) == []
    assert run_prepare(dirty)["already_prepared"]


def test_boxes_of_phantoms_are_drawn_where_they_are(prepared, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main(["data", "inspect", str(prepared), "--output", str(file), "--per-split", "40"]) == 0
    assert f"{file}: " in capsys.readouterr().out
    boxes = [box for sample in read_samples(prepared, "test") for box in sample["boxes"]]
    assert boxes
    x0, y0, x1, y1 = boxes[0]["box_xyxy"]
    told = f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}">'
    assert told in file.read_text()


def test_a_page_that_cannot_be_written_is_wrong_use(prepared, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["data", "inspect", str(prepared), "--output", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("values", [[3], [0, 1, 2], [5, 500], list(range(100, 5000, 7))])
def test_bins_are_round_cover_all_and_lose_nothing(values):
    bins = list(iterate_bins(Counter(dict.fromkeys(values, 2))))
    assert sum(count for _, count in bins) == 2 * len(values)
    assert len(bins) <= 24


def test_a_data_set_in_a_bucket_is_verified_measured_and_looked_at(tmp_path, bucket, capsys):
    config = write_csv_source(tmp_path, output=f"{bucket}/set")
    run_prepare(config)
    for action in ("verify", "stats", "inspect"):
        assert main(["data", action, config.output, *(["--num-workers", "1"] if action == "stats" else [])]) == 0
    assert f"{config.output}/inspect.html" in capsys.readouterr().out
