"""The package as others find it: uninstalled, in parts, and without what only clusters have."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Drops what an editable install left on the way, then looks for `place` in the folder given.
UNINSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [{root!r}] + [path for path in sys.path if path and "place" not in path]
"""
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Blocker())
"""
OPTIONAL = ("ray", "deepspeed", "streaming", "xformers", "pydicom", "rich", "tensorboard")


def run_code(code: str, cwd: Path) -> str:
    """Run Python isolated from the folder it starts in: standard output."""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_checkout_works_uninstalled(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for name in ("place", "cluster", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = UNINSTALLED.format(root=str(copy)) + (
        "import place.cluster.launch as a, place.kernels.attention as b; print(a.__file__); print(b.__file__)"
    )
    files = run_code(code, tmp_path).splitlines()
    assert files == [str(copy / "cluster" / "launch.py"), str(copy / "kernels" / "attention" / "__init__.py")]


def test_the_folders_at_the_top_keep_their_short_names_to_themselves(tmp_path: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('cluster', 'kernels') if u.find_spec(n)])"
    assert run_code(code, tmp_path) == "[]"


def test_the_python_that_is_asked_for_is_the_oldest_that_all_pins_take() -> None:
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    there = {
        dist.name.lower().replace("_", "-"): dist.metadata.get("Requires-Python", "")
        for dist in metadata.distributions()
    }
    needs = {
        name: SpecifierSet(there[name]) for name in (pin.lower().replace("_", "-") for pin in pins) if name in there
    }
    assert len(needs) > 100
    assert all("3.11.5" in need for need in needs.values())
    refuse = {name for name, need in needs.items() if "3.11.4" not in need}
    pages = {Requirement(text).name for text in metadata.requires("mkdocs-material") or []}
    assert refuse
    assert refuse <= pages, "the package itself takes 3.11.0"
    assert [name for name, need in needs.items() if "3.10.99" not in need and name not in pages]
    assert 'requires-python = ">=3.11"\n' in (ROOT / "pyproject.toml").read_text()
    assert "sys.version_info < (3, 11, 5)" in (ROOT / "Makefile").read_text()
    for name in ("README.md", "docs/index.md", "docs/getting-started.md"):
        assert re.findall(r"Python ([\d.]+) or newer", (ROOT / name).read_text()) == ["3.11.5"], name


def test_what_is_declared_is_imported() -> None:
    by_others = {"pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "tensorboard"}  # pydicom, torch.utils.tensorboard
    source = "\n".join(
        path.read_text() for name in ("place", "cluster", "kernels") for path in (ROOT / name).rglob("*.py")
    )
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.MULTILINE))
    modules: dict[str, set[str]] = {}
    for module, names in metadata.packages_distributions().items():
        for name in names:
            modules.setdefault(canonicalize_name(name), set()).add(module)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = {canonicalize_name(Requirement(text).name) for text in declared}
    assert {name for name in needed if not modules[name] & imported} == by_others


def test_the_demo_leaves_a_gpu_alone(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "place"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$1 on ${CUDA_VISIBLE_DEVICES-all} GPUs" >> said\n')
    program.chmod(0o755)
    (tmp_path / "ready").touch()
    made = ["--old-file=ready", "BIN=bin", "READY=ready", "demo"]
    for given, said in (([], ""), (["CUDA_VISIBLE_DEVICES=0,1"], "0,1")):
        subprocess.run(["make", "-f", str(ROOT / "Makefile"), *made, *given], cwd=tmp_path, check=True)
        assert (tmp_path / "said").read_text().splitlines() == [
            f"{verb} on {said} GPUs" for verb in ("prepare", "pretrain", "evaluate")
        ]
        (tmp_path / "said").unlink()


PARTS = """
import place.kernels.attention, place.kernels.patch_correlation
import place.model.place, place.losses.objective
import place.data.transforms, place.data.tokens, place.data.report
"""


def test_kernels_model_and_losses_import_without_what_only_clusters_have(tmp_path: Path) -> None:
    run_code(BLOCKED.format(blocked=OPTIONAL) + PARTS, tmp_path)


def test_the_blocker_blocks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="pydicom is not here"):
        run_code(BLOCKED.format(blocked=OPTIONAL) + "import pydicom, streaming", tmp_path)


def test_a_run_is_started_without_the_imports_of_its_workers(tmp_path: Path) -> None:
    """They take 10 s on a slow core, and Ray's controller, which reads the launcher's module, waits for them too."""
    code = """
import sys
import place.cli, place.cluster.launch, place.cluster.standing, place.training.start
print([name for name in ("torch", "streaming", "transformers", "ray") if name in sys.modules])
"""
    assert run_code(code, tmp_path).splitlines() == ["[]"]


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    code = """
import os, sys
import torch, numpy, cv2
from place.compat import patch_torchvision
patch_torchvision()
import streaming  # what libraries do at import is theirs
before = dict(os.environ), torch.get_rng_state().sum(), numpy.random.get_state()[1].sum(), torch.get_num_threads()
import place.training.pretrain, place.cluster.launch, place.evaluation.suite
after = dict(os.environ), torch.get_rng_state().sum(), numpy.random.get_state()[1].sum(), torch.get_num_threads()
print([name for name, a, b in zip(("environment", "torch seed", "numpy seed", "threads"), before, after) if a != b])
print(torch.distributed.is_initialized(), any(name.split(".")[0] in ("ray", "deepspeed") for name in sys.modules))
"""
    assert run_code(code, tmp_path).splitlines() == ["[]", "False False"]
