"""Configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from documents import read_commands
from place.cluster.scaling import load_scale

from place.cli import build_parser
from place.config import Config, UsageError, build_config, check_config, dump_config
from place.evaluation.ablation import load_experiment

ALL = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
CONFIGS = [path for path in ALL if path.parent.name != "eval"]  # those are of tests/data/test_protocols.py


def write(path: Path, **tree: object) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ({"trian": {}}, "train"),
        ({"train": {"global_bach": 4}}, "train.global_batch"),
        ({"model": {"vision": {"souce": "scratch"}}}, "model.vision.source"),
        ({"data": {"augment": {"rotation": 3}}}, "data.augment.rotation_deg"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(wrong: dict, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{near}'") as caught:
        check_config(wrong)
    assert "\n" not in str(caught.value)


def test_an_unknown_override_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown config key 'optim\.learning_rate'"):
        build_config(None, ["optim.learning_rate=3"])


def test_one_extends_is_merged_key_by_key(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", train={"epochs": 7, "accumulation": 2}, model={"text": {"width": 64, "depth": 3}})
    child = write(tmp_path / "child.yaml", extends="base.yaml", train={"epochs": 9}, model={"text": {"width": 32}})
    config = build_config(child)
    assert (config.train.epochs, config.train.accumulation) == (9, 2)
    assert (config.model.text.width, config.model.text.depth) == (32, 3)


def test_the_path_of_a_base_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", train={"epochs": 7})
    assert build_config(write(tmp_path / "sub" / "child.yaml", extends="../base.yaml")).train.epochs == 7


def test_a_second_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", train={"epochs": 7})
    write(tmp_path / "b.yaml", extends="a.yaml")
    with pytest.raises(UsageError, match="only one `extends`"):
        build_config(write(tmp_path / "c.yaml", extends="b.yaml"))


def test_a_list_of_bases_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected the path of one YAML file"):
        build_config(write(tmp_path / "c.yaml", extends=["a.yaml", "b.yaml"]))


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.max_steps=5", lambda c: c.train.max_steps == 5),
        ("train.max_steps=null", lambda c: c.train.max_steps is None),
        ("optim.lr=1.0e-3", lambda c: c.optim.lr == 1e-3),
        ("optim.lr=1e-3", lambda c: c.optim.lr == 1e-3),
        ("run.tensorboard=false", lambda c: c.run.tensorboard is False),
        ("run.dir=runs/a=b", lambda c: c.run.dir == "runs/a=b"),
        ("evaluation.findings=[edema, nodule]", lambda c: c.evaluation.findings == ["edema", "nodule"]),
        (
            "engine.deepspeed={wall_clock_breakdown: true}",
            lambda c: c.engine.deepspeed == {"wall_clock_breakdown": True},
        ),
        ("model.vision.overrides.depth=2", lambda c: c.model.vision.overrides == {"depth": 2}),
        *((f"data.cache_limit='{size}'", lambda c: bool(c.data.cache_limit)) for size in ("9", "9b", "1.5 GB", ".5tb")),
    ],
)
def test_a_dotted_override_has_the_type_that_yaml_gives_it(override: str, read) -> None:
    assert read(build_config(None, [override]))


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    assert build_config(write(tmp_path / "a.yaml", train={"epochs": 7}), ["train.epochs=8"]).train.epochs == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=0", "train.epochs: .*greater than or equal to 1.*got 0"),
        ("engine.zero_stage=4", "engine.zero_stage: .*got 4"),
        ("train.epochs=many", "train.epochs: .*got 'many'"),
        ("train.epochs", "write it as section.key=value"),
        ("train.epochs.more=1", None),
        ("train=[1", "not YAML"),
        (
            "run.dir=2024-13-01",
            r"^run\.dir=2024-13-01: no value of YAML \(month must be in 1\.\.12\); put quotes around",
        ),
        ("data=3", "data: .*got 3"),
        ("run.seed=-1", "run.seed: .*greater than or equal to 0.*got -1"),
        ("data.cache_limit=lots", "data.cache_limit: .*expected bytes, such as 200gb.*got 'lots'"),
        ("data.cache_limit=gb", "data.cache_limit: .*got 'gb'"),
        ("loss.correlation={distance: smooth_l1, method: gram}", "loss.correlation.method: .*distance=mse only"),
        (
            "loss={instance: {weight: 0}, pathology: {weight: 0}, correlation: {weight: 0}}",
            "loss: .*all weights are 0; give instance, pathology, correlation or tokens one above 0",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_one_line(override: str, words: str | None) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build_config(None, [override])
    assert "\n" not in str(caught.value)


def test_features_of_an_image_with_hidden_patches_are_refused_as_target_of_the_correlation() -> None:
    hidden, features = "model.correlation.mask_ratio=0.5", "loss.correlation.target=features"
    with pytest.raises(UsageError, match=r"loss: .*set loss\.correlation\.target=pixels or .*mask_ratio=0") as caught:
        build_config(None, [hidden, features])
    assert "\n" not in str(caught.value)
    for fitting in ([hidden], [features], [hidden, features, "loss.correlation.weight=0"]):
        build_config(None, fitting)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "not YAML"),
        (b"- 1\n", "expected sections, got list"),
        (b"run: {dir: 2024-13-01}", "no value of YAML"),
        (
            "run: {dir: Gr\xf6\xdfe}".encode("latin-1"),
            "not text in UTF-8; give the path of a YAML file, saved as UTF-8",
        ),
        (b"\x89PNG\r\n\x1a\n", "not text in UTF-8"),
        (b"a\x00b", "not YAML"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        build_config(path)
    assert "\n" not in str(caught.value)


def test_a_config_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3


def test_a_dumped_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = build_config(None, ["train.max_steps=5", "optim.betas=[0.8, 0.9]", "model.vision.overrides.depth=2"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert build_config(tmp_path / "c.yaml") == config


def test_the_schema_is_json_and_describes_every_knob() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    for section in schema["$defs"].values():
        for name, knob in section["properties"].items():
            assert knob.get("description"), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_its_header_names_command_and_hardware(path: Path) -> None:
    if "\nrows:" in path.read_text():
        load_experiment(path)
    elif "\nrungs:" in path.read_text():
        load_scale(path)
    else:
        build_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "hardware"):
        assert any(word in line for line in header), f"no '{word}' in the header"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_command_of_a_header_can_be_pasted(path: Path) -> None:
    lines = path.read_text().splitlines()
    broken = [line for line, following in pairwise(lines) if re.match(r"# {14,}\S", following) and line[-2:] != " \\"]
    assert broken == []
    commands = read_commands(["\n".join(line[14:] for line in lines if line.startswith("#"))])
    for words in commands:
        build_parser().parse_args(words)
    # What is trained on is prepared first, in the same header or by another that the reader is sent to.
    if path.stem == "covid_cxr":
        assert commands[0][0] == "prepare"
        assert commands[0][commands[0].index("--output") + 1] in " ".join(commands[1])
