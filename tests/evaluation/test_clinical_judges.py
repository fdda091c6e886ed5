"""CheXbert and RadGraph by weights from disk, in the files that their authors publish, made small here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from place.config import GenerationConfig, UsageError
from place.evaluation.chexbert import HEADS, CheXbert
from place.evaluation.generation_metrics import load_judges, score_reports
from place.evaluation.labeler import OBSERVATIONS
from place.evaluation.radgraph_f1 import LEVELS, RadGraphF1
from place.evaluation.suite import run_evaluation
from place.training.checkpoint import load_run

WORDS = [
    "no",
    "edema",
    "effusion",
    "the",
    "heart",
    "is",
    "large",
    "left",
    "small",
    "pneumonia",
    ".",
    "possible",
    "1",
    "2",
]
REPORTS = ["the heart is large .", "no edema .", "possible pneumonia .", "small left effusion . no edema ."]
PATIENTS = np.array([f"p{row}" for row in range(len(REPORTS))])


def write_bert(folder: Path) -> BertConfig:
    """Config and tokenizer of a small BERT in a folder."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config.save_pretrained(folder)
    return config


@pytest.fixture(scope="module")
def chexbert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.ModuleDict]:
    """A folder as CheXbert's users have it, and the modules whose weights are in it."""
    folder = tmp_path_factory.mktemp("judges") / "chexbert"
    torch.manual_seed(0)
    bert = BertModel(write_bert(folder))
    heads = nn.ModuleList([*(nn.Linear(16, 4) for _ in range(13)), nn.Linear(16, 2)])
    for head in heads:
        nn.init.normal_(head.weight, std=2.0)
    modules = nn.ModuleDict({"bert": bert, "linear_heads": heads}).eval()
    state = {f"module.{name}": value for name, value in modules.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"epoch": 3, "model_state_dict": state}, folder / "chexbert.pth")
    return folder, modules


