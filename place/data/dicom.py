"""DICOM bytes to the picture a radiologist would see; nothing of the header but an allow-list comes out."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import warnings
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from place.data.images import GreyImage, ImageInfo, Rejected, check_pixel_count, scale_to_uint8

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_NEEDS_EXTRA = {
    _JPEG_EXTENDED: "12-bit JPEG",
    "1.2.840.10008.1.2.4.57": "lossless JPEG",
    "1.2.840.10008.1.2.4.70": "lossless JPEG",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
}
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def decode_dicom(data: bytes) -> tuple[GreyImage, ImageInfo]:
    """Decode one radiograph: modality LUT, VOI LUT or first window, MONOCHROME1 inverted, 8 bits.

    Args:
        data: a whole DICOM file, of 8 to 16 bits, signed or not, plain or compressed.
    Returns:
        (Y, X) uint8, white is dense; view, laterality, modality, photometric interpretation and spacing.
    Raises:
        Rejected: `multi_frame`, `truncated_image`, `too_large`, `unsupported_compression`, `unsupported_photometric`,
            `unsupported_bit_depth`, `unreadable_image`.
    Source: ours.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom quotes header values in its warnings: they must not reach a log
        dataset = _read_dataset(data)
        _check_pixel_header(dataset)
        stored = _decode_pixels(dataset)
        try:
            _drop_meaningless(dataset)
            return _render(dataset, stored), read_info(dataset)
        except Rejected:
            raise
        except Exception:  # noqa: BLE001 - a broken LUT may raise anything; the row is counted
            raise Rejected("unreadable_image", "look-up table or window cannot be applied") from None


def _read_dataset(data: bytes) -> Dataset:
    if _DEFLATED in data[:1024]:
        raise Rejected("unsupported_compression", "deflated data set")
    try:
        # Some exports lack the preamble; what is no DICOM at all has no pixel data and is refused for that.
        return pydicom.dcmread(io.BytesIO(data), force=True)
    except Exception:  # noqa: BLE001 - as above
        raise Rejected("unreadable_image", "neither JPEG, PNG nor DICOM") from None


def _check_pixel_header(dataset: Dataset) -> None:
    try:
        if "PixelData" not in dataset:
            raise Rejected("unreadable_image", "neither JPEG, PNG nor DICOM with pixel data")
        frames = int(dataset.get("NumberOfFrames") or 1)
        if frames > 1:
            raise Rejected("multi_frame", f"{frames} frames")
        check_pixel_count(int(dataset.Rows), int(dataset.Columns))
        bits, stored_bits = int(dataset.BitsAllocated), int(dataset.BitsStored)
        # Of compressed pixels nobody can say whether their decoder has moved them already.
        high_bit, is_plain = _read_high_bit(dataset), not dataset["PixelData"].is_undefined_length
        photometric = str(dataset.PhotometricInterpretation)
    except Rejected:
        raise
    except Exception:  # noqa: BLE001 - missing or malformed elements
        raise Rejected("unreadable_image", "pixel description is missing or malformed") from None
    if bits not in (8, 16):
        raise Rejected("unsupported_bit_depth", "expected 8 to 16 bits a pixel")
    if high_bit != stored_bits - 1 and not (is_plain and stored_bits <= high_bit < bits):
        raise Rejected("unsupported_bit_depth", f"high bit {high_bit}, {stored_bits} bits stored")
    if photometric not in ("MONOCHROME1", "MONOCHROME2", *_COLOUR):
        raise Rejected("unsupported_photometric", "expected MONOCHROME1, MONOCHROME2, RGB or YBR")


def _read_high_bit(dataset: Dataset) -> int:
    value = dataset.get("HighBit")
    return int(dataset.BitsStored) - 1 if value is None else int(value)


def _decode_pixels(dataset: Dataset) -> NDArray[Any]:
    if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        little = dataset.original_encoding[1] is not False
        implicit = dataset.original_encoding[0] is not False
        explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    try:
        _check_codestream(dataset.PixelData)
        high_bit = _read_high_bit(dataset)
        unused = high_bit + 1 - dataset.BitsStored  # bits below the pixel's, as old files have them
        return pixel_array(dataset, bits_stored=high_bit + 1) >> unused if unused else pixel_array(dataset)
    except (KeyboardInterrupt, SystemExit, Rejected):
        raise
    except BaseException as error:  # noqa: BLE001 - decoders raise anything; the one in Rust panics past Exception
        text = str(error).lower()
        lacks_extra = find_spec("libjpeg") is None
        if syntax in _NEEDS_EXTRA and lacks_extra and ("missing dependencies" in text or "does not support" in text):
            hint = f"{_NEEDS_EXTRA[syntax]}: pip install -e .[dicom-gpl]"
            raise Rejected("unsupported_compression", hint) from None
        if any(word in text for word in ("truncated", "less than", "incomplete", "unexpected end", "not enough")):
            raise Rejected("truncated_image") from None
        raise Rejected("unreadable_image", "pixel data cannot be decoded") from None


def _check_codestream(data: bytes) -> None:
    """JPEG 2000 has a size of its own; its decoders take memory for it, whatever the header says."""
    start = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0 and len(data) >= start + 16:
        width, height = struct.unpack_from(">II", data, start + 8)
        check_pixel_count(height, width)


