"""What makes transformers' Auto classes know PLACE after `import place`, without importing transformers for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NamedTuple


class Entry(NamedTuple):
    """A class of ours that an Auto class of transformers is told of."""

    auto: str
    module: str
    name: str


AUTO = "transformers.models.auto"
ENTRIES = {
    f"{AUTO}.configuration_auto": Entry("AutoConfig", "place.pretrained.config", "PlaceConfig"),
    f"{AUTO}.modeling_auto": Entry("AutoModel", "place.pretrained.model", "PlacePretrainedModel"),
    f"{AUTO}.image_processing_auto": Entry("AutoImageProcessor", "place.pretrained.images", "PlaceImageProcessor"),
}
"""Module of transformers, and what is registered once it has been imported."""


class RegisterOnImport(MetaPathFinder):
    """Registers an entry right after the module of transformers that it belongs to was imported.

    transformers has no entry points, and importing it here would cost every `place --help` seconds. Source: ours.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, whose loader also registers; None for modules without an entry."""
        spec = PathFinder.find_spec(name, path, target) if name in ENTRIES else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            prepare()
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def prepare() -> None:
    """Make torchvision importable, which transformers' image processors and models ask for."""
    importlib.import_module("place.compat").patch_torchvision()


def register(module: ModuleType) -> None:
    """Tell an Auto class, in its module, of our class."""
    entry = ENTRIES[module.__name__]
    auto, ours = getattr(module, entry.auto), getattr(importlib.import_module(entry.module), entry.name)
    if entry.auto == "AutoConfig":
        auto.register(ours.model_type, ours, exist_ok=True)
    elif entry.auto == "AutoModel":
        auto.register(ours.config_class, ours, exist_ok=True)
    else:
        auto.register(ours.config_class, slow_image_processor_class=ours, exist_ok=True)


def install() -> None:
    """Register what is imported already, now, and the rest when it is."""
    if not any(isinstance(finder, RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegisterOnImport())
        for name in ENTRIES:
            if name in sys.modules:
                prepare()
                register(sys.modules[name])