@pytest.fixture(scope="module")
def radgraph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the package radgraph unpacks it, with a small BERT; with weights of the package's own model."""
    from dotmap import DotMap
    from radgraph.allennlp.data import Vocabulary
    from radgraph.allennlp.modules import text_field_embedders, token_embedders
    from radgraph.dygie.models import dygie

    root = tmp_path_factory.mktemp("radgraph")
    torch.manual_seed(1)
    BertModel(write_bert(root / "bert")).save_pretrained(root / "bert")
    bert = {"model_name": str(root / "bert"), "max_length": 128}
    modules = {
        "coref": {"spans_per_word": 0.3, "max_antecedents": 4, "coref_prop": 0},
        "ner": {},
        "relation": {"spans_per_word": 0.5},
        "events": {"trigger_spans_per_word": 0.3, "argument_spans_per_word": 0.8},
    }
    model = {
        "modules": modules,
        "feature_size": 4,
        "max_span_width": 3,
        "target_task": "ner",
        "feedforward_params": {"num_layers": 1, "hidden_dims": 8, "dropout": 0.0},
        "loss_weights": {"ner": 1.0, "relation": 1.0, "coref": 0.0, "events": 0.0},
    }
    config = {
        "dataset_reader": {"max_span_width": 3, "token_indexers": {"bert": bert}},
        "model": model
        | {
            "type": "dygie",
            "initializer": {},
            "module_initializer": {},
            "embedder": {"token_embedders": {"bert": bert}},
        },
    }
    folder = root / "radgraph-xl"
    (folder / "vocabulary").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = {
        "non_padded_namespaces": ["*tags", "*labels"],
        "radgraph-xl__ner_labels": ["", "Anatomy::definitely present", "Observation::definitely absent"],
        "radgraph-xl__relation_labels": ["", "modify", "located_at"],
    }
    for name, lines in names.items():
        (folder / "vocabulary" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    embedder = text_field_embedders.BasicTextFieldEmbedder(
        {"bert": token_embedders.PretrainedTransformerMismatchedEmbedder(**bert)}
    )
    vocabulary = Vocabulary.from_files(str(folder / "vocabulary"), None, None)
    built = dygie.DyGIE(vocab=vocabulary, embedder=embedder, **DotMap(model))
    for weight in built._ner.parameters():
        nn.init.normal_(weight)
    torch.save(built.state_dict(), folder / "weights.th")
    return folder


def test_chexbert_reads_each_report_as_its_heads_do(chexbert: tuple[Path, nn.ModuleDict]) -> None:
    folder, modules = chexbert
    judge = CheXbert(str(folder))
    found = judge.label_reports(["  the heart\nis large .", *REPORTS[1:]])
    assert [set(labels) for labels in found] == [set(OBSERVATIONS)] * 4
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    for report, labels in zip(REPORTS, found, strict=True):
        ids = torch.tensor([tokenizer(report)["input_ids"]])
        with torch.no_grad():
            first = modules["bert"](ids).last_hidden_state[0, 0]
            best = [int(head(first).argmax()) for head in modules["linear_heads"]]
        assert [labels[name] for name in HEADS] == [(None, 1, 0, -1)[number] for number in best]
    values = {value for labels in found for value in labels.values()}
    assert values == {None, 1, 0, -1}, "the weights tell nothing of the classes"


def test_padding_changes_nothing_in_chexbert(chexbert: tuple[Path, nn.ModuleDict]) -> None:
    judge = CheXbert(str(chexbert[0]))
    together = judge.tokenizer(REPORTS, padding=True, return_tensors="pt")
    alone = judge.tokenizer(REPORTS[1], return_tensors="pt")
    assert together["input_ids"].shape[1] > alone["input_ids"].shape[1]
    padded, plain = (judge(read["input_ids"], read["attention_mask"]) for read in (together, alone))
    for head, expected in zip(padded, plain, strict=True):
        torch.testing.assert_close(head[1:2], expected)


def test_chexbert_cuts_a_long_report(chexbert: tuple[Path, nn.ModuleDict]) -> None:
    judge = CheXbert(str(chexbert[0]))
    words = ["heart", "edema"] * 255
    cut, longer = judge.label_reports([" ".join(words), " ".join([*words, "pneumonia"] * 2)])
    assert cut == longer


def test_f1_by_chexbert_counts_what_is_uncertain(chexbert: tuple[Path, nn.ModuleDict]) -> None:
    judge = CheXbert(str(chexbert[0]))
    labels = judge.label_reports(REPORTS)
    true = np.array([[label[name] in (1, -1) for name in OBSERVATIONS] for label in labels])
    assert any(label[name] == -1 for label in labels for name in OBSERVATIONS)
    np.testing.assert_array_equal(judge.find_positive(REPORTS), true)
    rolled = [*REPORTS[1:], REPORTS[0]]
    judges = load_judges(GenerationConfig(chexbert=str(chexbert[0])))
    metrics = score_reports(rolled, REPORTS, PATIENTS, 20, judges=judges)
    said = np.roll(true, -1, axis=0)
    expected = 2 * (said & true).sum() / (said.sum() + true.sum())
    assert metrics["chexbert_f1_micro_14"].value == pytest.approx(expected)
    assert score_reports(REPORTS, REPORTS, PATIENTS, 0, judges=judges)["chexbert_f1_macro_14"].value == 1


def test_radgraph_f1_is_the_packages(radgraph: Path) -> None:
    from radgraph import F1RadGraph

    package = F1RadGraph("all", "radgraph-xl", model_cache_dir=str(radgraph.parent), cuda=-1)
    generated = ["the heart is large . small .", REPORTS[1], "", "small left effusion . no heart ."]
    _, rewards, hypotheses, _ = package(hyps=generated, refs=REPORTS)
    assert all(annotation["entities"] for annotation in hypotheses), "the weights find nothing"
    judge = RadGraphF1(str(radgraph))
    scores = judge.score(generated, REPORTS)
    for level, reward in zip(LEVELS, rewards, strict=True):
        np.testing.assert_allclose(scores[level], reward)
    assert scores["simple"][1] == 1
    assert scores["simple"][2] == 0
    assert 0 < scores["simple"][0] + scores["simple"][3] < 2, scores
    judges = load_judges(GenerationConfig(radgraph=str(radgraph)))
    metrics = score_reports(generated, REPORTS, PATIENTS, 20, judges=judges)
    assert metrics["radgraph_partial"].value == pytest.approx(float(np.mean(rewards[1])))


def test_the_generator_and_its_baselines_are_judged_by_them(
    chexbert: tuple[Path, nn.ModuleDict], radgraph: Path, run_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = load_run(run_dir).config.evaluation
    options = {"chexbert": str(chexbert[0]), "radgraph": str(radgraph), "steps": 2}
    generation = config.generation.model_copy(update=options)
    evaluation = config.model_copy(update={"generation": generation})
    run_evaluation(run_dir, data_dir, ["generation"], evaluation=evaluation, output=tmp_path)
    told = json.loads((tmp_path / "generation.json").read_text())
    for kind in ("chexbert_f1_macro_14", "chexbert_f1_micro_5", "radgraph_partial"):
        assert {f"{before}{kind}" for before in ("", "nearest.", "shuffled.")} <= set(told["metrics"])
    assert "uncertain counts" in told["protocol"]["chexbert"]
    assert "RadGraph F1" in told["protocol"]["radgraph"]
    assert "CheXbert F1 macro 14" in (tmp_path / "report.html").read_text()


def test_a_judge_that_cannot_be_read_is_one_line(
    chexbert: tuple[Path, nn.ModuleDict], radgraph: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"chexbert=.*nowhere.*give a folder with chexbert.pth"):
        CheXbert(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"expected a folder called radgraph, radgraph-xl or modern-radgraph-xl"):
        RadGraphF1(str(chexbert[0]))
    folder = tmp_path / "chexbert"
    write_bert(folder)

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model_state_dict": Evil()}, folder / "chexbert.pth")
    with pytest.raises(UsageError, match=r"give a folder with chexbert.pth"):
        CheXbert(str(folder))
    assert not (tmp_path / "ran").exists()
    torch.save({"model_state_dict": {"module.bert.pooler.dense.bias": torch.zeros(16)}}, folder / "chexbert.pth")
    with pytest.raises(UsageError, match=r"Missing key"):
        CheXbert(str(folder))
