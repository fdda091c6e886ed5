"""The pages of docs/: they build, their commands and keys exist, their examples run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from browser.look import look_at
from documents import read_blocks, read_commands
from PIL import Image
from place.cluster.scaling import RungConfig, ScaleConfig
from place.cluster.scaling_model import Network
from place.kernels.patch_correlation import METHODS
from torch.distributed.run import get_args_parser

from place.cli import build_parser, main
from place.config import Config, EvaluationConfig, PrepareConfig, Section, UsageError, build_config, check_config
from place.data.prepare import run_prepare
from place.data.protocol import Protocol
from place.data.sources import SOURCES
from place.evaluation.suite import TASKS, run_encoder_evaluation

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
ALL = "\n".join(PAGES.values())
COMMANDS = [(page, words) for page, text in PAGES.items() for words in read_commands(read_blocks(text, "sh"), True)]
SECTIONS = "|".join(Config.model_fields)
KEY = re.compile(rf"`((?:{SECTIONS})(?:\.[a-z_]+)+)(?:=([^`\s]*))?`")
FILE = re.compile(r"`((?:configs|slurm|cluster|kernels|place|tests)/[\w./-]+\.\w+)`")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; --strict fails at a link, an anchor or a page that is not there."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.browser
def test_every_page_is_whole_in_a_browser(site: Path) -> None:
    # 404.html is for a server: its addresses begin at the root.
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert {page.name for page in pages} >= {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert look_at(pages) == []


def test_the_reference_has_every_key_with_its_docstring_and_default(site: Path) -> None:
    page = (site / "configuration.html").read_text()
    assert list_keys(Config) <= set(re.findall(r'<dt id="([\w.]+)"', page))
    text = re.sub(r"<[^>]+>", "", page)
    assert "Optimiser steps between two lines of metrics.jsonl." in text
    assert "whole number from 1; default 10" in text


def test_the_pages_load_nothing_from_the_net(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]* src="?([^" >]+)|<link[^>]* href="?([^" >]+)', page.read_text()
        )
        assert not [address for pair in loaded for address in pair if "//" in address], page


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page} {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_a_command_is_understood(page: str, words: list[str]) -> None:
    arguments = build_parser().parse_args(words)
    config = getattr(arguments, "config", None)
    assert config is None or (ROOT / config).is_file(), config
    if arguments.verb != "scale":
        build_config(config and ROOT / config, getattr(arguments, "overrides", []))


def list_keys(section: type[Section], prefix: str = "") -> set[str]:
    """Dotted names of the knobs, sections left out."""
    keys = set()
    for name, field in section.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys |= list_keys(field.annotation, f"{prefix}{name}.") if inner else {prefix + name}
    return keys


def test_keys_that_are_named_exist() -> None:
    sections = {key.rsplit(".", count)[0] for key in list_keys(Config) for count in range(1, key.count(".") + 1)}
    free = ("model.vision.overrides.", "engine.deepspeed.", "model.safetensors")
    for key, value in KEY.findall(ALL):
        assert key in list_keys(Config) | sections or key.startswith(free), key
        if value and not re.search("[A-Z.]{3}", value):
            build_config(None, [f"{key}={value}"])


def test_the_keys_of_a_ladder_are_those_of_the_code() -> None:
    table = PAGES["scaling.md"].partition("### Keys of a ladder")[2].partition("\n## ")[0]
    told = {name for line in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)}
    assert told == {*ScaleConfig.model_fields}
    assert {*RungConfig.model_fields} <= {*re.findall(r"`(\w+)`", table)}
    (network,) = re.findall(r"^\| `network` \|.*", table, re.MULTILINE)
    assert {*re.findall(r"`(\w+)`", network)} - {"network", "ring", "tree"} == {*Network.model_fields}


def test_files_and_make_targets_that_are_named_exist() -> None:
    for name in FILE.findall(ALL):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    for module in re.findall(r"python -m ([\w.]+)", ALL):
        path = module.replace(".", "/")
        assert (
            (ROOT / f"{path}.py").is_file()
            or (ROOT / f"{path.removeprefix('place/')}.py").is_file()
            or module == "place"
        )
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", ALL, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_options_of_torchrun_that_are_named_are_its_own() -> None:
    lines = [line for block in read_blocks(ALL, "sh") for line in block.splitlines() if line.startswith("torchrun ")]
    (signals,) = re.findall(r"`(--signals-to-handle=\S+)`", PAGES["clusters.md"])
    for line in lines:
        known = get_args_parser().parse_args([signals, *shlex.split(line.split("#")[0])[1:]])
        assert (known.module, known.training_script) == (True, "place")
        assert all(hasattr(signal, name) for name in known.signals_to_handle.split(","))
    assert lines


def test_yaml_blocks_are_configurations_or_protocols() -> None:
    blocks = read_blocks(ALL, "yaml")
    assert blocks
    for block in blocks:
        tree = yaml.safe_load(block)
        if "layout" in tree:
            Protocol.model_validate(tree)
            continue
        tree.pop("extends", None)
        check_config(tree)


def read_texts() -> list[str]:
    """All text in the code, with a mark for what varies."""
    texts = []
    for folder in ("place", "cluster", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(getattr(part, "value", "") if is_text(part) else "*" for part in node.values))
                elif is_text(node):
                    texts.append(node.value)
    return texts


def is_text(node: ast.AST) -> bool:
    """Whether a node is plain text."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    messages = re.findall(r"^### `(.+)`$", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(messages) >= 25
    texts = read_texts()
    for message in messages:
        if message.startswith("optim.lr: "):  # pydantic's words
            with pytest.raises(UsageError, match=message):
                build_config(None, ["optim.lr=-1"])
            continue
        pattern = re.sub(r"\bNAME\b|\bN\b", ".+?", re.escape(message))
        assert any(re.match(pattern, text) for text in texts), message


