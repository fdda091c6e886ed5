"""`place pretrain` on one worker: the run folder, stopping and going on, and every way it gives up in one line."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tiny import VOCAB, build_batch, build_tiny_config
from training import runs
from training.runs import run_place, start_place, wait_until, write_config

from place import cli
from place.batch import Batch, Losses, Outputs
from place.config import UsageError, build_config
from place.data.tokens import ReportTokenizer, train_tokenizer
from place.losses.objective import compute_losses
from place.model.place import build_model
from place.node import note_path
from place.runlog import count_attempts, read_jsonl, read_surviving
from place.training import loop
from place.training import pretrain as pretrain_module
from place.training.checkpoint import find_fault, load_run
from place.training.engine import TorchEngine
from place.training.plan import build_plan
from place.training.pretrain import run_worker

TERMS = ("total", "instance", "pathology", "correlation", "grad_norm", "lr")
LONG = {
    "model": {"text": {"dropout": 0.2}, "correlation": {"mask_ratio": 0.25}},
    "train": {"epochs": 12, "checkpoint_every_steps": 7, "evaluate_every_epochs": 4},
}
STEPS_PER_EPOCH = 5


class Ended(NamedTuple):
    """How a run in this process ended."""

    code: int
    out: str
    err: list[str]


@pytest.fixture
def pretrain(capfd: pytest.CaptureFixture[str]) -> Any:
    """`place pretrain` in this process; what loader workers and threads say is caught too."""

    def run(config: Path, *overrides: str) -> Ended:
        capfd.readouterr()
        code = cli.main(["pretrain", "--config", str(config), *overrides])
        said = capfd.readouterr()
        return Ended(code, " ".join(said.out.split()), said.err.splitlines())

    return run


def test_a_run_with_loader_workers_ends_without_a_word_of_them(prepared: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, prepared)
    code, _, err = run_place("pretrain", "--config", str(config), "data.num_workers=1")
    assert code == 0
    assert "Traceback" not in err, err


def test_attention_of_one_image_is_kept_at_each_validation(undisturbed: Path) -> None:
    looks = list(read_jsonl(undisturbed / "attention.jsonl"))
    validated = [record["step"] for record in read_jsonl(undisturbed / "metrics.jsonl") if "val_total" in record]
    assert [look["step"] for look in looks] == validated
    for look in looks:
        assert len(look["attention"]) == 6  # queries
        assert [len(shares) for shares in look["attention"]] == [16] * 6
        assert [sum(shares) for shares in look["attention"]] == pytest.approx([1.0] * 6, abs=0.05)


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert cli.main(["pretrain", "--config", str(write_config(folder, prepared, **LONG))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def short(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch with checkpoints at steps 2, 4 and 5; copy it before changing it."""
    folder = tmp_path_factory.mktemp("short")
    config = write_config(folder, prepared, train={"epochs": 1, "checkpoint_every_steps": 2, "keep_checkpoints": 3})
    assert cli.main(["pretrain", "--config", str(config)]) == 0
    return folder


@pytest.fixture
def resumable(short: Path, prepared: Path, tmp_path: Path) -> Path:
    """The config of a copy of the short run that wants a second epoch."""
    shutil.copytree(short / "run", tmp_path / "run")
    return write_config(tmp_path, prepared, train={"epochs": 2})


