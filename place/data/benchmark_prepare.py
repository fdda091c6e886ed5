"""DICOM to shards: studies a second on one core, beside a plain pydicom loop that writes the same shards.

python -m place.data.benchmark_prepare --count 300 --source-px 1024 --repeats 5

The loop is what users write: dcmread, modality LUT, VOI LUT, MONOCHROME1 inverted, resize, JPEG, MDSWriter. It checks
nothing, cuts no sentences, writes no manifest and cannot go on after a kill. Where its images are not ours to the byte,
no speed is printed.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from place.compat import patch_torchvision
from place.config import PrepareConfig
from place.data.phantom import encode_dicom, generate_study
from place.data.prepare import run_prepare
from place.data.prepared import read_samples

SIZE_PX, QUALITY = 256, 95


def write_archive(folder: Path, count: int, source_px: int) -> Path:
    """A folder of DICOM files with a table of their reports. Returns the table."""
    table = folder / "reports.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "text", "patient"])
        for index in range(count):
            study = generate_study(0, index, source_px)
            (folder / f"{index}.dcm").write_bytes(encode_dicom(study))
            text = f"FINDINGS: {' '.join(study.findings)}\n\nIMPRESSION: {' '.join(study.impression)}"
            writer.writerow([f"{index}.dcm", text, study.patient])
    return table


def prepare_by_place(table: Path, output: Path) -> None:
    """`place prepare` in this process."""
    config = PrepareConfig(
        source="csv",
        input=str(table),
        output=str(output),
        columns={"image": "file", "text": "text", "patient": "patient"},
        size_px=SIZE_PX,
        jpeg_quality=QUALITY,
        num_workers=1,
        split=(1, 0, 0),
        salt_file=str(table),
    )
    run_prepare(config)


def prepare_by_loop(table: Path, output: Path) -> None:
    """The loop that users write."""
    patch_torchvision()
    from streaming import MDSWriter

    columns = {"image": "bytes", "text": "str"}
    with (
        table.open(newline="") as file,
        MDSWriter(out=str(output / "train"), columns=columns, compression="zstd", hashes=["xxh64"]) as writer,
    ):
        for row in csv.DictReader(file):
            writer.write({"image": _read_by_loop(table.parent / row["file"]), "text": row["text"]})


def _read_by_loop(path: Path) -> bytes:
    dataset = pydicom.dcmread(path)
    pixels = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float64)
    pixels = (pixels - pixels.min()) * (255 / (pixels.max() - pixels.min()))
    grey = np.rint(pixels).astype(np.uint8)
    picture = Image.fromarray(255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey)
    short = min(picture.size)
    if short > SIZE_PX:
        width, height = (max(SIZE_PX, round(side * SIZE_PX / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=4.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {"place": prepare_by_place, "loop": prepare_by_loop}


def measure(count: int, source_px: int, repeats: int) -> dict[str, Any]:
    """Studies a second of both, in turns; `faults` says where their images differ, and then there are no speeds.

    Source: ours.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_archive(folder, count, source_px)
        stored = {}
        for who, run in CONTENDERS.items():
            run(table, folder / who)
            stored[who] = sorted(sample["image"] for sample in read_samples(folder / who, "train"))
        differing = sum(a != b for a, b in zip(stored["place"], stored["loop"], strict=True))
        if differing:
            return {"faults": f"{differing} of {count} images of the loop are not those of place"}
        seconds: dict[str, list[float]] = {who: [] for who in CONTENDERS}
        for repeat in range(repeats):
            for who, run in CONTENDERS.items():
                began = time.perf_counter()
                run(table, folder / f"{who}-{repeat}")
                seconds[who].append(time.perf_counter() - began)
    rates = {who: count / statistics.median(taken) for who, taken in seconds.items()}
    return {"studies_per_s": rates, "ratio": rates["place"] / rates["loop"], "seconds": seconds}


def main() -> int:
    """Print the speeds, or why there are none."""
    parser = argparse.ArgumentParser(description="DICOM to shards on one core, beside a plain pydicom loop.")
    parser.add_argument("--count", type=int, default=300, help="studies")
    parser.add_argument("--source-px", type=int, default=1024, help="side of the DICOM images")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turns")
    arguments = parser.parse_args()
    found = measure(arguments.count, arguments.source_px, arguments.repeats)
    if "faults" in found:
        print(found["faults"])
        return 1
    rates = found["studies_per_s"]
    print(f"images are equal to the byte; {arguments.count} studies of {arguments.source_px} px, one core, median")
    print(f"place {rates['place']:.1f} studies/s, plain pydicom loop {rates['loop']:.1f}, ratio {found['ratio']:.2f}")
    print("seconds of each run:", {who: [round(s, 2) for s in taken] for who, taken in found["seconds"].items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
