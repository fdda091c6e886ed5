"""`ray job submit` on a standing head that asks for a token: status, logs, stop; token and paths are checked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from place.cluster.standing import JOB_MARK, check_address, check_standing, read_token
from standing_head import StandingHead, start_head
from tiny import build_tiny_config
from training.runs import write_config

from place import cli
from place.config import UsageError
from place.runlog import read_jsonl

SUBMIT = ("job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml")


@pytest.fixture(scope="module")
def head() -> Iterator[StandingHead]:
    with start_head(num_cpus=2) as started:
        yield started


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


@pytest.mark.standing
@pytest.mark.timeout(400)
def test_a_job_is_submitted_followed_and_stopped_with_a_checkpoint(
    head: StandingHead, prepared: Path, tmp_path: Path
) -> None:
    sections = {"cluster": {"launcher": "ray"}, "train": {"epochs": 4000}}
    config, run = write_config(tmp_path, prepared, **sections), tmp_path / "run"
    place = ("env", "PLACE_COMMIT=abc", "python", "-m", "place", "pretrain", "--config", str(config))
    code, out = head.run_ray(*SUBMIT, "--submission-id", "one", "--no-wait", "--", *place)
    assert code == 0, out
    wait_until(lambda: any(record["step"] >= 3 for record in read_jsonl(run / "metrics.jsonl")), timeout_s=200)
    assert "RUNNING" in head.run_ray("job", "status", "one")[1]
    code, out = head.run_ray("job", "stop", "one")
    assert "was stopped" in out
    assert "checkpoint saved; the same command goes on from there" in head.run_ray("job", "logs", "one")[1]
    assert "was stopped" in head.run_ray("job", "status", "one")[1]
    last = max(record["step"] for record in read_jsonl(run / "metrics.jsonl"))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{last:08d}"
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "stopped"
    assert json.loads((run / "run.json").read_text())["commit"] == "abc"


@pytest.mark.standing
def test_a_wrong_token_is_refused(head: StandingHead) -> None:
    code, out = head.run_ray("job", "list", RAY_AUTH_TOKEN="wrong")
    assert code != 0
    assert "Invalid authentication token" in out


@pytest.mark.standing
@pytest.mark.parametrize(("token", "words"), [("wrong", "RAY_AUTH_TOKEN is not the cluster's"), ("", "no token in")])
def test_a_run_with_a_wrong_or_no_token_ends_in_one_line_before_it_begins(
    token: str,
    words: str,
    head: StandingHead,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    config = write_config(tmp_path, prepared, cluster={"launcher": "ray"})
    assert cli.main(["pretrain", "--config", str(config)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.standing
def test_the_right_token_is_taken(head: StandingHead) -> None:
    assert check_address(head.address, head.environ) is True


def test_an_address_that_nobody_answers_at_is_named() -> None:
    with pytest.raises(UsageError, match=r"no Ray head answers at 127\.0\.0\.1:9 .*check RAY_ADDRESS"):
        check_address("127.0.0.1:9", {})


def test_other_forms_of_an_address_are_left_to_ray() -> None:
    assert [check_address(form, {}) for form in ("auto", "ray://far:10001", "local")] == [False] * 3


def test_the_token_is_looked_for_in_rays_order(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of home\n")
    (tmp_path / "mine").write_text("of file")
    environ = {"HOME": str(tmp_path)}
    assert read_token(environ).value == "of home"
    environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "mine")
    assert read_token(environ).value == "of file"
    assert read_token({**environ, "RAY_AUTH_TOKEN": "of environment"}).value == "of environment"
    assert read_token({**environ, "RAY_AUTH_MODE": "disabled"}).value == ""
    with pytest.raises(UsageError, match="RAY_AUTH_TOKEN_PATH=/nowhere"):
        read_token({"RAY_AUTH_TOKEN_PATH": "/nowhere"})


@pytest.mark.parametrize("key", ["run.dir", "data.path"])
def test_a_relative_path_in_a_job_is_refused(key: str) -> None:
    section, field = key.split(".")
    paths = {"run": {"dir": "/shared/run"}, "data": {"path": "/shared/data"}}
    check_standing(build_tiny_config(**paths), {JOB_MARK: "{}"})
    check_standing(build_tiny_config(**{**paths, "data": {"path": "s3://bucket/set"}}), {JOB_MARK: "{}"})
    paths[section] = {field: "here"}
    check_standing(build_tiny_config(**paths), {})
    with pytest.raises(UsageError, match=f"{key}=here is relative.*every node sees"):
        check_standing(build_tiny_config(**paths), {JOB_MARK: "{}"})
