"""A small data set with known labels and an untrained tiny run, both written by the real writers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from place.compat import patch_torchvision
from place.config import Config, check_config, dump_config
from place.data.masks import MASKS, MASKS_FILE, encode_mask
from place.data.prepared import read_samples
from place.data.report import hash_text
from place.data.tokens import train_tokenizer
from place.model.place import build_model
from place.training.checkpoint import write_definition
from place.training.engine import TorchEngine
from place.training.saver import Saver

COLUMNS = {
    "image": "bytes", "sentences": "json", "labels": "json", "view": "str",
    "sample_id": "int", "report_group": "int", "boxes": "json",
}  # fmt: skip
SIZES = {"train": 80, "val": 40, "test": 41}


def build_sample(name: str, number: int, labelled: bool) -> dict[str, Any]:
    """A noisy image whose corner is bright with effusion and whose middle with edema; some labels are unknown."""
    rng = np.random.default_rng([len(name), number])
    effusion, edema = int(rng.integers(2)), int(rng.integers(2))
    image_YX = rng.normal(100, 25, (72, 64))
    image_YX[40:60, 4:24] += 60 * effusion
    image_YX[24:40, 24:40] += 60 * edema
    # Every tenth report is word for word the same.
    words = "same" if number % 10 == 0 else f"number {number} {number * 7}"
    texts = [
        f"There is {'a' if effusion else 'no'} pleural effusion.",
        f"Edema is {'seen' if edema else 'absent'}.",
        f"Case {words}.",
    ]
    box = {"finding": "effusion", "side": "right", "severity": "small", "box_xyxy": [4, 40, 24, 60], "sentence": 0}
    return {
        "image": cv2.imencode(".jpg", image_YX.clip(0, 255).astype(np.uint8))[1].tobytes(),
        "sentences": [
            {"section": "findings" if place < 2 else "impression", "text": text} for place, text in enumerate(texts)
        ],
        "labels": {"effusion": -1 if number % 9 == 0 else effusion, "edema": edema, "nodule": 0} if labelled else {},
        "view": "PA",
        "sample_id": int.from_bytes(hashlib.sha256(f"{name}{number}".encode()).digest()[:7], "big"),
        "report_group": hash_text(" ".join(texts)),
        "boxes": [box] if effusion and labelled else [],
    }


def build_masks(sample: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """The mask of an effusion is its box; edema is absent or was not looked for."""
    row = {"sample_id": sample["sample_id"], "split": split}
    mask_YX = np.zeros((72, 64), bool)
    mask_YX[40:60, 4:24] = True
    effusion = encode_mask(mask_YX) if sample["boxes"] else None
    rows = [row | {"finding": "effusion", "box": 0 if effusion else None, "mask": effusion}]
    return rows + ([] if sample["labels"]["edema"] else [row | {"finding": "edema", "box": None, "mask": None}])


def drop_report(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample of a data set of images alone."""
    boxes = [box | {"sentence": None} for box in sample["boxes"]]
    return sample | {"sentences": [], "report_group": hash_text(""), "boxes": boxes}


def write_data(folder: Path, labelled: bool = True, worded: bool = True) -> Path:
    """Write a prepared data set of three splits."""
    patch_torchvision()
    from streaming import MDSWriter

    rows, masks = [], []
    for name, count in SIZES.items():
        with MDSWriter(out=str(folder / name), columns=COLUMNS, compression="zstd", hashes=["xxh64"]) as writer:
            for number in range(count):
                sample = build_sample(name, number, labelled)
                sample = sample if worded else drop_report(sample)
                writer.write(sample)
                patient = None if number < 2 else f"{len(name)}{number // 2:015x}"
                masks += build_masks(sample, name) if labelled else []
                digest = hashlib.sha256(sample["image"]).hexdigest()
                row = {"sample_id": sample["sample_id"], "patient": patient, "split": name, "source_sha256": digest}
                row |= {"boxes": json.dumps(sample["boxes"]), "height_px": 72, "width_px": 64, "num_words": 9 * worded}
                rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    if masks:
        pq.write_table(pa.Table.from_pylist(masks, schema=MASKS), folder / MASKS_FILE)
    labels = ["effusion", "edema", "nodule"] if labelled else []
    card = {
        "labels": labels,
        "fingerprint": "f" * 64,
        "image": {"mean": 0.4, "std": 0.12, "size_px": 64, "quality": 95},
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def build_config(data_dir: Path) -> Config:
    """A model that answers in milliseconds."""
    vision = {
        "source": "scratch",
        "architecture": "vit_tiny_patch16_224",
        "overrides": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
    }
    return check_config({
        "data": {"path": str(data_dir), "image_size_px": 32, "max_tokens": 40, "max_sentences": 4},
        "model": {
            "vision": vision,
            "text": {"source": "scratch", "width": 16, "depth": 1, "num_heads": 2, "vocab_size": 128},
            "observations": {"num_queries": 3, "num_heads": 2, "depth": 1},
            "correlation": {"num_heads": 2, "width": 8},
            "joint_width": 8,
        },
        "engine": {"kind": "torch", "precision": "fp32"},
        "evaluation": {"bootstrap": 50, "batch_size": 16, "generation": {"width": 32, "steps": 30, "beams": 2}},
    })  # fmt: skip


def write_run(folder: Path, config: Config) -> Path:
    """Write a run folder with one checkpoint of random weights."""
    torch.manual_seed(0)
    folder.mkdir()
    sentences = [item["text"] for sample in read_samples(config.data.path, "train") for item in sample["sentences"]]
    tokenizer = train_tokenizer(sentences, 128, config.data.max_tokens, config.data.max_sentences)
    model, _ = build_model(config, tokenizer.vocab_size, torch.device("cpu"))
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "run.json").write_text(
        json.dumps({"mean": 0.4, "std": 0.12, "commit": "c0ffee", "data_fingerprint": "f" * 64})
    )
    write_definition(folder, config, model, tokenizer)
    saver = Saver(folder, TorchEngine(model, config, torch.device("cpu")), 1, 60)
    saver.save({"step": 3, "best_step": 3})
    saver.wait()
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def unlabelled_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("unlabelled"), labelled=False)


@pytest.fixture(scope="session")
def wordless_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("wordless"), worded=False)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", build_config(data_dir))
