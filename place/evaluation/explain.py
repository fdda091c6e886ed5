"""The picture: where the observation that a sentence was paired with looks, beside the words of the sentence."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from place.data.prepared import read_samples
from place.data.report import hash_text
from place.data.streaming import select_sentences
from place.data.transforms import find_square, read_image
from place.evaluation.encoder import encode_images, encode_reports
from place.evaluation.figure import build_figure, draw_box, save_figure
from place.evaluation.metrics import Array
from place.evaluation.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_STUDIES = 6
NUM_PAIRS = 3
TEXT_COLUMNS = 41
MAX_LOOKED_AT = 2000


class Pairing(NamedTuple):
    """A sentence and its V-POR: text, cosine, attention over the patches (a square), and the boxes it speaks of."""

    text: str
    cosine: float
    attention_YX: Array
    boxes: list[dict[str, Any]]


class Explained(NamedTuple):
    """A study to draw: the centre square of its image, boxes in its pixels, positive findings, pairings."""

    image_YX: Array
    boxes: list[dict[str, Any]]
    findings: list[str]
    pairings: list[Pairing]


def write_explanation(task: Task, path: Path) -> None:
    """Draw some studies of the split with the attention of the observations that their sentences are paired with.

    Source: inferred (GLoRIA and MGCA show word and prototype attention); the pairing is ours.
    """
    samples = choose_samples(islice(read_samples(task.data_dir, task.split), MAX_LOOKED_AT), NUM_STUDIES)
    draw_figure(
        [explain_sample(task, sample) for sample in samples],
        path,
        f"checkpoint at step {task.run.step}, split '{task.split}'",
    )


def choose_samples(samples: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Take studies that bring findings not yet shown, then those with the most sentences; no model output decides."""
    ranked = sorted(
        samples,
        key=lambda sample: (-min(len(_list_positive(sample)), 3), -len(sample["sentences"]), sample["sample_id"]),
    )
    chosen: list[dict[str, Any]] = []
    shown: set[str] = set()
    for sample in ranked:
        positive = set(_list_positive(sample))
        if len(chosen) < count and positive - shown:
            chosen.append(sample)
            shown |= positive
    return (chosen + [sample for sample in ranked if all(sample is not other for other in chosen)])[:count]


def explain_sample(task: Task, sample: dict[str, Any]) -> Explained:
    """Pair sentences with observations at least total cost 1 - cos; keep those with a box, then the nearest."""
    texts = select_sentences(sample["sentences"], task.run.config.data.sections)
    image, report = encode_images(task.run, [sample["image"]]), encode_reports(task.run, [texts])
    cosine_SK = (report.sentences_BSE[0][report.mask_BS[0]] @ image.observations_BKE[0].T).numpy()
    side = int(round(image.attention_BKN.shape[-1] ** 0.5))
    attention_KYX = image.attention_BKN[0].reshape(-1, side, side).numpy()
    image_YX, boxes = crop_square(read_image(sample["image"]), sample["boxes"])
    read = _list_read(task, texts)
    pairings = [
        Pairing(read[s], float(cosine_SK[s, k]), attention_KYX[k], _find_boxes(sample, boxes, read[s]))
        for s, k in zip(*linear_sum_assignment(1 - cosine_SK), strict=True)
    ]
    pairings.sort(key=lambda pairing: (not pairing.boxes, -pairing.cosine))
    return Explained(image_YX, boxes, _list_positive(sample), pairings[:NUM_PAIRS])


def crop_square(image_YX: Array, boxes: list[dict[str, Any]]) -> tuple[Array, list[dict[str, Any]]]:
    """The part of a stored image that the model sees, and its boxes moved along."""
    side, top, left = find_square(image_YX.shape)
    moved = [
        box | {"box_xyxy": [v - o for v, o in zip(box["box_xyxy"], (left, top, left, top), strict=True)]}
        for box in boxes
    ]
    return image_YX[top : top + side, left : left + side], moved


