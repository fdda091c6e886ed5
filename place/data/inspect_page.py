"""The findings of `place data inspect` as one HTML page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from place.data.inspect import Findings, Groups
from place.data.page import Bar, build_bars, embed_thumbnail, render_page
from place.data.transforms import read_image

_SIGNS = ("positive", "uncertain", "negative", "unknown")


def build_page(card: dict[str, Any], found: Findings, title: str) -> str:
    """HTML of a data set's card and findings.

    Args:
        title: what the data set is called.
    Source: ours.
    """
    measured = found.measured
    return render_page(
        "place.data",
        "inspect.html",
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
    return {
        "split": sample["split"],
        "view": sample["view"] or "view not given",
        "height": height,
        "width": width,
        "thumbnail": embed_thumbnail(image_YX),
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
