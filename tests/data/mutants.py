"""Hostile input: files with flipped bytes, cut, doubled, spliced, and with lengths and sizes that lie; by seed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit
from small_sets import draw_image, encode

from place.data.phantom_dicom import build_dicom

KINDS = ("dicom", "jpeg", "png", "xml", "txt")
_MAX_SEED_BYTES = 80_000
_PNG = b"\x89PNG\r\n\x1a\n"
_REPORT = """ WET READ: ___ ___ ___ 9:33 PM
 Low lung volumes.
 ________________________________
                                 FINAL REPORT
 HISTORY:  Cough.  FINDINGS: 1. Heart is 2.5 cm, Dr. ___.  2. Small left effusion...
 IMPRESSION:  No effusion. XXXX
"""
_XML = (
    '<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR1"/><Abstract>'
    '<AbstractText Label="FINDINGS">Heart &amp; lungs are normal.</AbstractText><AbstractText Label="IMPRESSION">No '
    'disease.</AbstractText></Abstract><parentImage id="CXR1_IM-0001-3001"/></eCitation>'
)


def build_seeds(kind: str) -> list[bytes]:
    """Good files of a kind, small ones, so that thousands of mutants are quickly tried."""
    return _SEEDS[kind]()


def _dicom_seeds() -> list[bytes]:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    small = [path for path in sorted(folder.glob("*.dcm")) if path.stat().st_size < _MAX_SEED_BYTES]
    shipped = [path.read_bytes() for path in small if "PixelData" in pydicom.dcmread(path, force=True)]
    phantoms = [build_dicom(draw_image(seed, 64, 48), "PA", "P", f"study {seed}", 0.14) for seed in range(4)]
    compressed = pydicom.dcmread(io.BytesIO(phantoms[0]))
    compressed.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    compressed.BitsAllocated, compressed.BitsStored, compressed.HighBit = 8, 8, 7
    compressed.PixelData = encapsulate([encode(draw_image(1, 64, 48))])
    buffer = io.BytesIO()
    compressed.save_as(buffer)
    return [*shipped, *phantoms, buffer.getvalue()]


_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "dicom": _dicom_seeds,
    "jpeg": lambda: [encode(draw_image(seed, 48, 40)) for seed in range(3)],
    "png": lambda: [encode(draw_image(0), "PNG"), encode(draw_image(1).astype(np.uint16) * 200, "PNG")],
    "xml": lambda: [_XML.encode(), _XML.replace("utf-8", "iso-8859-1").replace("Heart", "Größe").encode("latin-1")],
    "txt": lambda: [_REPORT.encode(), ("FINDINGS: ÄÖ normal.\nIMPRESSION: " + "No. 5 a.b " * 99).encode("cp1252")],
}


def mutate(seeds: list[bytes], number: int) -> bytes:
    """The mutant of a number: one to three changes of one seed; the same for ever."""
    rng = np.random.default_rng(number)
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.choice([1, 1, 2, 3])):
        data = _CHANGES[rng.integers(len(_CHANGES))](rng, data, seeds)
    return _repair_png(data) if data.startswith(_PNG) and rng.integers(4) else bytes(data)


def _repair_png(data: bytearray) -> bytes:
    """The checksums of a PNG put right, as one who means harm would: else its decoder never sees the change."""
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


def _at(rng: np.random.Generator, data: bytearray) -> int:
    """A position, as often in the head as in all the rest: heads hold what others are read by."""
    end = min(len(data), 2048) if rng.integers(2) else len(data)
    return int(rng.integers(max(1, end)))


def _flip(rng: np.random.Generator, data: bytearray, _: list[bytes]) -> bytearray:
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[_at(rng, data)] ^= 1 << int(rng.integers(8))
    return data


def _cut(rng: np.random.Generator, data: bytearray, _: list[bytes]) -> bytearray:
    return data[: _at(rng, data)]


def _drop(rng: np.random.Generator, data: bytearray, _: list[bytes]) -> bytearray:
    begin = _at(rng, data)
    del data[begin : begin + int(rng.integers(1, 64))]
    return data


def _double(rng: np.random.Generator, data: bytearray, _: list[bytes]) -> bytearray:
    begin, count = _at(rng, data), int(rng.integers(1, 64))
    piece = data[begin : begin + count]
    return data[:begin] + piece * int(rng.integers(2, 200)) + data[begin:]


def _splice(rng: np.random.Generator, data: bytearray, seeds: list[bytes]) -> bytearray:
    other = bytearray(seeds[rng.integers(len(seeds))])
    return data[: _at(rng, data)] + other[_at(rng, other) :]


def _lie(rng: np.random.Generator, data: bytearray, _: list[bytes]) -> bytearray:
    """An extreme number in place of some bytes: a length, a size, a count."""
    value = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]))
    form = ["<H", ">H", "<I", ">I"][rng.integers(4)]
    packed = struct.pack(form, value & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    begin = _at(rng, data)
    data[begin : begin + len(packed)] = packed
    return data


_CHANGES: list[Callable[[np.random.Generator, bytearray, list[bytes]], bytearray]] = [
    _flip,
    _flip,
    _cut,
    _drop,
    _double,
    _splice,
    _lie,
    _lie,
]
