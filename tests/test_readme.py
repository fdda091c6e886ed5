"""The README's commands, run as written but for a smaller size; its tree names what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from documents import read_blocks, read_commands

from place.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = read_commands(read_blocks(README, ""))
SMALLER = {
    "prepare": ["--num-workers", "1", "--launcher", "local"],
    "pretrain": ["cluster.launcher=local", "engine.kind=torch", "train.max_steps=4", "train.global_batch=32"],
    "doctor": ["--timeout", "100"],
    "evaluate": ["evaluation.bootstrap=20", "evaluation.gallery_size=20"],
}


def lay_out_real_files(folder: Path, real_data: Path) -> None:
    """The real radiographs under the names that the README's csv command uses."""
    (folder / "metadata.csv").symlink_to(real_data / "covid-cxr" / "metadata.csv")
    (folder / "images").symlink_to(real_data / "covid-cxr" / "images")


def lay_out_archives() -> None:
    """Small archives of the shapes that the README's commands read, in the current folder."""
    from archives import write_dicom, write_mimic, write_openi_report, write_png, write_r2gen

    write_mimic(Path("physionet/mimic-cxr-jpg"))
    images = ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]
    write_openi_report(Path("openi/ecgen-radiology/1.xml"), "CXR1", images, "The heart is normal.", "Normal chest.")
    for number, name in enumerate(images):
        write_png(Path("openi/NLMCXR_png") / f"{name}.png", number)
        write_dicom(Path("pacs") / f"IM{number}", number, AccessionNumber="A1")
    Path("reports.csv").write_text("AccessionNumber,findings\nA1,The lungs are clear.\n")
    entry = {
        "id": "CXR1_IM-0001",
        "report": "the lungs are clear .",
        "image_path": ["CXR1_IM-0001/0.png"],
        "split": "train",
    }
    write_r2gen(Path("r2gen/iu_xray"), {"train": [entry], "val": [], "test": []})


def test_the_readme_shows_every_verb() -> None:
    verbs = {command[0] for command in COMMANDS}
    assert verbs == {"prepare", "data", "doctor", "plan", "pretrain", "evaluate", "compare", "export", "runs", "report"}


def test_the_readme_commands_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(Path(__file__).parents[1] / "configs")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if command[:2] == ["prepare", "--source"] and command[2] != "phantom":
            continue
        small = ["200" if word == "2000" else word for word in command]
        small = [word for word in small if not word.startswith("train.epochs")]
        if "--schema" not in command:
            small += SMALLER.get(command[0], [])
        assert main(small) == 0, command
    assert (tmp_path / "runs/mine/evaluation/retrieval.json").is_file()


def test_the_readme_command_for_tables_runs_on_real_radiographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data: Path
) -> None:
    lay_out_real_files(tmp_path, real_data)
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in COMMANDS if "csv" in command]
    assert main([*command, *SMALLER["prepare"]]) == 0
    counts = json.loads((tmp_path / "datasets/mine/card.json").read_text())["counts"]
    assert counts["input"] == 135 == counts["kept"] + counts["rejected"]


def test_the_tree_names_what_is_there() -> None:
    root = Path(__file__).parents[1]
    for name in re.findall(r"^(\w+)/ ", README, re.MULTILINE):
        if name not in ("checkpoints", "stacks", "profile", "tokenizer", "evaluation"):
            assert (root / name).is_dir(), name


def test_the_readme_commands_for_archives_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "data")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "salt"))
    monkeypatch.chdir(tmp_path)
    lay_out_archives()
    commands = [command for command in COMMANDS if command[0] == "prepare" and command[2] not in ("csv", "phantom")]
    assert len(commands) == 4
    for command in commands:
        assert main([*command, *SMALLER["prepare"]]) == 0, command
        card = json.loads((tmp_path / command[-1] / "card.json").read_text())
        assert card["counts"]["kept"] > 0
