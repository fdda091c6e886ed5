"""What a fault is called: the rank that was the cause, and its host; and which fault is worth another start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from place.cluster import launch
from place.cluster.launch import describe_fault
from place.cluster.worker import run_guarded
from training.runs import write_config
from transformers import BertConfig, BertModel

from place.config import PassingError, RunError, build_config
from place.data.tokens import train_tokenizer
from place.training.start import prepare_run

HOSTS = ["h1", "h2", "h3"]
DEAD = RuntimeError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR\nMore.")
RESET = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [10.0.0.3]:1: Connection reset by peer. Typically")


class Failed(Exception):
    """As Ray Train's WorkerGroupError: errors by rank."""

    def __init__(self, worker_failures: dict[int, BaseException]):
        super().__init__("failed")
        self.worker_failures = worker_failures


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        ({0: RESET, 1: DEAD, 2: RESET}, "1 of 3 workers failed: rank 1 on h2 died"),
        ({0: RESET, 1: RESET}, "1 of 3 workers failed: rank 2 on h3 is not heard of any more"),
        ({2: RuntimeError("it died since its node has died. Id 7")}, "rank 2 on h3 died with its host"),
        ({1: ValueError("a\nb: bad")}, "1 of 3 workers failed: rank 1 on h2 said: b: bad"),
        ({0: RESET, 1: RESET, 2: RESET}, "3 of 3 workers failed: rank 0 on h1 lost the connection to another rank"),
    ],
)
def test_the_cause_of_a_fault_is_named_and_not_its_consequences(failures: dict, line: str) -> None:
    assert line in describe_fault(Failed(failures), HOSTS)


def test_workers_that_did_not_start_say_why() -> None:
    assert describe_fault(RuntimeError("no\nroom"), HOSTS) == "workers did not start: room"


@pytest.mark.parametrize("how", ["unreadable", "damaged"])
def test_a_worker_gives_up_on_a_damaged_shard_and_not_on_storage_that_does_not_answer(
    how: str, prepared: Path, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(["No effusion."], 100, 32, 4)
    tokenizer.save(tmp_path / "bert")
    small = BertConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(small).save_pretrained(tmp_path / "bert")
    shutil.copytree(prepared, tmp_path / "data")
    for shard in (tmp_path / "data" / "train").glob("shard.*"):
        shard.unlink()
        shard.mkdir() if how == "unreadable" else shard.write_bytes(b"other")
    model = {"text": {"source": str(tmp_path / "bert")}}
    config = build_config(write_config(tmp_path, tmp_path / "data", model=model))
    prepare_run(config, 1)
    with pytest.raises(RunError) as caught:
        run_guarded(config, how)
    outcome = tmp_path / "run" / "outcome.json"
    if how == "unreadable":
        assert isinstance(caught.value, PassingError)
        assert not outcome.exists()
    else:
        assert "is damaged" in json.loads(outcome.read_text())["message"]


def test_the_driver_counts_checkpoints_by_their_folders_for_a_power_failure_may_empty_latest(tmp_path: Path) -> None:
    assert launch._find_newest_step(tmp_path) is None
    for name in ("step_00000004", "step_00000012", ".step_00000016.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("")
    assert launch._find_newest_step(tmp_path) == 12