def ask_to_stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the workers see a wish to stop once, after this many steps."""
    seen: list[bool] = []

    def take(_: object, flag: bool) -> bool:
        seen.append(flag)
        return len(seen) == step

    monkeypatch.setattr(loop._Vote, "take", take)


def list_checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def assert_same_curve(run: Path, undisturbed: Path) -> None:
    ours, theirs = read_surviving(run / "metrics.jsonl"), read_surviving(undisturbed / "metrics.jsonl")
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for a, b in zip(ours[-10:], theirs[-10:], strict=True):
        for term in TERMS:
            assert a[term] == pytest.approx(b[term], rel=1e-5), f"step {a['step']}, {term}"
    ours, theirs = read_surviving(run / "samples.jsonl"), read_surviving(undisturbed / "samples.jsonl")
    assert [(record["step"], record["ids"]) for record in ours] == [
        (record["step"], record["ids"]) for record in theirs
    ]


def read_folder(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_byte(shard: Path) -> Path:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


def test_the_run_folder_is_as_the_contract_says(undisturbed: Path) -> None:
    total = 12 * STEPS_PER_EPOCH
    assert {path.name for path in undisturbed.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "attention.jsonl", "attempts.jsonl"),
        *("checkpoints", "tokenizer", "model"),
    }
    assert build_config(undisturbed / "config.yaml").train.epochs == 12
    about = json.loads((undisturbed / "run.json").read_text())
    assert about["plan"]["total_steps"] == total
    assert {"commit", "versions", "data_fingerprint", "world"} <= about.keys()
    records = list(read_jsonl(undisturbed / "metrics.jsonl"))
    steps = [record for record in records if "total" in record]
    assert [record["step"] for record in steps] == list(range(1, total + 1))
    named = {*TERMS, "temperature_instance", "temperature_pathology", "samples_per_s", "data_wait_share", "memory_mib"}
    assert all(named <= record.keys() for record in steps)
    assert [record["step"] for record in records if "val_total" in record] == [20, 40, 60]
    saved = [record["step"] for record in steps if {"checkpoint_wait_s", "checkpoint_copy_s"} <= record.keys()]
    assert saved[:3] == [8, 15, 21], "the step after a checkpoint says what it waited for"
    assert all(len(record["ids"]) == 32 for record in read_jsonl(undisturbed / "samples.jsonl"))


def test_the_loss_goes_down_and_the_best_checkpoint_is_that_of_the_least_validation_loss(undisturbed: Path) -> None:
    records = list(read_jsonl(undisturbed / "metrics.jsonl"))
    losses = [record["total"] for record in records if "total" in record]
    assert sum(losses[-5:]) < sum(losses[:5])
    best = min((record for record in records if "val_total" in record), key=lambda record: record["val_total"])
    root = undisturbed / "checkpoints"
    assert (root / "best").read_text() == f"step_{best['step']:08d}"
    assert (root / "latest").read_text() == "step_00000060"
    assert len(list_checkpoints(undisturbed)) <= 3
    assert not any(find_fault(root / name) for name in list_checkpoints(undisturbed))


def test_the_learning_rate_rises_for_a_twentieth_of_the_steps_and_falls_as_a_cosine(undisturbed: Path) -> None:
    rates = [record["lr"] for record in read_jsonl(undisturbed / "metrics.jsonl") if "total" in record]
    fall = [0.01 + 0.99 * (1 + math.cos(math.pi * step / 57)) / 2 for step in range(57)]
    assert rates == pytest.approx([1e-3 * share for share in (1 / 3, 2 / 3, 1, *fall)])


def test_one_grey_level_of_255_is_measured_in_standardised_units(
    pretrain: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = set(), pretrain_module.compute_losses
    monkeypatch.setattr(pretrain_module, "compute_losses", lambda *given: seen.add(given[-1]) or plain(*given))
    config = write_config(tmp_path, prepared, train={"epochs": 1, "max_steps": 1})
    assert pretrain(config).code == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert seen == {1 / (255 * about["std"])}


def test_images_without_reports_are_refused(pretrain: Any, prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    card = json.loads((data / "card.json").read_text())
    (data / "card.json").write_text(json.dumps({**card, "without_report": 3}))
    ended = pretrain(write_config(tmp_path, data))
    assert ended.code == 2
    said = f"{data}: 3 images have no report, and pretraining takes pairs; prepare it again with --min-words 1 or more"
    assert ended.err == [f"place pretrain: {said}"]


def test_validation_is_the_mean_of_its_batches_without_dropout_or_masks() -> None:
    config = build_tiny_config(model={"text": {"dropout": 0.5}, "correlation": {"mask_ratio": 0.5}})
    torch.manual_seed(0)
    engine = TorchEngine(build_model(config, VOCAB, torch.device("cpu"))[0], config, torch.device("cpu"))
    engine.model.train()
    batches = [build_batch(8, seed) for seed in range(3)]

    def objective(outputs: Outputs, batch: Batch) -> Losses:
        return compute_losses(outputs, batch, config.loss, 1 / 255)

    loader = SimpleNamespace(read_epoch=lambda *_: batches)
    plan, watchdog = build_plan(config, 1, 100, 24), SimpleNamespace(feed=lambda: None)
    value = loop.evaluate_loss(plan, engine, loader, objective, 0, None, watchdog, 1)
    engine.model.eval()
    with torch.no_grad():
        expected = [objective(engine.model(batch), batch).total.item() for batch in batches]
    assert value == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_tensorboard_events_are_written_where_asked_for(pretrain: Any, prepared: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, prepared, train={"max_steps": 1, "epochs": 1}, run={"tensorboard": True})
    assert pretrain(config).code == 0
    assert list((tmp_path / "run" / "events").glob("events.out.tfevents.*"))


def test_a_terminated_run_goes_on_as_if_nothing_had_happened(
    pretrain: Any, prepared: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setitem(runs.ENVIRONMENT, "TMPDIR", str(tmp_path / "temp"))
    run = tmp_path / "run"
    config = write_config(tmp_path, prepared, **LONG)
    process = start_place("pretrain", "--config", str(config), "data.num_workers=1")
    wait_until(lambda: any(record["step"] >= 18 for record in read_jsonl(run / "metrics.jsonl")), process)
    (note,) = (tmp_path / "temp").glob(note_path(run).name)
    held = read_held(note)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (85, ""), out + err
    stopped = (run / "checkpoints" / "latest").read_text()
    assert 18 <= int(stopped.removeprefix("step_")) < 60
    assert find_fault(run / "checkpoints" / stopped) == ""
    assert f"stopped at step {int(stopped.removeprefix('step_'))}, checkpoint saved" in out
    assert_nothing_is_left(tmp_path / "temp", held)
    ended = pretrain(config)
    assert (ended.code, ended.err) == (0, [])
    assert f"resumed from {stopped}" in ended.out
    assert_same_curve(run, undisturbed)


def read_held(note: Path) -> list[dict[str, Any]]:
    """The shared memory that workers of this host noted."""
    return [record for record in read_jsonl(note) if "inode" in record]


def assert_nothing_is_left(temp: Path, held: list[dict[str, Any]]) -> None:
    """Shared memory that a run held is gone, and so is all but locks and torch's own caches in its temporary folder."""
    assert len(held) == 2, "shared memory of the training and of the validation loader"
    marks = [(Path("/dev/shm") / f"{item['prefix']}locals", item["inode"]) for item in held]
    assert not [mark for mark, inode in marks if mark.exists() and mark.stat().st_ino == inode]
    kept = ("torchinductor_",)
    assert not [path.name for path in temp.iterdir() if not path.name.startswith(kept)]


