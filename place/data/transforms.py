"""From a stored image to what the model sees; training randomness is a function of (seed, epoch, sample id) alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from place.config import AugmentConfig, RunError

Grey = NDArray[np.uint8]
_GREYS = np.arange(256) / 255


def read_image(encoded: bytes) -> Grey:
    """Decode a stored JPEG or PNG to grey, uint8 (Y,X). Raises RunError where it does not decode."""
    image_YX = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE)
    if image_YX is None:
        raise RunError("a stored image does not decode; run `place prepare` again into a new folder")
    return image_YX


def find_square(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Side, top and left of the centre square of an image (Y, X), which is what the model sees, in pixels."""
    side, (height, width) = min(shape), shape
    return side, (height - side) // 2, (width - side) // 2


def eval_transform(image_YX: Grey, size_px: int, mean: float, std: float) -> Tensor:
    """Centre square, resized and standardised: fp32 (1,size,size). Source: ours."""
    side, top, left = find_square(image_YX.shape)
    square = image_YX[top : top + side, left : left + side]
    method = cv2.INTER_AREA if side > size_px else cv2.INTER_LINEAR
    resized = cv2.resize(square, (size_px, size_px), interpolation=method)
    return _map_greys(resized, (_GREYS - mean) / std)


class Warp(NamedTuple):
    """A square crop that is turned: its side in pixels of the image, the angle in degrees, its centre in pixels."""

    crop_px: float
    angle: float
    centre_x: float
    centre_y: float


def draw_warp(shape: tuple[int, ...], augment: AugmentConfig, rng: np.random.Generator) -> Warp:
    """Draw a crop that lies within an image of a shape (Y,X), in its centre where none is smaller, and an angle."""
    crop_px = min(shape) * np.sqrt(rng.uniform(augment.crop_scale_min, 1))
    angle = rng.uniform(-augment.rotation_deg, augment.rotation_deg)
    places = rng.uniform(0, 1, 2) if augment.crop_scale_min < 1 else (0.5, 0.5)
    centre_x, centre_y = (crop_px / 2 + place * (side - crop_px) for place, side in zip(places, shape[::-1]))
    return Warp(crop_px, angle, centre_x, centre_y)


def train_transform(
    image_YX: Grey,
    size_px: int,
    mean: float,
    std: float,
    augment: AugmentConfig,
    rng: np.random.Generator,
    warp: Warp | None = None,
) -> Tensor:
    """Random crop, rotation, intensity, fp32 (1,size,size); never a flip: reports say left and right.

    Args:
        warp: crop and rotation, where they were drawn before; none draws them.
    Source: ours.
    """
    warped = _apply(warp or draw_warp(image_YX.shape, augment, rng), image_YX, size_px, cv2.BORDER_REPLICATE)
    contrast, brightness = 1 + rng.uniform(-1, 1, 2) * augment.intensity
    middle = cv2.mean(warped)[0] / 255
    return _map_greys(warped, ((_GREYS - middle) * contrast + middle * brightness - mean) / std)


def warp_mask(mask_YX: NDArray[np.bool_], size_px: int, warp: Warp) -> NDArray[np.bool_]:
    """A mask (Y,X) as the image that it belongs to: bool (size,size), nothing beyond the image's border."""
    return _apply(warp, mask_YX.astype(np.float32), size_px, cv2.BORDER_CONSTANT) >= 0.5


def _apply(warp: Warp, image_YX: NDArray[Any], size_px: int, border: int) -> NDArray[Any]:
    image_YX, shrink = _shrink_before_warp(image_YX, warp.crop_px / size_px)
    zoom = size_px / (warp.crop_px * shrink)
    centre = np.array([warp.centre_x, warp.centre_y]) * shrink
    matrix = cv2.getRotationMatrix2D((centre[0], centre[1]), warp.angle, zoom)
    matrix[:, 2] += size_px / 2 - centre
    return cv2.warpAffine(image_YX, matrix, (size_px, size_px), flags=cv2.INTER_LINEAR, borderMode=border)


def _shrink_before_warp(image_YX: NDArray[Any], ratio: float) -> tuple[NDArray[Any], float]:
    """Area-average first where bilinear sampling would alias."""
    if ratio < 1.5:
        return image_YX, 1.0
    shrink = 1 / ratio
    return cv2.resize(image_YX, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA), shrink


def _map_greys(image_YX: Grey, values: NDArray[np.float64]) -> Tensor:
    """What each grey level becomes, looked up: one pass over the image, where arithmetic takes one a step."""
    return torch.from_numpy(cv2.LUT(image_YX, values.astype(np.float32)))[None]
