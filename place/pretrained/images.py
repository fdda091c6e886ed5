"""From a radiograph to what an exported model takes: the same centre square as in training's validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from place.data.images import Rejected, picture_to_grey
from place.data.transforms import Grey, eval_transform
from place.pretrained.config import PlaceConfig


class PlaceImageProcessor(BaseImageProcessor):
    """Grey images to `pixel_values` (B,1,Y,X): centre square, resized, standardised.

    Args:
        size_px: side of the square the model was trained on.
        image_mean, image_std: of grey levels from 0 to 1.
    """

    config_class = PlaceConfig
    model_input_names = ["pixel_values"]

    def __init__(self, size_px: int = 224, image_mean: float = 0.5, image_std: float = 0.25, **kwargs: Any):
        super().__init__(**kwargs)
        self.size_px, self.image_mean, self.image_std = size_px, image_mean, image_std

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare one image or a list: PIL images, or uint8 arrays (Y,X). Raises ValueError for anything else.

        PIL images of more than 8 bits are scaled to their range, as `place prepare` does.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        pixels = [eval_transform(to_grey(image), self.size_px, self.image_mean, self.image_std) for image in images]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)


def to_grey(image: Any) -> Grey:
    """A PIL image or a uint8 array (Y,X) as a uint8 array (Y,X)."""
    try:
        image_YX = picture_to_grey(image) if isinstance(image, Image.Image) else np.asarray(image)
    except Rejected as error:
        raise ValueError(f"expected a PIL image of finite pixels: {error.detail}") from None
    if image_YX.dtype != np.uint8 or image_YX.ndim != 2:
        raise ValueError(
            f"expected a PIL image or a uint8 array (rows, columns), got {image_YX.dtype} of shape {image_YX.shape}; "
            "DICOM files first need their VOI LUT: place.data.dicom reads them"
        )
    return image_YX
