"""What the model sees of a stored image: right side up, left on the left, and the same again for the same seed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from place.config import AugmentConfig, RunError
from place.data.transforms import eval_transform, read_image, train_transform

MEAN, STD = 0.4, 0.2
STRONG = AugmentConfig(crop_scale_min=0.5, rotation_deg=45, intensity=0.5)


def to_grey(tensor: torch.Tensor) -> np.ndarray:
    return (tensor[0].numpy() * STD + MEAN) * 255


def draw_left(height: int = 96, width: int = 80) -> np.ndarray:
    """Bright on its left half."""
    image_YX = np.full((height, width), 30, np.uint8)
    image_YX[:, : width // 2] = 220
    return image_YX


def test_a_stored_image_is_read_as_grey() -> None:
    image = draw_left()
    for kind in (".png", ".jpg"):
        read = read_image(cv2.imencode(kind, image)[1].tobytes())
        assert read.dtype == np.uint8
        assert np.abs(read.astype(int) - image).mean() < 2


def test_bytes_that_are_no_image_are_one_line() -> None:
    with pytest.raises(RunError, match="does not decode"):
        read_image(b"no image at all")


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64)])
def test_evaluation_takes_the_centre_square(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    top, left = ((side - 64) // 2 for side in shape)
    seen = eval_transform(image, 64, MEAN, STD)
    assert (seen.shape, seen.dtype) == ((1, 64, 64), torch.float32)
    np.testing.assert_allclose(to_grey(seen), image[top : top + 64, left : left + 64], atol=1e-3)


def test_evaluation_averages_areas_when_it_shrinks() -> None:
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    np.testing.assert_allclose(to_grey(eval_transform(checker.astype(np.uint8), 16, MEAN, STD)), 127.5, atol=1)


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64)])
def test_without_augmentation_training_sees_the_centre_unchanged(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    plain = AugmentConfig(crop_scale_min=1, rotation_deg=0, intensity=0)
    seen = train_transform(image, 64, MEAN, STD, plain, np.random.default_rng(1))
    np.testing.assert_allclose(to_grey(seen), to_grey(eval_transform(image, 64, MEAN, STD)), atol=1.5)


def test_augmentation_is_a_function_of_its_random_numbers_alone() -> None:
    image = draw_left()
    a, b, c = (train_transform(image, 32, MEAN, STD, STRONG, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_augmentation_leaves_the_stored_image_alone() -> None:
    image = draw_left()
    before = image.copy()
    train_transform(image, 32, MEAN, STD, STRONG, np.random.default_rng(0))
    assert np.array_equal(image, before)


def test_training_images_are_never_mirrored() -> None:
    image = draw_left()
    for seed in range(300):
        seen = train_transform(image, 32, MEAN, STD, STRONG, np.random.default_rng(seed))[0]
        assert seen[:, :16].mean() > seen[:, 16:].mean(), f"seed {seed} turned left into right"


def test_training_images_are_never_upside_down() -> None:
    image = draw_left().T.copy()
    for seed in range(100):
        seen = train_transform(image, 32, MEAN, STD, STRONG, np.random.default_rng(seed))[0]
        assert seen[:16].mean() > seen[16:].mean(), f"seed {seed} turned up into down"


def test_an_asymmetric_figure_keeps_its_handedness() -> None:
    # An L: whatever the rotation, its mirror image would fit worse.
    image = np.zeros((96, 96), np.uint8)
    image[20:76, 34:44] = image[66:76, 34:70] = 255
    augment = AugmentConfig(crop_scale_min=0.9, rotation_deg=5, intensity=0)
    upright = eval_transform(image, 48, MEAN, STD)[0]
    for seed in range(100):
        seen = train_transform(image, 48, MEAN, STD, augment, np.random.default_rng(seed))[0]
        fits = [
            np.corrcoef(seen.flatten(), other.flatten())[0, 1] for other in (upright, upright.flip(1), upright.flip(0))
        ]
        assert fits[0] > max(fits[1:]), f"seed {seed}"


def test_crops_cover_the_whole_image() -> None:
    rows, columns = np.indices((120, 80))
    crops = AugmentConfig(crop_scale_min=0.3, rotation_deg=0, intensity=0)
    ends = []
    for seed in range(200):
        for grid in (rows, columns):
            seen = to_grey(train_transform(grid.astype(np.uint8), 24, MEAN, STD, crops, np.random.default_rng(seed)))
            ends.append((seen.min(), seen.max()))
    low, high = np.array(ends[::2]), np.array(ends[1::2])
    assert low[:, 0].min() < 4
    assert low[:, 1].max() > 115
    assert high[:, 0].min() < 4
    assert high[:, 1].max() > 75
