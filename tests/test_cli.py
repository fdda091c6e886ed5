"""The command line as a user meets it: exit codes, and one line on standard error."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.runs import write_config

from place import cli


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """The command line in this process: exit code, standard output, lines of standard error."""
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines()


def test_the_command_line_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from place.cli import build_parser; build_parser().format_help();"
        "print([n for n in ('torch', 'ray', 'numpy', 'deepspeed', 'transformers', 'rich') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_finds_no_room_in_the_cache_is_one_line(num_workers: int, prepared: Path, tmp_path: Path) -> None:
    """A limit of the size of a file fails a write as a quota does."""
    config = write_config(tmp_path, prepared)
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
    code += "from place.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["pretrain", "--config", str(config), f"data.cache_dir={tmp_path}", f"data.num_workers={num_workers}"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"place pretrain: no room for the next shard of 'train' at {tmp_path} on "
    )
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line_and_other_faults_of_the_system_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")

    monkeypatch.setitem(cli.VERBS, "runs", lambda _: fail(errno.ENOSPC))
    said = "place runs: No space left on device at runs/x/metrics.jsonl; make room, the same command goes on"
    assert run_main(capsys, "runs") == (1, "", [said])
    monkeypatch.setitem(cli.VERBS, "runs", lambda _: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["runs"])


def test_a_process_ends_with_the_code_and_one_line_without_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "place", "pretrain", "train.epoch=3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "place pretrain: unknown config key 'train.epoch'; did you mean 'train.epochs'?\n"


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_main(capsys, "pretrain", "--schema")
    assert (code, err) == (0, [])
    assert "train" in json.loads(out)["properties"]


def test_a_missing_data_folder_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, tmp_path / "nothing")
    code, _, err = run_main(capsys, "pretrain", "--config", str(config))
    assert (code, len(err)) == (2, 1)
    assert "is no prepared data set" in err[0]
    assert "place prepare" in err[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_split_is_wrong_use(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, prepared)
    code, _, err = run_main(capsys, "pretrain", "--config", str(config), "data.train_split=training")
    assert (code, len(err)) == (2, 1)
    assert "splits there are ['test', 'train', 'val']" in err[0]


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_a_run_folder_that_cannot_be_written_is_wrong_use(
    launcher: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    config = write_config(tmp_path, prepared, run={"dir": str(tmp_path / "file" / "run")})
    code, _, err = run_main(capsys, "pretrain", "--config", str(config), f"cluster.launcher={launcher}")
    assert (code, len(err)) == (2, 1)
    assert "cannot be written" in err[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission_is_wrong_use(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    config = write_config(tmp_path, prepared, run={"dir": str(tmp_path / "mine" / "run")})
    code, _, err = run_main(capsys, "pretrain", "--config", str(config))
    assert (code, len(err)) == (2, 1)
    assert "Permission denied" in err[0]


def test_never_resuming_refuses_a_folder_with_checkpoints(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, prepared)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    code, _, err = run_main(capsys, "pretrain", "--config", str(config), "run.resume=never")
    assert (code, len(err)) == (2, 1)
    assert "run.resume=never" in err[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_batch=30000", "larger than the"),
        ("train.accumulation=50", "train.accumulation=50 is more than the 32 pairs"),
        ("model.vision.source=somewhere/else", "neither a folder"),
        ("model.text.source=somewhere/else", "somewhere/else"),
        ("model.attention=xformers", "model.attention=xformers"),
        ("data.image_size_px=36", "not divisible by the encoder's patch"),
        ("model.observations.num_heads=3", "not divisible by 3 heads"),
        ("model.text.num_heads=3", "model.text"),
        ("model.vision.overrides.num_heads=3", "model.vision"),
        ("cluster.launcher=torchrun", "no RANK in the environment"),
    ],
)
def test_settings_that_do_not_fit_together_are_wrong_use(
    override: str, words: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, prepared)
    code, _, err = run_main(capsys, "pretrain", "--config", str(config), override)
    assert (code, len(err)) == (2, 1), err
    assert words in err[0]


def test_a_run_folder_is_asked_for_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["runs", "stop", str(tmp_path)], ["evaluate", "--run", str(tmp_path), "--data", str(tmp_path)]):
        code, _, err = run_main(capsys, *verb)
        assert (code, len(err)) == (2, 1)
        assert "is no run folder" in err[0]


def test_a_broken_run_fails_with_one(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, prepared)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    code, _, err = run_main(capsys, "pretrain", "--config", str(config))
    assert (code, len(err)) == (1, 1)
    assert "files.json is missing" in err[0]