def _drop_meaningless(dataset: Dataset) -> None:
    """Take out an empty rescale and a window without width: the picture is then shown as if it had none."""
    for name in ("RescaleSlope", "RescaleIntercept", "VOILUTFunction"):
        if name in dataset and dataset[name].is_empty:
            del dataset[name]
    widths = dataset.get("WindowWidth")
    width = widths[0] if isinstance(widths, MultiValue) else widths
    is_linear = dataset.get("VOILUTFunction", "LINEAR").upper() == "LINEAR"
    if width is not None and (width < 1 if is_linear else width <= 0):
        del dataset.WindowWidth


def _render(dataset: Dataset, stored: NDArray[Any]) -> GreyImage:
    if stored.ndim == 3 and stored.shape[-1] == 3 and stored.dtype == np.uint8:
        return np.asarray(Image.fromarray(stored).convert("L"))
    if stored.ndim != 2:
        raise Rejected("unsupported_bit_depth", "colour of more than 8 bits")
    first = int(stored.min())
    values = np.arange(first, int(stored.max()) + 1).astype(stored.dtype)
    grey = _grey_of_values(dataset, values, _find_present(stored, first, len(values)))
    image_YX = np.empty(stored.shape, np.uint8)
    for line, row in zip(image_YX, stored):
        line[:] = grey[row.astype(np.intp) - first]
    return image_YX


def _find_present(stored: NDArray[Any], first: int, count: int) -> NDArray[np.bool_]:
    """Which values, counted from the first, occur in the picture."""
    present = np.zeros(count, bool)
    for row in stored:
        present[row.astype(np.intp) - first] = True
    return present


def _grey_of_values(dataset: Dataset, values: NDArray[Any], present: NDArray[np.bool_]) -> GreyImage:
    """Grey level of each stored value. All that is done to a pixel depends on its value alone: 65,536 at most."""
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    shown = show_values(dataset, values)
    padding = _find_padding(dataset, values)
    inside = shown[present & ~padding]
    if len(inside):
        shown = np.where(padding, inside.max() if inverted else inside.min(), shown)  # black once shown
    else:
        inside = shown[present]
    grey = shown if shown.dtype == np.uint8 else scale_to_uint8(shown, inside.min(), inside.max())
    return np.invert(grey) if inverted else grey


def show_values(dataset: Dataset, stored: NDArray[Any]) -> NDArray[Any]:
    """Stored values to those of a display: modality LUT or rescale, then VOI LUT or the first window.

    Overlays are not drawn. MONOCHROME1 is not inverted yet.
    Source: PS3.3 C.11.1 and C.11.2, as pydicom applies them.
    """
    return apply_voi_lut(apply_modality_lut(stored, dataset), dataset)


def _find_padding(dataset: Dataset, values: NDArray[Any]) -> NDArray[np.bool_]:
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(values.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    return (values >= min(value, limit)) & (values <= max(value, limit))


class Identity(NamedTuple):
    """What a DICOM file says of whom and what it shows; it goes no further than the keyed hashes."""

    identity: str
    patient: str
    study: str
    accession: str
    view: str


def read_identity(file: str | os.PathLike[str] | io.BytesIO) -> Identity | None:
    """Ids and view of a file, from its header alone; empty where it has none. None if it is no DICOM file.

    Raises OSError where the system does not give the file. Source: ours.
    """
    names = ("SOPInstanceUID", "PatientID", "StudyInstanceUID", "AccessionNumber", "ViewPosition")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(names))
            image, patient, study, accession = (" ".join(str(dataset.get(name) or "").split()) for name in names[:-1])
            view = _code(dataset, "ViewPosition")
            return Identity(image, patient, study, accession, view) if len(dataset) else None
        except Exception as error:  # noqa: BLE001 - whatever a broken header raises, the file is counted as no DICOM
            if isinstance(error, OSError) and error.errno:
                raise
            return None


def read_info(dataset: Dataset) -> ImageInfo:
    """What the allow-list takes from a header; a value that is no plain code is left out. Source: ours."""
    laterality = _code(dataset, "ImageLaterality") or _code(dataset, "Laterality")
    spacing = _spacing_mm(dataset, "PixelSpacing") or _spacing_mm(dataset, "ImagerPixelSpacing")
    return ImageInfo(
        _code(dataset, "ViewPosition"),
        laterality,
        _code(dataset, "Modality"),
        _code(dataset, "PhotometricInterpretation", r"[A-Z_0-9]{1,16}"),
        spacing,
        _code(dataset, "BurnedInAnnotation") == "YES",
    )


def _code(dataset: Dataset, name: str, pattern: str = r"[A-Z ]{1,16}") -> str:
    text = str(dataset.get(name) or "").strip().upper()
    return text if re.fullmatch(pattern, text) else ""


def _spacing_mm(dataset: Dataset, name: str) -> tuple[float, float] | None:
    try:
        rows, columns = (float(value) for value in dataset.get(name) or ())
    except (ValueError, TypeError):
        return None
    usable = all(math.isfinite(value) and 0 < value < 100 for value in (rows, columns))
    return (rows, columns) if usable else None
