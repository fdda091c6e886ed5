"""The benchmark beside open_clip and MGCA's structure: its gate, its rows, and the steps of the others."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from tiny import VOCAB, build_tiny_config
from tiny import build_batch as build_random_batch
from transformers import BertConfig

from place.training import benchmark
from place.training.benchmark import Row, build_place, check_gate, compare_losses, format_table, summarise
from place.training.peers import Step, build_mgca, build_open_clip

CPU = torch.device("cpu")


def test_the_gate_is_green_and_turns_red_with_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_gate(CPU) == []
    plain = benchmark.instance_loss
    monkeypatch.setattr(benchmark, "instance_loss", lambda *given: 1.001 * plain(*given))
    (line,) = check_gate(CPU)
    assert line.startswith("instance loss ")
    assert benchmark.main(["--device", "cpu"]) == 1, "and nothing is timed"


def test_rates_ratios_and_mfu_are_those_of_the_median_step() -> None:
    rows = {"a": Row(lambda: lambda: torch.ones(())), "b": Row(lambda: lambda: torch.ones(()), peers=("a", "gone"))}
    alive = {name: {"name": name, "peak_gib": 2.0, "syncs": 0, "start_s": 3.0, "kernels_ms": 40.0} for name in rows}
    about = {"device": "NVIDIA H100 80GB HBM3", "batch": 64}
    summarise(rows, alive, {"a": [0.2, 0.1, 0.4], "b": [0.1]}, {"b": 989 * 10**11 // 2}, about)
    assert (alive["a"]["step_ms"], alive["a"]["least_ms"], alive["a"]["most_ms"]) == pytest.approx((200, 100, 400))
    assert (alive["a"]["samples_per_s"], alive["a"]["ratios"], alive["a"]["mfu"]) == (pytest.approx(320), [], None)
    assert alive["b"]["ratios"] == [pytest.approx(2.0)]
    assert alive["b"]["mfu"] == pytest.approx(0.5)
    lines = format_table([*alive.values(), {"name": "c", "failed": "out of memory"}]).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "a table of equal lines"
    assert "| b | 100.0 (100.0 to 100.0) | 40.0 | 640 | 2.00 | 49.5 | 50.0% | 2.0 | 0 | 3 |" in lines
    assert lines[-1].startswith("| c | out of memory |")


@pytest.mark.parametrize("way", ["compiled", "CUDA graphs"])
@pytest.mark.parametrize(("value", "faults"), [(1.01, 0), (1.1, 1), (float("nan"), 1)])
def test_a_compiled_step_with_another_loss_is_told(value: float, faults: int, way: str) -> None:
    found = {"PLACE, eager": {"loss": 1.0}, f"PLACE, {way}": {"loss": value}, "PLACE ITA, eager": {"loss": 9.0}}
    assert len(compare_losses(found)) == faults


def test_the_whole_benchmark_runs_on_steps_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build_tiny_config(data={"max_tokens": 14}, model={"text": {"vocab_size": 64}})
    place = partial(build_place, config, 4, CPU, mode=None)
    rows = {"padded": Row(partial(place, packed=False)), "packed": Row(partial(place, packed=True), ("padded",))}
    monkeypatch.setattr(benchmark, "list_rows", lambda *_: rows)
    output = tmp_path / "rows.jsonl"
    assert benchmark.main(["--batch", "4", "--rounds", "1", "--device", "cpu", "--output", str(output)]) == 0
    padded, packed = map(json.loads, output.read_text().splitlines())
    assert (padded["name"], packed["name"]) == ("padded", "packed")
    assert packed["ratios"] == [pytest.approx(packed["samples_per_s"] / padded["samples_per_s"])]
    assert padded["flops"] > 0
    assert capsys.readouterr().out.count("\n| p") == 2


def test_a_row_that_fails_has_its_reason_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Step:
        raise RuntimeError("no graph of this\nwith more lines")

    config = build_tiny_config(data={"max_tokens": 14}, model={"text": {"vocab_size": 64}})
    rows = {"fails": Row(fail), "works": Row(partial(build_place, config, 4, CPU, None, False), ("fails",))}
    monkeypatch.setattr(benchmark, "list_rows", lambda *_: rows)
    assert benchmark.main(["--batch", "4", "--rounds", "1", "--device", "cpu"]) == 1
    fails, works = capsys.readouterr().out.splitlines()[-2:]
    assert fails.startswith("| fails | no graph of this |")
    assert works.startswith("| works | ")


@pytest.mark.parametrize("loops", [False, True])
def test_a_step_of_mgcas_structure_gives_its_loss_and_leaves_the_weights(
    loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *given, **options: plain(*given, **options, depth=1))
    definition = BertConfig(
        vocab_size=VOCAB, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    take_step = build_mgca(build_random_batch(4), definition, loops)
    first, second = take_step(), take_step()
    assert first.isfinite()
    assert first == second, "the learning rate is 0"


def test_a_step_of_open_clip_gives_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}}
    names |= {"text_cfg": {"context_length": 14, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1}}
    monkeypatch.setattr(
        open_clip, "create_model", lambda name, precision, device: open_clip.CLIP(embed_dim=32, **names).to(device)
    )
    take_step = build_open_clip(build_random_batch(4), mode=None)
    first, second = take_step(), take_step()
    assert first.isfinite()
    assert first == second
