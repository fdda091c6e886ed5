"""A frozen image encoder as the image tasks see it: stored images in, pooled features and a grid of patches out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from place.config import AugmentConfig, RunError
from place.data.masks import Mask
from place.data.transforms import Warp, draw_warp, eval_transform, read_image, train_transform, warp_mask
from place.model.vision import VisionTokens
from place.training.checkpoint import LoadedRun


@dataclass(frozen=True)
class FrozenEncoder:
    """Any vision model behind one interface.

    Args:
        name: what results call it.
        vision: standardised images (B,C,size,size) to `VisionTokens`, in eval mode; patches in a square, row by row.
        size_px, channels: of the images it takes; a grey image is repeated over the channels.
        mean, std: of grey levels from 0 to 1, one a channel.
        patch_px: pixels of the image along a side of a patch.
        step: of the checkpoint of a run; none for other encoders.
        commit: of what trained it, as far as it is told.
    """

    name: str
    vision: nn.Module
    size_px: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_px: int
    step: int | None = None
    commit: str | None = None

    def encode_images(self, jpegs: Sequence[bytes]) -> Tensor:
        """What stands for each image in the encoder itself (B,D), before any projection. Raises RunError."""
        return _check_finite(self._encode(jpegs).image_BD)

    def encode_patches(self, jpegs: Sequence[bytes]) -> Tensor:
        """Patch features (B,N,D) of a square grid, before any projection. Raises RunError."""
        return _check_finite(self._encode(jpegs).patches_BND)

    def encode_both(self, jpegs: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """`encode_images` and `encode_patches` in one pass."""
        tokens = self._encode(jpegs)
        return _check_finite(tokens.image_BD), _check_finite(tokens.patches_BND)

    def read_images(self, jpegs: Sequence[bytes]) -> Tensor:
        """JPEGs as the encoder takes them, fp32 (B,C,size,size): centre square, no augmentation."""
        images = [read_image(jpeg) for jpeg in jpegs]
        channels = [
            torch.stack([eval_transform(image, self.size_px, mean, std)[0] for image in images])
            for mean, std in zip(self.mean, self.std, strict=True)
        ]
        return torch.stack(channels, dim=1)

    def draw_images(self, jpegs: Sequence[bytes], augment: AugmentConfig, rng: np.random.Generator) -> Tensor:
        """JPEGs as the encoder is trained on them, fp32 (B,C,size,size): augmented as in pretraining, never flipped."""
        return self._draw(jpegs, augment, rng)[0]

    def draw_masked(
        self,
        jpegs: Sequence[bytes],
        masks: Sequence[Sequence[Mask | None]],
        augment: AugmentConfig,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Images as `draw_images` has them, and their masks (B,F,size,size), bool, cropped and turned with them.

        Args:
            masks: for each image one a finding, in the pixels of the stored image; none is empty.
        """
        images, warps = self._draw(jpegs, augment, rng)
        none_YX = np.zeros((self.size_px, self.size_px), bool)
        rows = [
            [none_YX if mask is None else warp_mask(mask, self.size_px, warp) for mask in own]
            for own, warp in zip(masks, warps, strict=True)
        ]
        return images, torch.from_numpy(np.array(rows))

    @property
    def device(self) -> torch.device:
        """Where the encoder is, and what is trained on its tokens."""
        return next(self.vision.parameters()).device

    @cached_property
    def weights(self) -> str:
        """xxh64 of all weights, by name."""
        digest = xxhash.xxh64()
        for name, weight in sorted(self.vision.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().view(torch.uint8).numpy() if weight.ndim else str(weight.item()))
        return digest.hexdigest()

    def _draw(
        self, jpegs: Sequence[bytes], augment: AugmentConfig, rng: np.random.Generator
    ) -> tuple[Tensor, list[Warp]]:
        grey, warps = [], []
        for image in map(read_image, jpegs):
            warps.append(draw_warp(image.shape, augment, rng))
            grey.append(train_transform(image, self.size_px, 0.0, 1.0, augment, rng, warps[-1]))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (torch.stack(grey) - mean) / std, warps

    @torch.inference_mode()
    def _encode(self, jpegs: Sequence[bytes]) -> VisionTokens:
        return self.vision(self.read_images(jpegs).to(self.device))


def wrap_run(run: LoadedRun, name: str) -> FrozenEncoder:
    """The image encoder of a run or of an export of ours."""
    size_px, patch_px = run.config.data.image_size_px, run.model.vision.patch_px
    return FrozenEncoder(name, run.model.vision, size_px, 1, (run.mean,), (run.std,), patch_px, run.step, run.commit)


def name_run(run_dir: Path) -> str:
    """What a run is called, without the folders of the machine that trained it."""
    return f"run {run_dir.resolve().name}"


def _check_finite(features: Tensor) -> Tensor:
    if not torch.isfinite(features).all():
        raise RunError("the image encoder gave a feature that is not finite; evaluate other weights")
    return features.float().cpu()
