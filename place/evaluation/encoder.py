"""A split through both encoders, once, in fp32: the features that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from place.config import RunError
from place.data.manifest import read_manifest
from place.data.prepared import read_samples
from place.data.streaming import read_report
from place.data.transforms import eval_transform, read_image
from place.evaluation.metrics import Array
from place.model.place import ImageFeatures, TextFeatures
from place.training.checkpoint import LoadedRun

Progress = Callable[[int, int], None]


class Study(NamedTuple):
    """A manifest row (an image) without its pixels; `sentences` are those that the report encoder reads."""

    sample_id: int
    report_group: int
    labels: dict[str, int | None]
    sentences: list[str]


class EncodedSplit(NamedTuple):
    """Studies of a split in sample_id order, the patient of each, features (fp32, on the CPU, as in place.batch)."""

    studies: list[Study]
    unit_B: Array
    image_BE: Tensor
    observations_BKE: Tensor
    text_BE: Tensor
    sentences_BSE: Tensor
    mask_BS: Tensor


def encode_split(
    run: LoadedRun, data_dir: Path, split: str, batch_size: int, on_progress: Progress | None = None
) -> EncodedSplit:
    """Encode every study of a split.

    Args:
        batch_size: studies at once; features do not depend on it.
        on_progress: told the studies done and their total.
    Raises:
        RunError: a feature that is not finite, or a study that the manifest does not know.
    Source: ours.
    """
    units = read_units(data_dir, split)
    studies: list[Study] = []
    images: list[ImageFeatures] = []
    texts: list[TextFeatures] = []
    for samples in take(read_samples(data_dir, split), batch_size):
        studies += [build_study(sample, run.config.data.sections) for sample in samples]
        images.append(encode_images(run, [sample["image"] for sample in samples]))
        texts.append(encode_reports(run, [study.sentences for study in studies[-len(samples) :]]))
        if on_progress:
            on_progress(len(studies), len(units))
    if not studies:
        raise RunError(f"{data_dir}: split '{split}' has no studies; evaluate another split")
    order = sorted(range(len(studies)), key=lambda row: studies[row].sample_id)
    features = [torch.cat(parts)[order] for parts in (*_columns(images, 2), *_columns(texts, 3))]
    studies = [studies[row] for row in order]
    return EncodedSplit(studies, get_units(units, [study.sample_id for study in studies]), *features)


@torch.inference_mode()
def encode_images(run: LoadedRun, jpegs: Sequence[bytes]) -> ImageFeatures:
    """Encode JPEGs as the model sees them in validation: centre crop, no augmentation."""
    features = run.model.encode_image(read_images(run, jpegs))
    return ImageFeatures(*(_check_finite(part.float().cpu(), "image") for part in features))


class PatchFeatures(NamedTuple):
    """Of a batch of images: patches in the joint space (B,N,E), unit length; V-PORs and their attention."""

    patches_BNE: Tensor
    observations_BKE: Tensor
    attention_BKN: Tensor


@torch.inference_mode()
def encode_patches(run: LoadedRun, jpegs: Sequence[bytes]) -> PatchFeatures:
    """Encode JPEGs patch by patch: each token goes through the projection that the whole image goes through.

    Source: inferred (BioViL, one projection for patches and image).
    """
    tokens = run.model.vision(read_images(run, jpegs))
    _, observations_BKE, attention_BKN = run.model.read_image_tokens(tokens)
    parts = run.model.project_image(tokens.patches_BND), observations_BKE, attention_BKN
    return PatchFeatures(*(_check_finite(part.float().cpu(), "image") for part in parts))


@torch.inference_mode()
def encode_occluded(run: LoadedRun, jpeg: bytes, batch_size: int) -> Tensor:
    """Features (N,E) of one image with each patch hidden in turn, and the patches that touch it, as pretraining hides.

    Source: inferred (Zeiler and Fergus 2014, occlusion of a window by grey); its width of three patches is ours.
    """
    image_BCYX, vision = read_images(run, [jpeg]), run.model.vision
    rows, columns = (length // vision.patch_px for length in image_BCYX.shape[-2:])
    place_N2 = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    hidden_NN = (place_N2[:, None] - place_N2).abs().amax(-1) <= 1
    parts = [
        run.model.project_image(vision(image_BCYX.expand(len(hidden_BN), -1, -1, -1), hidden_BN).image_BD)
        for hidden_BN in hidden_NN.to(image_BCYX.device).split(batch_size)
    ]
    return _check_finite(torch.cat(parts).float().cpu(), "image")


class VisualFeatures(NamedTuple):
    """Of a batch of images: patch tokens (B,N,D) before any projection, V-PORs (B,K,E), image feature (B,E)."""

    patches_BND: Tensor
    observations_BKE: Tensor
    image_BE: Tensor


@torch.inference_mode()
def encode_visual(run: LoadedRun, jpegs: Sequence[bytes]) -> VisualFeatures:
    """Everything that a report can be written from, in one pass."""
    tokens = run.model.vision(read_images(run, jpegs))
    image_BE, observations_BKE, _ = run.model.read_image_tokens(tokens)
    parts = tokens.patches_BND, observations_BKE, image_BE
    return VisualFeatures(*(_check_finite(part.float().cpu(), "image") for part in parts))


def read_images(run: LoadedRun, jpegs: Sequence[bytes]) -> Tensor:
    """JPEGs as the model sees them in validation, (B,1,size,size), where the model is."""
    size_px = run.config.data.image_size_px
    images = [eval_transform(read_image(jpeg), size_px, run.mean, run.std) for jpeg in jpegs]
    return torch.stack(images).to(_get_device(run))


@torch.inference_mode()
def encode_reports(run: LoadedRun, reports: Sequence[Sequence[str]]) -> TextFeatures:
    """Encode reports, each a list of sentences."""
    tokenized = [run.tokenizer.encode(list(sentences)) for sentences in reports]
    token_ids_BT, attention_BT, sentence_of_token_BT, *_ = run.tokenizer.collate(tokenized)
    device = _get_device(run)
    features = run.model.encode_text(token_ids_BT.to(device), attention_BT.to(device), sentence_of_token_BT.to(device))
    text_BE, sentences_BSE = (_check_finite(part.float().cpu(), "report") for part in features[:2])
    return TextFeatures(text_BE, sentences_BSE, features.mask_BS.cpu())


def build_study(sample: dict[str, Any], sections: str) -> Study:
    """Keep what the tasks need of a sample."""
    sentences, group = read_report(sample, sections)
    return Study(sample["sample_id"], group, sample["labels"], sentences)


def read_units(data_dir: Path, split: str) -> dict[int, str]:
    """Patient of each study of a split by sample_id; a study without a patient is a unit of its own."""
    rows = read_manifest(data_dir, ["sample_id", "patient"], split)
    pairs = zip(rows["sample_id"].to_pylist(), rows["patient"].to_pylist(), strict=True)
    return {sample_id: patient or str(sample_id) for sample_id, patient in pairs}


def get_units(units: dict[int, str], sample_ids: Sequence[int]) -> Array:
    """Patients of studies, as an array."""
    unknown = [sample_id for sample_id in sample_ids if sample_id not in units]
    if unknown:
        raise RunError(f"sample {unknown[0]} is in the shards but not in manifest.parquet; prepare the data set again")
    return np.array([units[sample_id] for sample_id in sample_ids])


def take(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Cut a stream of samples into lists."""
    stream = iter(samples)
    while chunk := list(islice(stream, size)):
        yield chunk


def _columns(batches: Sequence[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(batch[:count] for batch in batches), strict=True))


def _get_device(run: LoadedRun) -> torch.device:
    return next(run.model.parameters()).device


def _check_finite(features: Tensor, kind: str) -> Tensor:
    if not torch.isfinite(features).all():
        raise RunError(f"the {kind} encoder gave a feature that is not finite; evaluate an earlier checkpoint")
    return features
