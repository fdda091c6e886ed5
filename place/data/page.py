"""Pages that need nothing else: one base with the style, filled from a package's template, pictures inside the page."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import cv2

from place.config import RunError
from place.data.images import GreyImage, encode_grey_jpeg

BASE = "page.html"
_THUMBNAIL_PX, _THUMBNAIL_QUALITY = 320, 82


class Bar(NamedTuple):
    """One bar: its height or length is a share of the longest."""

    label: str
    number: int
    share: float


def render_page(package: str, name: str, **values: Any) -> str:
    """HTML of a template of a package, which extends `BASE`; every value is escaped, a missing one is an error.

    Source: ours.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def read(template: str) -> str:
        home = "place.data" if template == BASE else package
        return resources.files(home).joinpath(template).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = lambda count: f"{count:,}"
    return environment.get_template(name).render(**values)


def write_page(path: Path, page: str, advice: str) -> Path:
    """Write a page. Raises RunError, with what to do, where the file cannot be written."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; {advice}") from None
    return path


def build_bars(pairs: Any) -> list[Bar]:
    """Bars of (label, count) pairs, in their order. Source: ours."""
    pairs = list(pairs)
    most = max((count for _, count in pairs), default=0) or 1
    return [Bar(label, count, count / most) for label, count in pairs]


def embed(data: bytes, kind: str) -> str:
    """Bytes of a type, such as image/png, as an address that carries them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def embed_thumbnail(image_YX: GreyImage) -> str:
    """A grey image as an address, its long side at most 320 px."""
    scale = min(1.0, _THUMBNAIL_PX / max(image_YX.shape))
    small_YX = cv2.resize(image_YX, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return embed(encode_grey_jpeg(small_YX, _THUMBNAIL_QUALITY), "image/jpeg")
