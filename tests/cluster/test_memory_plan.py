"""`place plan`: its memory against what a step really allocates, its arithmetic, and what it asks of a user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_memory import measure_peak
from place.cluster.budget import Setting, compute_flops, compute_memory, compute_traffic
from place.cluster.worker import ENGINES
from spawn import run_ranks
from tiny import build_batch, build_tiny_config
from torch.utils.flop_counter import FlopCounterMode
from training.runs import write_config

from place import cli
from place.batch import Batch, Losses, Outputs
from place.config import Config, build_config
from place.losses import search, tokens
from place.losses.correlation import correlation_loss
from place.losses.objective import compute_losses
from place.model.place import build_model
from place.training.footprint import measure_footprint
from place.training.gradcache import backward_contrast
from place.training.plan import build_plan
from place.training.transfer import send_ahead

ROOT = Path(__file__).parents[2]
VOCAB = 64
TOLERANCE = 0.1


def build_sized_config(
    width: int = 64, depth: int = 3, batch: int = 32, accumulation: int = 1, **engine: Any
) -> Config:
    """A model large enough for its memory to stand out."""
    encoder = {"patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2}
    return build_tiny_config(
        # As long as the reports of build_batch.
        data={"max_tokens": 14},
        model={
            "vision": {"overrides": encoder},
            "text": {"width": width, "depth": depth, "vocab_size": VOCAB},
        },
        train={"global_batch": batch, "accumulation": accumulation},
        engine=engine,
    )


def build_sharded_config(stage: int) -> Config:
    # Buckets that do not drown a tiny model.
    return build_sized_config(256, 4, 16, kind="deepspeed", zero_stage=stage, bucket_mib=8)


def build_full_batch(config: Config, seed: int) -> Batch:
    """Reports without padding, as a plan assumes them."""
    batch = build_batch(config.train.global_batch, seed, config)
    lengths = torch.full_like(batch.length_B, batch.attention_BT.shape[1])
    return batch._replace(attention_BT=torch.ones_like(batch.attention_BT), length_B=lengths)


def train_two_steps(config: Config, rank: int, world: int) -> int:
    """Bytes at the peak of building an engine and taking two steps."""

    def run() -> None:
        torch.manual_seed(0)
        engine = ENGINES[config.engine.kind](
            build_model(config, VOCAB, torch.device("cpu"))[0], config, torch.device("cpu")
        )
        for step in range(2):
            batch = build_full_batch(config, step).chunks(world)[rank]
            backward_contrast(
                engine, batch, config.train.accumulation, lambda o, b: compute_losses(o, b, config.loss, 1 / 255)
            )
            engine.step(1e-3)

    return measure_peak(run)


def train_rank(stage: int) -> int:
    from place.distributed import read_world

    # The thread of gloo lets go of a bucket a moment after the step went on: on busy cores a next one is there already.
    world = read_world()
    return min(train_two_steps(build_sharded_config(stage), world.rank, world.world) for _ in range(3))


def forecast_peak(config: Config, world: int, on_gpu: bool = False) -> int:
    plan = build_plan(config, world, 10_000, 0)
    stage = config.engine.zero_stage if config.engine.kind == "deepspeed" else None
    setting = Setting(stage, config.engine.activation_checkpointing, plan.accumulation, on_gpu)
    return compute_memory(measure_footprint(config), plan, config, setting).peak


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What libraries allocate at first use is not a step's."""
    train_two_steps(build_sized_config(batch=8), 0, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch": 128},
        {"width": 256, "depth": 4, "batch": 8},
        {"accumulation": 4},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "accumulation": 2},
        {"precision": "bf16"},
    ],
    ids=lambda settings: ",".join(map(str, settings.items())) or "plain",
)
def test_memory_agrees_with_what_a_step_allocates(settings: dict) -> None:
    config = build_sized_config(**settings)
    measured = train_two_steps(config, 0, 1)
    assert forecast_peak(config, 1) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("stage", "tolerance"), [(1, TOLERANCE), (3, 0.15)])