def test_what_is_told_to_be_installed_can_be() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = "\n".join([*read_texts(), ALL, (ROOT / "README.md").read_text()])
    named = re.findall(r"-e \.\[([\w-]+)\]", told)
    assert {*named} >= {"bench", "clinical", "gpu", "track"}
    assert {*named} <= {*extras}
    assert "place-cxr[" not in told, "PLACE is on no package index"


def test_the_reasons_of_rejection_are_those_of_the_code() -> None:
    table = PAGES["preparing-data.md"].partition("## Reasons of rejection")[2]
    told = {name for line in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)}
    source = "\n".join(path.read_text() for path in (ROOT / "place" / "data").glob("*.py"))
    raised = re.findall(r'Rejected\(\s*"(\w+)"', source) + re.findall(r'mark_rejects\(\s*[^"]*?"(\w+)"\s*\)', source)
    assert {*raised} - told == set()
    assert {name for name in told if f'"{name}"' not in source} == set()


@pytest.mark.parametrize("page", ["docs/kernel.md", "kernels/README.md"])
def test_the_methods_of_the_kernel_that_are_listed_are_all(page: str) -> None:
    lines = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| .+ \| .+ \|$", (ROOT / page).read_text(), re.MULTILINE)
    listed = {name for line in lines for name in re.findall(r"`(\w+)`", line)}
    assert {*METHODS} <= listed


def run_block(page: str, word: str) -> None:
    """Run the Python block of a page that holds the word."""
    (code,) = [block for block in read_blocks(PAGES[page], "python") if word in block]
    exec(compile(code, page, "exec"), {"__name__": page})


@pytest.mark.parametrize(("page", "word"), [("kernel.md", "patch_corr_loss"), ("extending.md", "sigmoid_loss")])
def test_an_example_runs(page: str, word: str) -> None:
    run_block(page, word)


def test_the_examples_of_a_source_and_of_a_task_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "csv", SOURCES["csv"])
    monkeypatch.setitem(TASKS, "feature_norm", TASKS["retrieval"])
    files, data, salt = tmp_path / "files", tmp_path / "data", tmp_path / "salt"
    files.mkdir()
    salt.write_text("0123456789abcdef")
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(files / f"P{number // 2}_{number}.png")
        (files / f"P{number // 2}_{number}.txt").write_text(f"FINDINGS: The lungs are clear, as in study {number}.")
    run_block("extending.md", "open_pairs")
    config = {"source": "csv", "input": str(files), "output": str(data), "salt_file": str(salt), "num_workers": 1}
    card = run_prepare(PrepareConfig(**config, split=(0.4, 0.3, 0.3)))
    assert card["counts"]["kept"] == 24
    run_block("extending.md", "run_feature_norm")
    results = run_encoder_evaluation(
        "timm:resnet18", data, ["feature_norm"], tmp_path / "out", "test", EvaluationConfig(bootstrap=20), True
    )
    assert results["feature_norm"].num_samples == card["counts"]["test"]["images"] > 0
    assert results["feature_norm"].metrics["norm"].value > 0


(TABLE,) = read_blocks(PAGES["getting-started.md"], "csv")
MINE = [words for page, words in COMMANDS if page == "getting-started.md" and "datasets/mine" in " ".join(words)]


def prepare_mine(table: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out the table with its images in a folder, go there, and prepare it as the page says."""
    salt = folder / "salt" / "place" / "salt"
    salt.parent.mkdir(parents=True)
    salt.write_text("0123456789abcdef")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "salt"))
    monkeypatch.chdir(folder)
    shutil.copytree(ROOT / "configs", "configs")
    Path("metadata.csv").write_text(table)
    Path("images").mkdir()
    for number, line in enumerate(table.splitlines()[1:]):
        if not line.startswith("gone"):
            pixels = np.random.default_rng(number).integers(0, 255, (64, 64), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("images") / line.split(",")[0])
    (prepare,) = [words for words in MINE if words[0] == "prepare"]
    assert main([*prepare, "--launcher", "local"]) == 0


def test_the_first_hour_on_a_table_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_mine(TABLE, tmp_path, monkeypatch)
    rejected = pq.read_table("datasets/mine/rejected.parquet")["reason"].to_pylist()
    assert sorted(rejected) == ["missing_image", "view_excluded"]
    assert {*pq.read_table("datasets/mine/manifest.parquet")["split"].to_pylist()} == {"train", "val", "test"}
    for words in MINE:
        if words[0] == "data":
            assert main(words) == 0, words


def test_a_larger_table_is_trained_on_and_judged_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, *lines = TABLE.splitlines()
    cells = [line.split(",", 3) for line in lines if not line.startswith("gone")]
    rows = [f"{n}{file},{n}{patient},{n}{study},{rest}" for n in range(40) for file, patient, study, rest in cells]
    prepare_mine("\n".join([header, *rows]), tmp_path, monkeypatch)
    smaller = {
        "pretrain": ["cluster.launcher=local", "engine.kind=torch", "train.max_steps=1"],
        "evaluate": ["evaluation.bootstrap=20", "evaluation.gallery_size=5", "evaluation.generation.steps=2"],
    }
    for words in MINE:
        if words[0] in smaller and "configs/pretrain_vitb16.yaml" not in words:
            assert main([*words, *smaller[words[0]]]) == 0, words
    result = json.loads(Path("runs/mine/evaluation/zero_shot.json").read_text())
    assert [name for name in result["metrics"] if "effusion" in name]