def draw_figure(studies: list[Explained], path: Path, subtitle: str) -> None:
    """Draw a row for each study: image with boxes, then attention over the image for each pairing."""
    figure, axes = build_figure(len(studies), 1 + NUM_PAIRS, (10.4, 0.7 + 3.0 * len(studies)), dpi=110)
    for row, study in zip(axes, studies, strict=True):
        _draw_study(row, study)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.68 / height, bottom=0.45 / height, wspace=0.04, hspace=0.34)
    figure.text(0.01, 1 - 0.25 / height, "Where the paired observation looks", fontsize=13, weight="bold", va="center")
    note = f"{subtitle}; colour: attention of the observation (V-POR) paired with the sentence; cyan: the truth"
    figure.text(0.01, 1 - 0.48 / height, note, fontsize=8, color="0.35", va="center")
    save_figure(figure, path)


def _draw_study(row: Iterable[Axes], study: Explained) -> None:
    first, *others = row
    first.imshow(study.image_YX, cmap="gray", vmin=0, vmax=255)
    _draw_boxes(first, study.boxes, named=True)
    _write_below(first, ", ".join(study.findings) or "no positive label", weight="bold")
    for axis, pairing in zip(others, study.pairings, strict=False):
        axis.imshow(study.image_YX, cmap="gray", vmin=0, vmax=255)
        heat_YX = smooth_attention(pairing.attention_YX, study.image_YX.shape[0])
        axis.imshow(heat_YX, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * heat_YX**0.7)
        _draw_boxes(axis, pairing.boxes, named=False)
        _write_below(axis, f"{pairing.text} (cos\N{NO-BREAK SPACE}{pairing.cosine:.2f})")


def smooth_attention(attention_YX: Array, size_px: int) -> Array:
    """Attention as a smooth map in 0..1 over the image: what exceeds an even spread, over its maximum."""
    above_YX = np.maximum(attention_YX - 1 / attention_YX.size, 0).astype(np.float32)
    smooth_YX = np.maximum(cv2.resize(above_YX, (size_px, size_px), interpolation=cv2.INTER_CUBIC), 0)
    return smooth_YX / max(float(smooth_YX.max()), 1e-12)


def _draw_boxes(axis: Axes, boxes: list[dict[str, Any]], named: bool) -> None:
    from matplotlib.patheffects import withStroke

    for number, box in enumerate(boxes):
        x0, y0, _, y1 = box["box_xyxy"]
        draw_box(axis, box["box_xyxy"], linewidth=0.8)
        if named:
            # Names alternate between top and bottom edge: boxes often share a corner.
            y, align = ((y0, "bottom"), (y1, "top"))[number % 2]
            stroke = [withStroke(linewidth=1.6, foreground="black")]
            axis.text(x0, y, box["finding"], fontsize=6.5, color="cyan", va=align, clip_on=True, path_effects=stroke)


def _write_below(axis: Axes, text: str, weight: str = "normal") -> None:
    lines = textwrap.wrap(text, TEXT_COLUMNS if weight == "normal" else TEXT_COLUMNS - 5)
    shown = "\n".join(lines[:3]) + (" ..." if len(lines) > 3 else "")
    axis.text(0.0, -0.03, shown, transform=axis.transAxes, fontsize=7.5, va="top", ha="left", weight=weight)


def _find_boxes(sample: dict[str, Any], boxes: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    places = [index for index, sentence in enumerate(sample["sentences"]) if sentence["text"] == text]
    return [box for box in boxes if box["sentence"] in places]


def _list_positive(sample: dict[str, Any]) -> list[str]:
    return [name for name, value in sample["labels"].items() if value == 1]


def _list_read(task: Task, texts: list[str]) -> list[str]:
    """The sentences that the tokenizer kept, in order: it cuts at the token limit and skips empty ones."""
    by_hash = {hash_text(text): text for text in texts}
    return [by_hash[value] for value in task.run.tokenizer.encode(texts).sentence_hash]
