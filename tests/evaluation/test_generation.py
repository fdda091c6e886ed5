"""Report generation: the decoder writes what visual tokens tell, repeats itself, and stands beside true baselines."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from place.cli import main
from place.config import EvaluationConfig, GenerationConfig, RunError, UsageError
from place.data.prepared import read_samples
from place.evaluation.compare import run_compare
from place.evaluation.encoder import encode_visual, get_units, read_units
from place.evaluation.frozen import wrap_run
from place.evaluation.generation import BASELINES, HEADLINE, read_ids, run_generation
from place.evaluation.generation_metrics import compute_finding_f1, label_reports, score_reports, unpack_findings
from place.evaluation.metrics import draw_weights
from place.evaluation.report_decoder import (
    Pairs,
    Visual,
    build_words,
    compute_loss,
    read_language,
    tidy,
    train_decoder,
)
from place.evaluation.suite import find_offers, run_evaluation
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run

REPORTS = ["There is a 2.5 cm nodule.", "The heart is normal, without edema.", "No pleural effusion (small)."]
SMALL = GenerationConfig(width=32, steps=150, batch_size=12, lr=5e-3, max_words=12, beams=2)


def build_pairs(count: int, seed: int = 0) -> Pairs:
    """Images whose first two patches, or first V-POR, tell which of three reports they have; the rest is noise."""
    rng = torch.Generator().manual_seed(seed)
    which = torch.arange(count) % 3
    patches, observations = (0.3 * torch.randn(count, tokens, 6, generator=rng) for tokens in (4, 2))
    patches[which == 1, :2, 0] += 3
    observations[which == 2, 0, 1] += 3
    return Pairs(Visual(patches, observations), [REPORTS[number] for number in which])


def build_task(run_dir, data_dir, split="test", **options) -> Task:
    run = load_run(run_dir)
    evaluation = run.config.evaluation
    evaluation = evaluation.model_copy(update={"generation": evaluation.generation.model_copy(update=options)})
    return Task(TaskInput(run, data_dir, {"labels": []}, split, evaluation))


@pytest.fixture(scope="module")
def trained():
    pairs = build_pairs(240)
    return (*train_decoder(SMALL, pairs, pairs), pairs)


@pytest.fixture(scope="module")
def result(run_dir, data_dir):
    return run_generation(build_task(run_dir, data_dir))


def test_the_decoder_writes_what_patches_and_observations_tell(trained):
    decoder, _, step, _ = trained
    fresh = build_pairs(12, seed=1)
    assert decoder.write(fresh.visual, 2) == fresh.reports
    assert 0 < step <= SMALL.steps


def test_other_images_get_other_reports_whoever_stands_beside_them(trained):
    decoder, *_, pairs = trained
    order = torch.tensor([2, 0, 1])
    assert decoder.write(pairs.visual.take(order), 2) == [pairs.reports[row] for row in order]
    blind = pairs.visual._replace(observations_BKE=torch.zeros_like(pairs.visual.observations_BKE))
    written = decoder.write(blind.take(torch.arange(3)), 2)
    assert written[1] == REPORTS[1]
    assert written[2] != REPORTS[2]


def test_one_beam_is_the_likeliest_next_word_each_time(trained):
    decoder, *_, pairs = trained
    visual = pairs.visual.take(torch.arange(5, 8))
    ids_BT = torch.full((3, 1), decoder.begin_id)
    for _ in range(SMALL.max_words):
        logits = decoder.model(input_ids=ids_BT, use_cache=False, **decoder._attend(visual)).logits[:, -1]
        ids_BT = torch.cat([ids_BT, logits.argmax(1, keepdim=True)], 1)
    rows = [row[1:].tolist() for row in ids_BT]
    expected = [
        tidy(decoder.tokenizer.decode(row[: row.index(decoder.end_id)], skip_special_tokens=True)) for row in rows
    ]
    assert decoder.write(visual, 1) == expected


def test_the_same_seed_gives_the_same_weights_and_leaves_torch_alone():
    pairs, config = build_pairs(12), SMALL.model_copy(update={"steps": 3})
    before = torch.get_rng_state()
    first, second = (train_decoder(config, pairs, pairs)[0].state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train_decoder(config.model_copy(update={"seed": 1}), pairs, pairs)[0].state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_decoder_that_diverges_is_refused_in_one_line():
    pairs, config = build_pairs(12), SMALL.model_copy(update={"steps": 3, "lr": float("inf")})
    with pytest.raises(RunError, match="^the report decoder: training diverged, .* in 3 steps; lower .*evaluation$"):
        train_decoder(config, pairs, pairs)


def test_padding_does_not_count_in_the_loss(trained):
    decoder, *_, pairs = trained
    visual = pairs.visual.take(torch.arange(3))
    targets = [int(decoder.tokenize([report])[1].sum()) - 1 for report in REPORTS]
    assert len(set(targets)) > 1
    alone = [compute_loss(decoder, Pairs(visual.take(torch.tensor([row])), [REPORTS[row]]), 1) for row in range(3)]
    together = compute_loss(decoder, Pairs(visual, REPORTS), 3)
    assert together == pytest.approx(np.average(alone, weights=targets), rel=1e-4)


def test_words_keep_numbers_whole_and_come_back_as_a_report():
    tokenizer = build_words(REPORTS * 3 + ["Rare words."])
    ids = tokenizer("There is a 2.5 cm nodule. Rare edema (small).")["input_ids"]
    words = ["there", "is", "a", "2.5", "cm", "nodule", ".", "[UNK]", "edema", "(", "small", ")."]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tidy(tokenizer.decode(ids, skip_special_tokens=True)) == "There is a 2.5 cm nodule. Edema (small)."
    assert tidy("no edema . the heart , 2.5 cm") == "No edema. The heart, 2.5 cm"


def test_the_task_scores_what_it_stored(result, run_dir, data_dir):
    rows, task = result.rows, build_task(run_dir, data_dir)
    units = get_units(read_units(data_dir, "test"), rows["sample_id"])
    written = {"": rows["generated"], "shuffled.": [rows["generated"][-1], *rows["generated"][:-1]]}
    written |= {f"{name}.": rows[name] for name in ("nearest", "most_frequent")}
    for before, texts in written.items():
        for name, metric in score_reports(texts, rows["reference"], units, task.evaluation.bootstrap).items():
            assert result.metrics[before + name] == metric
    for name in ("generated", "reference"):
        assert (unpack_findings(rows[f"{name}_findings"]) == label_reports(rows[name])).all()
    assert next(iter(result.metrics)) == HEADLINE
    assert result.num_samples == 41
    assert rows["sample_id"] == sorted(rows["sample_id"])
    reports = {
        item["sample_id"]: " ".join(s["text"] for s in item["sentences"]) for item in read_samples(data_dir, "test")
    }
    assert [reports[key] for key in rows["sample_id"]] == rows["reference"]


def test_the_baselines_are_training_reports(result, run_dir, data_dir):
    train = list(read_samples(data_dir, "train"))
    reports = [" ".join(item["text"] for item in sample["sentences"]) for sample in train]
    top = max(Counter(reports).values())
    assert {reports.count(report) for report in result.rows["most_frequent"]} == {top}
    assert len(set(result.rows["most_frequent"])) == 1
    run = load_run(run_dir)
    first = next(item for item in read_samples(data_dir, "test") if item["sample_id"] == result.rows["sample_id"][0])
    train_BE, own_E = (encode_visual(run, [item["image"] for item in items]).image_BE for items in (train, [first]))
    assert result.rows["nearest"][0] == reports[int((train_BE @ own_E[0]).argmax())]


def test_an_image_encoder_alone_writes_from_its_patches(run_dir, data_dir, result):
    run = load_run(run_dir)
    encoder, evaluation = wrap_run(run, "alone"), run.config.evaluation
    alone = run_generation(Task(TaskInput(None, data_dir, {"labels": []}, "test", evaluation, encoder=encoder)))
    assert alone.protocol["score"].endswith("over the frozen encoder's patch tokens")
    assert result.protocol["score"].endswith("patch tokens and V-PORs")
    for column in ("sample_id", "reference", "most_frequent"):
        assert alone.rows[column] == result.rows[column]
    train = list(read_samples(data_dir, "train"))
    first = next(item for item in read_samples(data_dir, "test") if item["sample_id"] == alone.rows["sample_id"][0])
    train_BE, own_E = (encoder.encode_images([item["image"] for item in items]) for items in (train, [first]))
    nearest = train[int(torch.nn.functional.cosine_similarity(train_BE, own_E).argmax())]
    assert alone.rows["nearest"][0] == " ".join(item["text"] for item in nearest["sentences"])


def test_the_sections_judged_may_be_said_for_every_encoder_alike(run_dir, data_dir, result):
    assert result.protocol["sections"] == "all"
    run, few = load_run(run_dir), {"sections": "impression", "steps": 2}
    of_run = build_task(run_dir, data_dir, **few)
    given = TaskInput(None, data_dir, {"labels": []}, "test", of_run.evaluation, encoder=wrap_run(run, "alone"))
    first, second = (run_generation(task) for task in (of_run, Task(given)))
    assert first.protocol["sections"] == second.protocol["sections"] == "impression"
    assert first.rows["reference"] == second.rows["reference"] != result.rows["reference"]
    samples = {sample["sample_id"]: sample["sentences"] for sample in read_samples(data_dir, "test")}
    own = samples[first.rows["sample_id"][0]]
    assert first.rows["reference"][0] == " ".join(item["text"] for item in own if item["section"] == "impression")


def test_the_protocol_says_which_baselines_were_beaten(result):
    names = [name for name in result.metrics if "." not in name]
    above = [n for n in names if all(result.metrics[n].value > result.metrics[f"{b}.{n}"].value for b in BASELINES)]
    note = result.protocol["notes"][0]
    assert set(note.removeprefix("above all baselines in: ").split(", ")) == set(above or ["nothing"])
    assert "30" in result.protocol["trained_on"].split("of")[-1]


def test_a_decoder_that_did_not_see_all_its_images_says_so(run_dir, data_dir, result):
    count = len(read_ids(data_dir, "train"))
    assert count > 16
    assert result.protocol["passes"] == [round(30 * 16 / count, 2)]
    assert result.protocol["passes"][0] > 1
    assert "draws" not in " ".join(result.protocol["notes"])
    short = run_generation(build_task(run_dir, data_dir, steps=1)).protocol
    assert short["passes"] == [round(16 / count, 2)]
    said = f"trained on 16 draws of {count} images, less than once through them; raise evaluation.generation.steps"
    assert said in short["notes"]


@pytest.fixture(scope="module")
def evaluated(run_dir, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    run_evaluation(run_dir, data_dir, ["generation"], output=folder)
    return folder


def test_texts_are_kept_and_shown_on_the_page(evaluated):
    rows = pq.read_table(evaluated / "generation.parquet").to_pylist()
    page = (evaluated / "report.html").read_text()
    for row in rows[:4]:
        assert all(row[name] in page for name in ("generated", "reference", "nearest"))
    assert "shuffled" in page
    assert json.loads((evaluated / "generation.json").read_text())["protocol"]["settings"]["beams"] == 2


def rewrite(evaluated, folder, **columns):
    """A copy whose generation.parquet has other columns; None takes one out."""
    path = shutil.copytree(evaluated, folder) / "generation.parquet"
    table = pq.read_table(path).to_pydict() | columns
    pq.write_table(pa.table({name: column for name, column in table.items() if column is not None}), path)
    return folder


def test_finding_f1_of_two_evaluations_is_compared_report_by_report(evaluated, data_dir, tmp_path, capsys):
    table = pq.read_table(evaluated / "generation.parquet")
    truth = table["reference_findings"].to_numpy()
    right = rewrite(evaluated, tmp_path / "right", generated_findings=truth)
    found = run_compare(evaluated, right, data_dir, 200).tasks["generation"]
    metrics = json.loads((evaluated / "generation.json").read_text())["metrics"]
    assert set(found) == {name for name in metrics if name.startswith("f1_")}
    assert all(item.first == pytest.approx(metrics[name]["value"]) for name, item in found.items())
    gap, low, high = found["f1_macro_14"].difference
    assert found["f1_macro_14"].second == 1
    assert 0 < low < gap < high
    units_B = np.array(get_units(read_units(data_dir, "test"), sorted(table["sample_id"].to_pylist())))
    order = np.argsort(table["sample_id"].to_numpy())
    said_BF, true_BF = (
        unpack_findings(table[f"{name}_findings"].to_numpy()[order]) for name in ("generated", "reference")
    )
    drawn_R = 1 - compute_finding_f1(said_BF, true_BF, draw_weights(units_B, 200))["f1_macro_14"]
    assert (low, high) == pytest.approx(np.percentile(drawn_R, [2.5, 97.5]))
    assert main(["compare", str(evaluated), str(right), "--data", str(data_dir), "--bootstrap", "100"]) == 0
    shown = capsys.readouterr().out
    assert "f1 macro 14" in shown
    assert "F1 of findings alone is compared report by report" in " ".join(shown.split())


def test_other_findings_of_the_references_are_refused_and_texts_alone_are_told(evaluated, data_dir, tmp_path):
    truth = pq.read_table(evaluated / "generation.parquet")["reference_findings"].to_numpy()
    with pytest.raises(UsageError, match="generation: 2 images or findings were judged, or labelled, in one of"):
        run_compare(
            evaluated, rewrite(evaluated, tmp_path / "a", reference_findings=[truth[0] ^ 1, *truth[1:]]), data_dir
        )
    old = rewrite(evaluated, tmp_path / "b", reference_findings=None, generated_findings=None)
    found = run_compare(evaluated, old, data_dir, 100)
    assert found.tasks == {}
    assert found.notes[0].startswith("generation: no figures of single images are there")


def test_a_split_that_was_trained_on_is_refused_and_not_offered(run_dir, data_dir):
    with pytest.raises(UsageError, match="judge another one"):
        run_generation(build_task(run_dir, data_dir, "train"))
    card = {"labels": []}
    assert "training reports" in find_offers(data_dir, card, "test")
    assert "training reports" not in find_offers(data_dir, card, "train")


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_local_folder_of_weights_writes_too(tmp_path, kind):
    pairs, folder = build_pairs(12), write_language(tmp_path, kind)
    config = GenerationConfig(decoder=folder, steps=2, max_words=8, beams=2, lr=1e-9)
    decoder, origin, _ = train_decoder(config, pairs, pairs)
    assert folder in origin
    written = decoder.write(pairs.visual.take(torch.arange(2)), 2)
    assert len(written) == 2
    assert all(len(text.split()) <= 8 for text in written)
    saved, used = load_file(f"{folder}/model.safetensors"), decoder.model.state_dict()
    assert len(saved) > 10
    assert all(torch.allclose(used[name], weight, atol=1e-6) for name, weight in saved.items())
    with pytest.raises(UsageError, match="max_words=40: .* has 32 positions"):
        train_decoder(config.model_copy(update={"max_words": 40}), pairs, pairs)


def write_language(folder, kind: str) -> str:
    """A tiny language model without cross-attention, as others save theirs."""
    from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

    from place.data.tokens import train_tokenizer

    if kind == "gpt2":
        tokenizer = build_words(REPORTS * 3)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2))
    else:
        tokenizer = train_tokenizer(REPORTS, 200, 32, 4).hf
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        }
        model = BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), is_decoder=True, **sizes))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def test_a_folder_that_cannot_write_is_one_line(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    with pytest.raises(UsageError, match=r"decoder=.*nothing: .*give a folder"):
        read_language(str(tmp_path / "nothing"))
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    OPTForCausalLM(OPTConfig(vocab_size=30, max_position_embeddings=16, **sizes)).save_pretrained(tmp_path)
    build_words(REPORTS * 3).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no cross-attention; take GPT-2 or BERT"):
        read_language(str(tmp_path))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValidationError, match="must divide width=128"):
        EvaluationConfig(generation={"num_heads": 3})


def test_images_without_a_report_are_left_out_and_counted(run_dir, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    rows = pq.read_table(copy / "manifest.parquet").to_pylist()
    silent = sorted(row["sample_id"] for row in rows if row["split"] == "test")[::2]
    rows = [row | {"num_words": 0 if row["sample_id"] in silent else row["num_words"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), copy / "manifest.parquet")
    found = run_generation(build_task(run_dir, copy, steps=2))
    assert found.protocol["without_report"] == len(silent) == 21
    assert not {*silent} & {*found.rows["sample_id"]}
    assert found.num_samples == 20
