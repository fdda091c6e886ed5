"""What users would feed a model with instead: image files with PIL and torchvision, WebDataset tars, HDF5 of pixels."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from place.compat import patch_torchvision
from place.config import DataConfig, UsageError
from place.data.streaming import Pair
from place.data.tokens import ReportTokenizer
from place.data.transforms import read_image, train_transform

SAMPLES_PER_TAR = 1000
Transform = Callable[[Any, int], Any]
"""Takes an image (encoded, or a PIL image) and a sample id; gives fp32 (1,size,size)."""


class Row(NamedTuple):
    """A stored sample as every rival is given it: the bytes that the shards hold, and the report."""

    image: bytes
    sentences: list[str]
    report_group: int
    sample_id: int


def build_torchvision(data: DataConfig, mean: float, std: float) -> Transform:
    """PIL image to tensor with the crop, rotation and intensity of `train_transform`, by torchvision."""
    patch_torchvision()
    from torchvision import transforms

    augment, size = data.augment, data.image_size_px
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(augment.crop_scale_min, 1), ratio=(1, 1)),
            transforms.RandomRotation(augment.rotation_deg),
            transforms.ColorJitter(augment.intensity, augment.intensity),
            transforms.ToTensor(),
            transforms.Normalize([mean], [std]),
        ]
    )
    return lambda image, _: steps(image)


def build_own(data: DataConfig, mean: float, std: float) -> Transform:
    """Encoded image to tensor as PLACE does it."""

    def transform(encoded: bytes, sample_id: int) -> Any:
        rng = np.random.default_rng([0, 0, sample_id])
        return train_transform(read_image(encoded), data.image_size_px, mean, std, data.augment, rng)

    return transform


def open_pil(encoded: bytes | Path) -> Any:
    """A grey PIL image of a file or of its bytes."""
    from PIL import Image

    return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded).convert("L")


class FilePairs(Dataset):
    """A file an image, reports in memory: PIL and torchvision, as MGCA's pretraining set. Final."""

    def __init__(self, folder: Path, rows: list[Row], kind: str, tokenizer: ReportTokenizer, transform: Transform):
        self.folder, self.kind, self.tokenizer, self.transform = folder, kind, tokenizer, transform
        self.reports = [row._replace(image=b"") for row in rows]

    def __len__(self) -> int:
        return len(self.reports)

    def __getitem__(self, at: int) -> Pair:
        row = self.reports[at]
        image = open_pil(self.folder / f"{at}.{self.kind}")
        return Pair(self.transform(image, row.sample_id), self.tokenizer.encode(row.sentences), *row[2:])


def write_files(folder: Path, rows: list[Row], kind: str) -> None:
    """The stored JPEG bytes as they are, or their pixels as PNG."""
    folder.mkdir(parents=True)
    for at, row in enumerate(rows):
        path = folder / f"{at}.{kind}"
        if kind == "jpg":
            path.write_bytes(row.image)
        else:
            open_pil(row.image).save(path)


class HdfPairs(Dataset):
    """Decoded squares in one HDF5 file, as CheXzero's; the transforms are torchvision's. Final."""

    def __init__(self, path: Path, tokenizer: ReportTokenizer, transform: Transform):
        self.path, self.tokenizer, self.transform = path, tokenizer, transform
        self.file: Any = None
        with import_extra("h5py").File(path) as file:
            self.samples = len(file["image"])

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, at: int) -> Pair:
        from PIL import Image

        if self.file is None:  # in the process that reads: HDF5 handles do not survive a fork
            self.file = import_extra("h5py").File(self.path)
        row = json.loads(self.file["report"][at])
        image = Image.fromarray(self.file["image"][at])
        report = self.tokenizer.encode(row["sentences"])
        return Pair(self.transform(image, row["sample_id"]), report, row["report_group"], row["sample_id"])


def write_hdf(path: Path, rows: list[Row], short_px: int) -> None:
    """Centre squares of the stored images at their short side, uint8, uncompressed, and the reports."""
    h5py = import_extra("h5py")
    with h5py.File(path, "w") as file:
        images = file.create_dataset("image", (len(rows), short_px, short_px), np.uint8)
        reports = file.create_dataset("report", (len(rows),), h5py.string_dtype())
        for at, row in enumerate(rows):
            image_YX = read_image(row.image)
            top, left = ((side - short_px) // 2 for side in image_YX.shape)
            images[at] = image_YX[top : top + short_px, left : left + short_px]
            reports[at] = _dump_report(row)


class TarPairs(IterableDataset):
    """WebDataset: tar shards, read in a drawn order through a shuffling buffer. Final."""

    def __init__(self, folder: Path, tokenizer: ReportTokenizer, transform: Transform, decode: bool):
        self.folder, self.tokenizer, self.transform, self.decode = folder, tokenizer, transform, decode

    def __iter__(self) -> Iterator[Pair]:
        webdataset = import_extra("webdataset")
        urls = sorted(str(path) for path in self.folder.glob("*.tar"))
        samples = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(SAMPLES_PER_TAR)
        for sample in samples:
            row = json.loads(sample["json"])
            image = open_pil(sample["jpg"]) if self.decode else sample["jpg"]
            report = self.tokenizer.encode(row["sentences"])
            yield Pair(self.transform(image, row["sample_id"]), report, row["report_group"], row["sample_id"])


def write_tars(folder: Path, rows: list[Row]) -> None:
    """Tar shards of the stored JPEG bytes, with the report as JSON beside each."""
    folder.mkdir(parents=True)
    for first in range(0, len(rows), SAMPLES_PER_TAR):
        with tarfile.open(folder / f"{first // SAMPLES_PER_TAR:05}.tar", "w") as tar:
            for at, row in enumerate(rows[first : first + SAMPLES_PER_TAR], first):
                _add(tar, f"{at:08}.jpg", row.image)
                _add(tar, f"{at:08}.json", _dump_report(row).encode())


def import_extra(name: str) -> Any:
    """A package of the `bench` extra. Raises UsageError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UsageError(f"{name} is not installed; pip install -c constraints.txt -e .[bench]") from None


def list_files(paths: Iterable[Path]) -> list[Path]:
    """Files, and all files below folders."""
    return [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]


def _dump_report(row: Row) -> str:
    return json.dumps({"sentences": row.sentences, "report_group": row.report_group, "sample_id": row.sample_id})


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
