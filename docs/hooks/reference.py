"""MkDocs hook: writes the reference of the configuration and of the command line from the code, at each build."""

from __future__ import annotations

import contextlib
import io
import os
import types
import typing
from collections.abc import Iterator
from typing import Any
from unittest import mock

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from place.cli import VERBS, build_parser
from place.config import Config, PrepareConfig, Section

_SIGNS = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated parts where a page asks for them, as `<!-- configuration -->`."""
    for name, build in PARTS.items():
        mark = f"<!-- {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, build())
    return markdown


def build_configuration() -> str:
    """Every knob of `Config` as Markdown, a heading a section."""
    return "\n".join(_describe_section(Config, ""))


def build_fields(section: type[Section]) -> str:
    """The fields of one section, as definitions."""
    return "\n".join(line for name, field in section.model_fields.items() for line in _describe(name, field))


def build_commands() -> str:
    """The help of every verb, as the command line prints it."""
    return "\n".join(f"## place {verb}\n\n```text\n{read_help(verb)}```\n" for verb in VERBS)


PARTS = {
    "configuration": build_configuration,
    "prepare": lambda: build_fields(PrepareConfig),
    "commands": build_commands,
}


def read_help(verb: str) -> str:
    """What `place VERB --help` prints, 80 columns wide."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        build_parser().parse_args([verb, "--help"])
    return printed.getvalue()


def _describe_section(section: type[Section], prefix: str) -> Iterator[str]:
    inner = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            inner.append((f"{prefix}{name}", kind, field.description))
        else:
            yield from _describe(prefix + name, field)
    for path, kind, description in inner:
        yield f"\n{'#' * (2 + path.count('.'))} {path} {{: #{path} }}\n\n{description}\n"
        yield from _describe_section(kind, f"{path}.")


def _describe(path: str, field: FieldInfo) -> Iterator[str]:
    assert field.description, f"{path} has no docstring"
    yield f"\n`{path}` {{: #{path} }}\n:   {' '.join(field.description.split())}"
    yield f"    <br>{_describe_kind(field.annotation)}{_describe_range(field)}{_describe_default(field)}\n"
    for inner in _find_lists(field.annotation):
        for name, each in inner.model_fields.items():
            yield from _describe(f"{path}.{name}", each)


def _find_lists(kind: Any) -> list[type[Section]]:
    """Sections that a field is a list of."""
    return [item for item in typing.get_args(kind) if isinstance(item, type) and issubclass(item, Section)]


def _describe_kind(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if item is type(None) else _describe_kind(item) for item in arguments)
    if origin in (tuple, list):
        items = [_describe_kind(item) for item in arguments if item is not ...]
        return f"list of {items[0]}" if origin is list or ... in arguments else f"list of {len(items)}: {items[0]}"
    if origin is dict:
        return f"mapping of {_describe_kind(arguments[0])} to {_describe_kind(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "mapping, see below"
    return _NAMES[kind]


def _describe_range(field: FieldInfo) -> str:
    limits = [
        f"{word} {getattr(limit, sign):g}"
        for limit in field.metadata
        for sign, word in _SIGNS.items()
        if hasattr(limit, sign)
    ]
    return f" {' and '.join(limits)}" if limits else ""


def _describe_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "; must be given"
    if field.default is None:
        return "; default none (`null`)"
    shown = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"; default `{str(shown).lower() if isinstance(shown, bool) else shown}`"