def test_memory_of_a_zero_stage_agrees_with_what_two_ranks_allocate(stage: int, tolerance: float) -> None:
    measured = max(run_ranks(train_rank, 2, stage))
    assert forecast_peak(build_sharded_config(stage), 2) == pytest.approx(measured, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"accumulation": 4}, {"activation_checkpointing": True}])
def test_memory_agrees_with_what_a_gpu_allocates(settings: dict) -> None:
    config = build_sized_config(width=512, depth=6, batch=256, **settings)
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = ENGINES["torch"](build_model(config, VOCAB, device)[0], config, device)
    for sent in send_ahead((build_full_batch(config, step) for step in range(3)), device):
        backward_contrast(
            engine, sent.receive(), config.train.accumulation, lambda o, b: compute_losses(o, b, config.loss, 1 / 255)
        )
        engine.step(1e-3)
    measured = torch.cuda.max_memory_allocated() - before
    assert forecast_peak(config, 1, on_gpu=True) == pytest.approx(measured, rel=0.15)


@pytest.fixture(scope="module")
def vitb16() -> Any:
    config = build_config(ROOT / "configs" / "pretrain_vitb16.yaml")
    return config, measure_footprint(config), build_plan(config, 8, 377_110, 0)


def test_vit_b16_and_bert_base_have_their_known_size_and_flops(vitb16: Any) -> None:
    _, footprint, _ = vitb16
    vision, text = footprint.parts["vision"], footprint.parts["text"]
    assert vision.parameters == 85_405_440  # timm's vit_base_patch16_224 without its head, one channel
    assert text.parameters == 107_719_680  # bert-base-cased without its pooler, 28,996 entries
    tokens, width, layers, length = 197, 768, 12, 160
    linear = layers * 24 * width**2
    patches = 2 * 196 * width * 16**2
    assert vision.pair_flops == pytest.approx(linear * tokens + layers * 4 * tokens**2 * width + patches, rel=1e-3)
    assert text.pair_flops == pytest.approx(linear * length + layers * 4 * length**2 * width, rel=1e-3)
    assert any("BERT base" in line for line in footprint.assumed)


def test_flops_of_a_step_are_three_forwards_and_what_is_computed_again(vitb16: Any) -> None:
    config, footprint, plan = vitb16
    forward = plan.global_batch * sum(part.pair_flops for part in footprint.parts.values())
    plain = compute_flops(footprint, plan, config)
    assert 3 * forward < plain < 3.2 * forward  # the losses' products come on top
    chunks = plan.model_copy(update={"accumulation": 4})
    assert compute_flops(footprint, chunks, config) - plain == forward
    again = config.model_copy(update={"engine": config.engine.model_copy(update={"activation_checkpointing": True})})
    heads = plan.global_batch * footprint.parts["heads"].pair_flops
    assert compute_flops(footprint, plan, again) - plain == forward - heads
    assert compute_flops(footprint, chunks, again, recomputed=False) == plain