def test_a_killed_run_goes_on_and_cleans_up_what_it_left(
    pretrain: Any, prepared: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}"
    config = write_config(tmp_path, prepared, **LONG)
    process = start_place("pretrain", "--config", str(config), cache)
    wait_until(lambda: any(record["step"] >= 18 for record in read_jsonl(run / "metrics.jsonl")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    held = read_held(note_path(run))
    assert list((tmp_path / "cache").iterdir()), "nothing was left that could be cleaned up"
    ended = pretrain(config, cache)
    assert (ended.code, ended.err) == (0, [])
    assert_nothing_is_left(tmp_path / "cache", held)
    assert_same_curve(run, undisturbed)


def test_a_second_command_in_a_run_folder_is_refused_and_disturbs_nothing(
    pretrain: Any, prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, prepared, **LONG)
    process = start_place("pretrain", "--config", str(config), f"data.cache_dir={tmp_path / 'cache'}")
    wait_until(lambda: bool(list(read_jsonl(run / "metrics.jsonl"))), process)
    ended = pretrain(config, "optim.lr=0.5")
    assert ended.code == 2
    assert ended.err == [
        f"place pretrain: another place pretrain works in {run}, process {process.pid} on {socket.gethostname()}; wait "
        "for it, or end it with scancel, ray job stop or Ctrl-C, or choose another run.dir"
    ]
    assert process.poll() is None, "the first had ended before the second came"
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert "lr: 0.5" not in (run / "config.yaml").read_text()
    assert count_attempts(run) == 1


NO_BATCH = """
import sys, time
from place.data.loader import PairLoader
PairLoader.read_steps = lambda *_: iter(lambda: time.sleep(99), 0)
from place.cli import main
main(sys.argv[1:])
"""


def test_a_first_batch_that_never_comes_ends_the_worker(prepared: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, prepared, cluster={"hang_timeout_s": 2})
    command = [sys.executable, "-c", NO_BATCH, "pretrain", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, timeout=80, check=False)
    assert ended.returncode == 1
    (stacks,) = (tmp_path / "run" / "stacks").glob("attempt_0000/rank_00000.*.txt")
    assert "in train" in stacks.read_text()


def test_a_cache_that_cannot_be_made_is_one_line(pretrain: Any, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = pretrain(write_config(tmp_path, prepared), f"data.cache_dir={tmp_path / 'file'}")
    assert ended.code == 2
    assert ended.err == [
        f"place pretrain: data.cache_dir={tmp_path / 'file'} on {socket.gethostname()}: Not a directory; give a folder "
        "that every node can write, or none for the temporary one"
    ]


def test_a_run_is_stopped_by_its_folder(pretrain: Any, prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def stop() -> None:
        while not any(record["step"] >= 3 for record in read_jsonl(run / "metrics.jsonl")):
            time.sleep(0.01)
        assert cli.main(["runs", "stop", str(run)]) == 0

    asking = threading.Thread(target=stop, daemon=True)
    asking.start()
    ended = pretrain(write_config(tmp_path, prepared, train={"epochs": 400}))
    asking.join(5)
    assert (ended.code, ended.err) == (85, [])
    assert list_checkpoints(run)


def test_a_stop_at_the_end_of_an_epoch_still_validates_it(
    pretrain: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, prepared, train={"epochs": 2})
    ask_to_stop_at(monkeypatch, STEPS_PER_EPOCH)
    assert pretrain(config).code == 85
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val_total" in r] == [5]
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step_00000005"
    assert pretrain(config).code == 0


def test_a_stop_at_the_last_step_is_a_finished_run(
    pretrain: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_to_stop_at(monkeypatch, STEPS_PER_EPOCH)
    assert pretrain(write_config(tmp_path, prepared, train={"epochs": 1})).code == 0
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step_00000005"


def test_a_finished_run_is_left_as_it_is(pretrain: Any, short: Path, tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(short / "run", tmp_path / "run")
    ended = pretrain(write_config(tmp_path, prepared, train={"epochs": 1}))
    assert (ended.code, ended.err) == (0, [])
    assert "all 5 steps are done already" in ended.out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (short / "run" / "metrics.jsonl").read_text()


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(pretrain: Any, resumable: Path) -> None:
    ended = pretrain(resumable, "optim.lr=1e30")
    assert (ended.code, len(ended.err)) == (1, 1), ended.err
    assert "at step 7: not finite; last good checkpoint: step_00000005; lower optim.lr" in ended.err[0]
    assert list_checkpoints(resumable.parent / "run")[-1] == "step_00000005"
    assert pretrain(resumable).code == 0


def test_a_validation_loss_that_is_not_finite_never_makes_a_best_checkpoint(
    pretrain: Any, prepared: Path, tmp_path: Path
) -> None:
    ended = pretrain(write_config(tmp_path, prepared), "optim.lr=1e30", "train.global_batch=128")
    assert (ended.code, len(ended.err)) == (1, 1), ended.err
    assert "validation loss nan at step 1: not finite; last good checkpoint: none" in ended.err[0]
    assert list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_byte_in_a_shard_is_one_line_that_names_it(
    num_workers: int,
    split: str,
    pretrain: Any,
    resumable: Path,
    prepared: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    shard = flip_byte(next((tmp_path / "data" / split).glob("shard.*")))
    ended = pretrain(resumable, f"data.path={tmp_path / 'data'}", f"data.num_workers={num_workers}")
    assert (ended.code, len(ended.err)) == (1, 1), ended.err
    assert f"shard {shard} is damaged" in ended.err[0]
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "a traceback on the screen"


def test_a_flipped_byte_is_found_before_a_tokenizer_is_made_of_it(
    pretrain: Any, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    shard = flip_byte(next((tmp_path / "data" / "train").glob("shard.*")))
    ended = pretrain(write_config(tmp_path, tmp_path / "data"))
    assert (ended.code, len(ended.err)) == (1, 1), ended.err
    assert f"shard {shard} is damaged" in ended.err[0]


def test_a_checkpoint_with_a_missing_file_is_skipped_with_a_line(pretrain: Any, resumable: Path) -> None:
    (resumable.parent / "run" / "checkpoints" / "step_00000005" / "state.json").unlink()
    ended = pretrain(resumable)
    assert (ended.code, ended.err) == (0, [])
    assert "step_00000005: file state.json is missing" in ended.out.replace("state. json", "state.json")
    assert "resumed from step_00000004" in ended.out


def test_a_run_without_a_complete_checkpoint_is_one_line(pretrain: Any, resumable: Path) -> None:
    for folder in (resumable.parent / "run" / "checkpoints").glob("step_*"):
        (folder / "state.json").unlink()
    ended = pretrain(resumable)
    assert (ended.code, len(ended.err)) == (1, 1), ended.err
    assert "step_00000005: file state.json is missing; no complete checkpoint is left" in ended.err[0]


def test_a_run_with_another_seed_is_refused_in_one_line(pretrain: Any, resumable: Path) -> None:
    ended = pretrain(resumable, "run.seed=9")
    assert (ended.code, len(ended.err)) == (2, 1), ended.err
    assert "was written with seed=0, this run has 9" in ended.err[0]


def test_too_little_disk_is_one_line(
    pretrain: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ended = pretrain(write_config(tmp_path, prepared))
    assert (ended.code, len(ended.err)) == (1, 1), ended.err
    assert "100 MiB of its disk are free, a run needs at least 512" in ended.err[0]


def test_a_run_on_other_data_is_refused_in_one_line(pretrain: Any, resumable: Path, prepared: Path) -> None:
    other = shutil.copytree(prepared, resumable.parent / "other")
    card = json.loads((other / "card.json").read_text())
    card["image"]["mean"] += 0.1
    (other / "card.json").write_text(json.dumps({**card, "fingerprint": "0" * 64}))
    before = read_folder(resumable.parent / "run")
    ended = pretrain(resumable, f"data.path={other}")
    assert (ended.code, len(ended.err)) == (2, 1), ended.err
    assert "this run has " + "0" * 64 in ended.err[0]
    assert read_folder(resumable.parent / "run") == before, "evaluation would take the refused data's figures"


@pytest.mark.parametrize("changed", ["model.joint_width=16", "model.text.width=16", "loss.tokens.weight=1.0"])
def test_a_run_with_a_model_of_other_shapes_is_refused_and_can_be_loaded(
    pretrain: Any, resumable: Path, changed: str
) -> None:
    before = read_folder(resumable.parent / "run")
    ended = pretrain(resumable, changed)
    assert (ended.code, len(ended.err)) == (2, 1), ended.err
    assert re.search(r"step_00000005 has .*, this model has it of shape", ended.err[0])
    assert read_folder(resumable.parent / "run") == before, "evaluation would build the refused model"
    assert load_run(resumable.parent / "run").step == 5


def test_a_run_that_a_worker_refuses_keeps_the_definition_of_its_model(resumable: Path) -> None:
    definition = read_folder(resumable.parent / "run" / "model")
    config = build_config(resumable, ["data.shuffle_block_size=512", "model.text.depth=2"])
    with pytest.raises(UsageError, match="shuffle_block_size=262144, this run has 512"):
        run_worker(config, "launch")
    assert read_folder(resumable.parent / "run" / "model") == definition


def test_a_tokenizer_of_a_start_that_failed_is_made_anew(pretrain: Any, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "tokenizer"
    train_tokenizer(["Words of other data."], 100, 160, 16).save(folder)
    with (folder / "tokenizer.json").open("r+") as file:
        file.truncate(40)  # and the start was killed while it wrote
    config = write_config(tmp_path, prepared, train={"epochs": 1, "max_steps": 1})
    assert pretrain(config, "data.val_split=none").code == 0
    assert "pneumothorax" in ReportTokenizer.load(folder).hf.get_vocab()


def test_a_resumed_run_leaves_its_tokenizer_alone(pretrain: Any, resumable: Path) -> None:
    files = sorted((resumable.parent / "run" / "tokenizer").iterdir())
    before = [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
    assert pretrain(resumable).code == 0
    assert [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == before
