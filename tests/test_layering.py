"""Imports point downward only, and the model is usable without Ray and DeepSpeed: read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; a module may import those of its own line and of the lines above it. The longest name decides.
LAYERS = [
    ["place.kernels", "place.compat"],
    ["place.config"],
    ["place", "place.registration", "place.batch", "place.distributed", "place.node"],
    ["place.kept", "place.trackers", "place.runlog", "place.runs"],
    ["place.data", "place.model", "place.losses"],
    # What a checkpoint is written from belongs to its layer: the engine and its optimiser.
    ["place.training.optim", "place.training.engine", "place.training.state", "place.training.checkpoint"],
    ["place.pretrained"],
    ["place.evaluation"],
    ["place.training"],
    ["place.export", "place.export_card", "place.export_onnx", "place.reporting"],
    ["place.cluster"],
    ["place.screen"],
    ["place.cli", "place.__main__"],
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
APART = ("place.data", "place.model", "place.losses")
HEAVY = ("ray", "deepspeed")


def read_files() -> dict[str, Path]:
    """Every module of the package by its long name."""
    roots = {"place": ROOT / "place", "place.cluster": ROOT / "cluster", "place.kernels": ROOT / "kernels"}
    return {
        ".".join([name, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for name, folder in roots.items()
        for path in sorted(folder.rglob("*.py"))
    }


def read_imports(source: str, known: set[str]) -> set[str]:
    """Modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found


def find_layer(module: str, names: tuple[str, ...] | dict[str, int]) -> str | None:
    """The longest of `names` that is the module or a package around it."""
    parts = module.split(".")
    around = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    # `place` alone is a layer of itself, not the home of modules that have none.
    return next((name for name in around if name in names and (name != "place" or module == "place")), None)


def find_breaks(imports: dict[str, set[str]]) -> list[str]:
    """Imports that point upward, cross between siblings, or pull in what only `cluster` may."""
    breaks = []
    for module, targets in imports.items():
        for target in sorted(targets):
            here, there = find_layer(module, RANKS), find_layer(target, RANKS)
            if target.split(".")[0] in HEAVY and here not in ("place.cluster", "place.cli"):
                breaks.append(f"{module} imports {target}")
            if there is None:
                continue
            if RANKS[there] > RANKS[here or ""]:
                breaks.append(f"{module} imports {target} above it")
            homes = find_layer(module, APART), find_layer(target, APART)
            if all(homes) and homes[0] != homes[1]:
                breaks.append(f"{module} imports {target} beside it")
    return breaks


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    files = read_files()
    return {module: read_imports(path.read_text(), set(files)) for module, path in files.items()}


def test_every_module_has_a_layer(imports: dict) -> None:
    assert len(imports) > 40
    assert [module for module in imports if find_layer(module, RANKS) is None] == []


def test_imports_point_downward_only(imports: dict) -> None:
    assert find_breaks(imports) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("place.data.loader", "from place.model import vision"),
        ("place.model.text", "def f():\n    from place.losses.objective import compute_losses"),
        ("place.losses.instance", "import place.data.tokens"),
        ("place.config", "from place.batch import Batch"),
        ("place.kernels.attention", "from place import config"),
        ("place.evaluation.suite", "from place.training.loop import train"),
        ("place.training.checkpoint", "from place.training import plan"),
        ("place.training.loop", "from place.cluster.worker import run_alone"),
        ("place.training.pretrain", "def f():\n    import deepspeed.comm"),
        ("place.data.prepare", "import ray"),
        ("place.screen", "import place.cli"),
    ],
)
def test_an_import_against_the_order_is_found(module: str, source: str) -> None:
    assert len(find_breaks({module: read_imports(source, set(read_files()))})) == 1
