"""The findings of `place data inspect` as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

import cv2

from place.data.images import encode_grey_jpeg
from place.data.inspect import Findings, Groups
from place.data.transforms import read_image

_THUMBNAIL_PX = 320
_SIGNS = ("positive", "uncertain", "negative", "unknown")


class Bar(NamedTuple):
    """One bar: its height or length is a share of the longest."""

    label: str
    number: int
    share: float


def build_page(card: dict[str, Any], found: Findings, title: str) -> str:
    """HTML of a data set's card and findings.

    Args:
        title: what the data set is called.
    Source: ours.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda count: f"{count:,}"
    template = environment.from_string(resources.files("place.data").joinpath("inspect.html").read_text())
    measured = found.measured
    return template.render(
        title=title,
        card=card,
        splits=[(name, card["counts"][name]) for name in ("train", "val", "test")],
        rejects=_rank(Counter(card["drop_reasons"])),
        reject_examples=found.rejects,
        intensity=build_bars(
            [(f"{at * 4} to {at * 4 + 3}", sum(found.intensity[at * 4 : at * 4 + 4])) for at in range(64)]
        ),
        images_read=found.images_read,
        histograms=[
            ("Words in a report", build_bars(iterate_bins(measured["num_words"]))),
            ("Sentences in a report", build_bars(iterate_bins(found.sentences))),
            ("Source height, px", build_bars(iterate_bins(measured["source_height_px"]))),
            ("Source width, px", build_bars(iterate_bins(measured["source_width_px"]))),
            ("Stored height, px", build_bars(iterate_bins(measured["height_px"]))),
            ("Stored width, px", build_bars(iterate_bins(measured["width_px"]))),
        ],
        counted=[(name, _rank(counts)) for name, counts in found.counted.items() if any(counts)],
        spacing=found.spacing_mm,
        labels=_build_label_rows(card["label_counts"]),
        signs=_SIGNS,
        warnings=_rank(found.warnings),
        groups=[("the same report", found.same), ("nearly the same report", found.near)],
        repeated=_list_repeated(found.same, found.same_text),
        samples=[_build_sample(sample) for sample in found.samples],
    )


def build_bars(pairs: Any) -> list[Bar]:
    """Bars of (label, count) pairs, in their order. Source: ours."""
    pairs = list(pairs)
    most = max((count for _, count in pairs), default=0) or 1
    return [Bar(label, count, count / most) for label, count in pairs]


def _rank(counts: Counter[str]) -> list[Bar]:
    return build_bars((name or "not given", count) for name, count in counts.most_common(24))


def iterate_bins(counts: Counter[int], bins: int = 24) -> Iterator[tuple[str, int]]:
    """Label and count of equally wide bins with round limits, over all that occurs. Source: ours."""
    if not counts:
        return
    low, high = min(counts), max(counts)
    width = next(step for step in _round_steps() if low // step * step + bins * step > high)
    begin = low // width * width
    for start in range(begin, high + 1, width):
        label = f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}"
        yield label, sum(counts[value] for value in range(start, start + width))


def _round_steps() -> Iterator[int]:
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10


def _build_label_rows(label_counts: dict[str, dict[str, int]]) -> list[tuple[str, int, list[tuple[str, int, float]]]]:
    """Label, images that have it, and for each sign its count and share; the most frequent first."""
    rows = []
    for name, counts in label_counts.items():
        total = sum(counts.values()) or 1
        rows.append((name, counts["positive"], [(sign, counts[sign], counts[sign] / total) for sign in _SIGNS]))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def _list_repeated(same: Groups, texts: dict[int, str]) -> list[tuple[int, str]]:
    return [(images, texts[group]) for images, group in same.top]


def _build_sample(sample: dict[str, Any]) -> dict[str, Any]:
    image_YX = read_image(sample["image"])
    height, width = image_YX.shape
    scale = min(1.0, _THUMBNAIL_PX / max(height, width))
    small_YX = cv2.resize(image_YX, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return {
        "split": sample["split"],
        "view": sample["view"] or "view not given",
        "height": height,
        "width": width,
        "thumbnail": base64.b64encode(encode_grey_jpeg(small_YX, 82)).decode(),
        "boxes": [_build_box(box) for box in sample["boxes"]],
        "positive": [name for name, sign in sample["labels"].items() if sign == 1],
        "uncertain": [name for name, sign in sample["labels"].items() if sign == -1],
        "sections": list(_group_sections(sample["sentences"])),
    }


def _build_box(box: dict[str, Any]) -> dict[str, Any]:
    x0, y0, x1, y1 = box["box_xyxy"]
    told = " ".join(str(box[name]) for name in ("side", "finding") if box.get(name))
    return {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "told": told}


def _group_sections(sentences: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Sections in their order, each with its sentences joined."""
    sections: dict[str, list[str]] = {}
    for item in sentences:
        sections.setdefault(item["section"], []).append(item["text"])
    yield from ((name, " ".join(texts)) for name, texts in sections.items())
