"""Image files to 8-bit grey pictures and back to small JPEGs; each way to fail has a reason code."""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 32_000_000
MAX_FILE_BYTES = 512 << 20
MIN_SIDE_PX = 16

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)

GreyImage = NDArray[np.uint8]


class Rejected(Exception):
    """A row that cannot be used: a reason code, and a detail that holds nothing of names or paths."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class ImageInfo(NamedTuple):
    """The allow-list: all that may leave an image file beside its pixels."""

    view: str = ""
    laterality: str = ""
    modality: str = ""
    photometric: str = ""
    spacing_mm: tuple[float, float] | None = None
    """Distance of rows and of columns, in mm."""
    is_annotated: bool = False
    """The header says that text is burned into the picture."""


def read_file(path: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of sensible size. Raises Rejected; OSError where storage fails. Source: ours."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("missing_image", "not a regular file")
        if status.st_size > max_bytes:
            raise Rejected("too_large", f"more than {max_bytes >> 20} MiB")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise judge_error(error) from None


def judge_error(error: OSError | ValueError) -> Rejected:
    """The rejection of a file that is not there or may not be read. Raises the error where it tells of storage alone:
    a file must not count as missing for ever because a server did not answer. Source: ours."""
    if isinstance(error, PermissionError):
        return Rejected("unreadable_image", "permission denied")
    if isinstance(error, OSError) and error.errno not in _NOT_THERE:
        raise error
    return Rejected("missing_image")


def is_there(path: str) -> bool:
    """Whether a path leads to a file, even if it may not be read. Raises OSError where storage fails. Source: ours."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        return judge_error(error).reason != "missing_image"
    return True


def decode_image(data: bytes) -> tuple[GreyImage, ImageInfo]:
    """Decode JPEG, PNG or DICOM bytes, told apart by content.

    Returns:
        (Y, X) uint8 picture, white is dense, and what the allow-list takes from the header.
    Raises:
        Rejected: with a reason code.
    Source: ours.
    """
    if data[:2] == b"\xff\xd8" or data[:8] == b"\x89PNG\r\n\x1a\n":
        image_YX, info = decode_picture(data), ImageInfo()
    else:
        from place.data.dicom import decode_dicom

        image_YX, info = decode_dicom(data)
    if min(image_YX.shape) < MIN_SIDE_PX:
        raise Rejected("too_small", f"a side under {MIN_SIDE_PX} px")
    if image_YX.min() == image_YX.max():
        raise Rejected("blank_image", "all pixels are equal")
    return image_YX, info


def decode_picture(data: bytes) -> GreyImage:
    """Decode a JPEG or PNG of any colour mode and depth; more than 8 bits are scaled to their range, not clipped.

    Raises:
        Rejected: `truncated_image`, `too_large`, `unreadable_image`.
    Source: ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns of bombs below twice its limit; ours is lower and final
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            check_pixel_count(picture.height, picture.width)
            picture.load()
            return picture_to_grey(ImageOps.exif_transpose(picture))
    except Rejected:
        raise
    except Image.DecompressionBombError:
        raise Rejected("too_large", f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # noqa: BLE001 - a decoder may raise anything on hostile bytes; the row is counted
        cut = any(word in str(error).lower() for word in ("truncated", "broken data stream", "eof", "incomplete"))
        raise Rejected("truncated_image" if cut else "unreadable_image") from None


def check_pixel_count(height: int, width: int) -> None:
    """Refuse a picture before memory for it is taken. Raises Rejected."""
    if height * width > MAX_PIXELS:
        raise Rejected("too_large", f"more than {MAX_PIXELS} pixels")


def picture_to_grey(picture: Image.Image) -> GreyImage:
    """A picture of any mode as 8-bit grey; more bits are scaled to their range. Raises Rejected. Source: ours."""
    if picture.mode.startswith(("I", "F")):
        values_YX = np.asarray(picture)
        low, high = values_YX.min(), values_YX.max()
        return np.stack([scale_to_uint8(row, low, high) for row in values_YX])  # all at once takes 24 bytes a pixel
    return np.asarray(picture.convert("L"), dtype=np.uint8)


def scale_to_uint8(values: NDArray[np.generic], low: float, high: float) -> GreyImage:
    """Map low..high linearly to 0..255, and what lies beyond to the nearer end. Source: ours."""
    if not np.isfinite([low, high]).all():
        raise Rejected("unreadable_image", "pixels are not finite")
    scaled = (values.astype(np.float64) - float(low)) * (255.0 / ((float(high) - float(low)) or 1.0))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def shrink_image(image_YX: GreyImage, size_px: int) -> GreyImage:
    """Resize to a short side of `size_px` with antialiasing; a smaller image keeps its size. Source: ours."""
    short = min(image_YX.shape)
    if short <= size_px:
        return image_YX
    height, width = (max(size_px, round(side * size_px / short)) for side in image_YX.shape)
    return np.asarray(Image.fromarray(image_YX).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=4.0))


def encode_grey_jpeg(image_YX: GreyImage, quality: int) -> bytes:
    """Grey baseline JPEG without any metadata. Source: ours."""
    buffer = io.BytesIO()
    Image.fromarray(image_YX).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