def count_flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("target", ["pixels", "features"])
def test_flops_of_a_step_are_those_that_are_counted_while_it_runs(target: str) -> None:
    """Attention and the correlation loss by their definitions, whose products the counter sees."""
    config = build_tiny_config(
        data={"max_tokens": 14},
        # Wide enough for the patch correlations to stand out.
        model={"attention": "eager", "text": {"vocab_size": VOCAB}, "correlation": {"width": 256, "depth": 0}},
        loss={"correlation": {"method": "reference", "target": target}},
    )
    batch = build_full_batch(config, 0)
    sentences = config.data.max_sentences
    batch = batch._replace(
        num_sentences_B=torch.full_like(batch.num_sentences_B, sentences),
        sentence_of_token_BT=(torch.arange(14) * sentences // 14).expand_as(batch.token_ids_BT),
    )
    cpu = torch.device("cpu")
    engine = ENGINES["torch"](build_model(config, VOCAB, cpu)[0], config, cpu)
    outputs = engine.forward(batch)
    footprint, plan = measure_footprint(config), build_plan(config, 1, 1000, 0)
    told = compute_flops(footprint, plan, config)

    def compute(given: Outputs, of: Batch) -> Losses:
        return compute_losses(given, of, config.loss, 1 / 255)

    counted = count_flops(lambda: backward_contrast(engine, batch, 1, compute))
    # More by a few products that have no gradient to give: to the image, and to which word is of which sentence.
    assert counted == pytest.approx(told, rel=0.03)
    of_losses = told - compute_flops(footprint, plan, weigh(config, correlation={"weight": 0.0}))
    given = outputs.z_BNE.detach().requires_grad_(), outputs.target_BND, batch.valid_patch_BN, outputs.focus_BN
    assert count_flops(lambda: correlation_loss(*given, config.loss.correlation, 1 / 255).backward()) == of_losses
    assert of_losses > 0.05 * told, "or it would not be missed above"


def test_the_search_multiplies_and_sends_what_is_counted(vitb16: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, footprint, plan = vitb16
    pathology = config.loss.pathology.model_copy(update={"search": 0.5})
    searching = config.model_copy(update={"loss": config.loss.model_copy(update={"pathology": pathology})})
    batch, sentences, queries = 64, config.data.max_sentences, config.model.observations.num_queries
    shape = (config.model.joint_width,)
    given = torch.rand(batch, queries, *shape), torch.rand(batch, sentences, *shape)
    sent = []
    monkeypatch.setattr(search, "gather_with_grad", lambda part: sent.append(part.numel() * 4) or part)
    with FlopCounterMode(display=False) as counter:
        search.search_loss(
            *given, torch.ones(batch, sentences).bool(), torch.arange(batch * sentences).view(batch, -1), torch.ones(())
        )
    small = plan.model_copy(update={"global_batch": batch})
    extra = compute_flops(footprint, small, searching) - compute_flops(footprint, small, config)
    assert counter.get_total_flops() == pytest.approx(extra / 3, rel=0.01)
    traffic = [compute_traffic(footprint, small, one, 1)["features"] for one in (searching, config)]
    assert traffic[0] - traffic[1] == 2 * 7 / 8 * sum(sent)
    memory = [compute_memory(footprint, plan, one, Setting(1, False, 1)).losses for one in (searching, config)]
    assert memory[0] > memory[1]


def weigh(config: Config, **terms: dict[str, Any]) -> Config:
    """The config with settings laid over terms of its loss."""
    changed = {name: getattr(config.loss, name).model_copy(update=values) for name, values in terms.items()}
    return config.model_copy(update={"loss": config.loss.model_copy(update=changed)})


def test_the_token_loss_multiplies_sends_and_holds_what_is_counted(
    vitb16: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, footprint, plan = vitb16
    with_words, batch = weigh(config, tokens={"weight": 1.0}), 8
    small = plan.model_copy(update={"global_batch": batch, "local_batch": batch})
    width, length = config.model.joint_width, config.data.max_tokens
    regions_BNE = torch.randn(batch, footprint.patches, width).requires_grad_()
    words_BTE = torch.randn(batch, length, width).requires_grad_()
    sent = []
    monkeypatch.setattr(tokens, "gather_with_grad", lambda part: sent.append(part.numel() * 4) or part)

    def run() -> None:
        is_word_BT, group_B = torch.ones(batch, length).bool(), torch.arange(batch)
        tokens.token_loss(regions_BNE, words_BTE, is_word_BT, group_B, with_words.loss.tokens).backward()

    with FlopCounterMode(display=False) as counter:
        run()
    regions_BNE.grad = words_BTE.grad = None
    assert measure_peak(run) == pytest.approx(
        sum(
            sign * compute_memory(footprint, small, one, Setting(1, False, 1)).losses
            for sign, one in ((1, with_words), (-1, config))
        ),
        rel=TOLERANCE,
    )
    extra = compute_flops(footprint, small, with_words) - compute_flops(footprint, small, config)
    assert counter.get_total_flops() == pytest.approx(extra, rel=0.01)
    traffic = [compute_traffic(footprint, small, one, 1)["features"] for one in (with_words, config)]
    assert traffic[0] - traffic[1] == 2 * 7 / 8 * sum(sent[:2])


def test_a_term_of_weight_0_costs_nothing(vitb16: Any) -> None:
    config, footprint, plan = vitb16
    bare = weigh(config, instance={"weight": 0.0}, pathology={"weight": 0.0}, correlation={"weight": 0.0})
    assert compute_memory(footprint, plan, bare, Setting(1, False, 1)).losses == 0
    assert compute_traffic(footprint, plan, bare, 1)["features"] == 0
    forward = plan.global_batch * sum(part.pair_flops for part in footprint.parts.values())
    assert compute_flops(footprint, plan, bare) == 3 * forward


def test_zero_shares_out_what_it_says_and_recomputation_and_chunks_cut_activations(vitb16: Any) -> None:
    config, footprint, plan = vitb16
    size = 4 * footprint.parameters
    zero = {stage: compute_memory(footprint, plan, config, Setting(stage, False, 1)) for stage in (0, 1, 2, 3)}
    assert [zero[stage].optimiser for stage in zero] == [2 * size, *[2 * (size // 8)] * 3]
    assert zero[2].gradients == size // 8
    recompute = compute_memory(footprint, plan, config, Setting(1, True, 1))
    assert recompute.peak < zero[1].peak
    chunks = compute_memory(footprint, plan, config, Setting(1, False, 4))
    assert chunks.activations < zero[1].activations / 3


def test_traffic_follows_the_stage_and_vanishes_for_one_worker(vitb16: Any) -> None:
    config, footprint, plan = vitb16
    size = 4 * footprint.parameters

    def count(stage: int | None, **engine: str) -> float:
        changed = config.model_copy(update={"engine": config.engine.model_copy(update=engine)})
        sent = compute_traffic(footprint, plan, changed, stage)
        return (sent["gradients"] + sent["weights"]) / (7 / 8 * size)

    assert [count(None), count(0), count(1), count(2), count(3)] == pytest.approx([2, 2, 3, 3, 3])
    assert count(1, gradient_reduction="reduce") == pytest.approx(2)
    assert count(0, wire_precision="bf16") == pytest.approx(1)
    alone = compute_traffic(footprint, plan.model_copy(update={"world": 1}), config, 1)
    assert set(alone.values()) == {0}


def test_the_forecast_of_prepared_data_is_printed_and_marks_this_config(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, prepared, engine={"kind": "deepspeed", "zero_stage": 2})
    assert cli.main(["plan", "--config", str(config), "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in forecast["memory"] if row["is_own"]] == [2]
    assert {row["stage"] for row in forecast["memory"]} == {0, 1, 2, 3}
    assert forecast["data"]["shards"] == 1
    assert forecast["plan"]["steps_per_epoch"] == forecast["plan"]["num_samples"] // 32
    assert cli.main(["plan", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "* ZeRO-2" in out
    assert "assumed:" in out
    assert "computed again" not in out
    assert cli.main(["plan", "--config", str(config), "engine.activation_checkpointing=true"]) == 0
    assert "'s peak, in what is computed again too" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


def test_the_forecast_counts_the_shards_of_every_stream(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, told = write_config(tmp_path, prepared), []
    streams = json.dumps([{"path": str(prepared)}, {"path": str(prepared), "repeat": 2}])
    for words in ([], ["data.path=nowhere", f"data.streams={streams}"]):
        assert cli.main(["plan", "--config", str(config), "--json", *words]) == 0
        told.append(json.loads(capsys.readouterr().out)["data"])
    assert told[1] == {name: pytest.approx(2 * value) for name, value in told[0].items()}


def test_a_small_gpu_does_not_hold_a_large_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, tmp_path / "none", train={"global_batch": 8192})
    arguments = ["plan", "--config", str(config), "--json", "--samples", "100000"]
    fits = []
    for memory_gib in ("3.1", "80"):
        assert cli.main([*arguments, "--gpu-memory-gib", memory_gib]) == 0
        fits.append([row["fits"] for row in json.loads(capsys.readouterr().out)["memory"] if row["is_own"]])
    assert fits == [[False], [True]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1000"], "expected one of a100-40"),
        (["--mfu", "20"], "expected a share"),
        ([], "is no prepared data set"),
    ],
)
def test_what_a_plan_cannot_do_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tmp_path / "none")
    assert cli.main(["plan", "--config", str(config), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
