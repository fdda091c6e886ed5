"""The whole evaluation of a real tiny run: files, picture, table, and each way to ask wrongly."""

from __future__ import annotations

import io
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

from place import __version__, cli
from place.config import EvaluationConfig, FinetuneConfig, GenerationConfig, RunError, UsageError
from place.data.masks import MASKS_FILE
from place.data.prepared import read_card
from place.data.protocol import read_protocol
from place.evaluation.detection import list_boxed
from place.evaluation.encoder import read_units
from place.evaluation.generation import read_ids
from place.evaluation.grounding import read_prior
from place.evaluation.leaks import read_rows
from place.evaluation.metrics import draw_weights
from place.evaluation.suite import (
    IN_FOLDS,
    TASKS,
    choose_tasks,
    find_offers,
    group_tasks,
    judge,
    print_results,
    run_evaluation,
)
from place.evaluation.task import Task, TaskInput
from place.runlog import read_commit
from place.training.checkpoint import load_run

PROTOCOLS = Path(__file__).parents[2] / "configs" / "eval"


@pytest.fixture(scope="module")
def results(run_dir, data_dir):
    return run_evaluation(run_dir, data_dir, ["all"])


def test_all_tasks_write_their_contract(results, run_dir):
    # Those that train the encoder run by name only.
    assert list(results) == [name for name in TASKS if name not in ("finetune", "finetune_segmentation")]
    for name, result in results.items():
        tree = json.loads((run_dir / "evaluation" / f"{name}.json").read_text())
        assert {"task", "metrics", "protocol", "data_fingerprint", "commit", "num_samples"} <= set(tree)
        assert tree["task"] == name
        assert tree["commit"] == "c0ffee"
        assert tree["data_fingerprint"] == "f" * 64
        assert tree["metrics"].keys() == result.metrics.keys()
        assert all(set(metric) == {"value", "low", "high"} for metric in tree["metrics"].values())


@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_protocol_names_figures_that_its_tasks_give(results, path):
    for task, metrics in read_protocol(path).tasks.items():
        assert {*metrics} - {*results[task].metrics} == set(), task


def test_every_figure_has_an_interval(results):
    figures = {f"{task}:{name}": metric for task, found in results.items() for name, metric in found.metrics.items()}
    assert {"classification:mean_calibration_error", "classification:calibration_error.edema"} <= set(figures)
    assert [name for name, metric in figures.items() if metric.low is None or metric.high is None] == []


def test_resamples_that_lack_a_class_are_counted_beside_the_intervals_and_told(run_dir, data_dir, tmp_path):
    evaluation = EvaluationConfig(bootstrap=200)
    task = Task(TaskInput(load_run(run_dir), data_dir, read_card(data_dir), "test", evaluation, folder=tmp_path))
    rare = task.encoded.studies[0].sample_id
    studies = [s._replace(labels=s.labels | {"nodule": int(s.sample_id == rare)}) for s in task.encoded.studies]
    task.encoded = task.encoded._replace(studies=studies)
    found = judge(task, ["zero_shot"], tmp_path, "latest")
    tree = json.loads((tmp_path / "zero_shot.json").read_text())
    has_it_R = draw_weights(task.encoded.unit_B, 200)[:, 0] > 0
    used = tree["protocol"]["resamples_used"]
    assert used["mean_auroc"] == used["auroc.nodule"] == used["pathology.mean_auroc"] == has_it_R.sum() < 190
    assert "auroc.edema" not in used
    note = f"in the others some finding has no positive or no negative image: mean_auroc {has_it_R.sum()}"
    stream = io.StringIO()
    print_results(found, Console(file=stream, width=100))
    assert note in " ".join(stream.getvalue().split())
    assert note in " ".join((tmp_path / "report.html").read_text().split())


def test_uncertain_labels_and_findings_without_both_classes_are_told(results):
    protocol = results["zero_shot"].protocol
    assert protocol["findings"]["effusion"]["no_label"] == 5
    assert "nodule" in protocol["left_out"]


def test_the_pixel_probe_learns_what_pixels_tell(results):
    metrics = results["pixel_probe"].metrics
    assert metrics["auroc.effusion"].value > 0.9
    assert metrics["auroc.edema"].value > 0.9


def test_probe_and_zero_shot_judge_the_same_studies(results):
    assert results["pixel_probe"].protocol["findings"] == results["zero_shot"].protocol["findings"]


def test_the_picture_is_drawn(results, run_dir):
    image = cv2.imread(str(run_dir / "evaluation" / "explain.png"))
    assert image.shape[0] > 1000
    assert image.std() > 10


def test_the_tables_fit_100_columns(results):
    stream = io.StringIO()
    print_results(results, Console(file=stream, width=100))
    text = stream.getvalue()
    assert "…" not in text
    assert "image to text" in text
    assert "left out nodule" in text
    assert "generation: 41 reports" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_same_evaluation_gives_the_same_figures(results, run_dir, data_dir, tmp_path):
    again = run_evaluation(run_dir, data_dir, ["retrieval"], output=tmp_path)
    assert again["retrieval"].metrics == results["retrieval"].metrics


def test_tasks_in_processes_of_their_own_find_the_same(results, run_dir, data_dir, tmp_path, monkeypatch):
    # In this process none can be judged: the others have the tasks as they are.
    monkeypatch.setattr("place.evaluation.suite.TASKS", dict.fromkeys(TASKS))
    evaluation = load_run(run_dir).config.evaluation.model_copy(update={"num_workers": 2})
    tasks, told = ["retrieval", "classification", "segmentation", "generation"], []
    again = run_evaluation(
        run_dir, data_dir, tasks, evaluation=evaluation, output=tmp_path, on_progress=lambda *step: told.append(step)
    )
    assert list(again) == tasks
    assert [step for step in told if step[0] == "judge, tasks"][-1] == ("judge, tasks", 4, 4)
    for name in tasks:
        own, other = (json.loads((f / f"{name}.json").read_text()) for f in (tmp_path, run_dir / "evaluation"))
        assert own["metrics"].keys() == other["metrics"].keys()
        for figure, metric in own["metrics"].items():
            assert metric == pytest.approx(other["metrics"][figure], rel=1e-6, nan_ok=False), (name, figure)
        assert own["encoder"] == other["encoder"]
        assert own["protocol"].keys() == other["protocol"].keys()
    written, before = (pq.read_table(f / "generation.parquet") for f in (tmp_path, run_dir / "evaluation"))
    assert written["generated"] == before["generated"]
    assert (tmp_path / "segmentation.png").is_file()
    assert (tmp_path / "report.html").is_file()


def test_what_a_process_of_tasks_finds_wrong_or_how_it_dies_is_one_line(run_dir, data_dir, tmp_path):
    evaluation = EvaluationConfig(num_workers=2, generation=GenerationConfig(decoder=str(tmp_path)))
    with pytest.raises(UsageError, match="give a folder with config, safetensors and tokenizer"):
        run_evaluation(run_dir, data_dir, ["generation", "retrieval"], evaluation=evaluation, output=tmp_path / "out")
    task = Task(TaskInput(load_run(run_dir), data_dir, read_card(data_dir), "test", evaluation, folder=tmp_path))
    with pytest.raises(RunError, match="lack of memory; fewer evaluation.num_workers take less"):
        judge(task, ["generation", "retrieval"], tmp_path, "latest", reopen=partial(os._exit, 1))


def test_long_tasks_come_first_and_those_on_reports_are_one_job():
    assert group_tasks(["zero_shot", "retrieval", "detection", "grounding", "generation"]) == [
        ["generation"],
        ["detection"],
        ["zero_shot", "retrieval", "grounding"],
    ]
    assert {name for group in group_tasks(list(TASKS)) for name in group} == {*TASKS}


def test_a_run_without_validation_is_judged_by_tasks_that_train(run_dir, data_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    config = (copy / "config.yaml").read_text()
    assert "val_split: val" in config
    (copy / "config.yaml").write_text(config.replace("val_split: val", "val_split: none"))
    tasks, options = ["classification", "grounding"], EvaluationConfig(bootstrap=0)
    results = run_evaluation(copy, data_dir, tasks, "test", "latest", options, tmp_path / "out")
    assert "on 'val'" in results["classification"].protocol["chosen_on"]


def test_the_gallery_is_cut_to_size_and_findings_are_chosen(run_dir, data_dir, tmp_path):
    options = EvaluationConfig(gallery_size=10, bootstrap=0, findings=["edema"], batch_size=7)
    results = run_evaluation(run_dir, data_dir, ["retrieval", "zero_shot"], "val", "latest", options, tmp_path)
    assert results["retrieval"].protocol["num_reports"] == 10
    assert list(results["zero_shot"].protocol["findings"]) == ["edema"]
    assert all(metric.low is None for result in results.values() for metric in result.metrics.values())
    print_results(results, Console(file=io.StringIO(), width=100))


def test_the_encoder_and_raw_pixels_stand_side_by_side(results):
    stream = io.StringIO()
    print_results({name: results[name] for name in ("classification", "pixel_probe")}, Console(file=stream, width=100))
    text = stream.getvalue()
    row = next(line for line in text.splitlines() if line.startswith("edema")).split()
    assert row[-4] == f"{results['pixel_probe'].metrics['auroc.edema'].value:.3f}"
    assert f"{results['classification'].metrics['auroc.edema'].value:.3f}" in row
    assert "pixel probe:" not in text


def test_scores_of_others_stand_beside_those_of_their_task(run_dir, data_dir, tmp_path):
    """As the protocol file tells them; on the screen, in the JSON and on the page."""
    told = {"task": "retrieval", "metric": "R@5", "source": "its paper, table 2", "evidence": "measured"}
    peers = [
        {"name": "ConVIRT", "values": {"1 %": 61.5, "100 %": 70.0}} | told,
        {"name": "GLoRIA", "values": {"100 %": 71.25}} | told,
        {"name": "MedKLIP", "values": {"100 %": 1.0}} | told | {"task": "detection"},
    ]
    figures = {"retrieval": ["image_to_text.mrr", "mrr"], "detection": ["mean_app"]}
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    card = json.loads((data / "card.json").read_text())
    (data / "card.json").write_text(json.dumps(card | {"protocol": {"peers": peers, "tasks": figures}}))
    results = run_evaluation(run_dir, data, ["retrieval"], output=tmp_path / "out")
    stream = io.StringIO()
    print_results(results, Console(file=stream, width=100))
    rows = [line.split() for line in stream.getvalue().splitlines()]
    assert ["ConVIRT", "R@5", "61.5", "70", *["its", "paper,", "table", "2", "(measured)"]] in rows
    assert ["GLoRIA", "R@5", "71.25", *["its", "paper,", "table", "2", "(measured)"]] in rows
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())["protocol"]
    assert written["peers"] == peers[:2]
    absent = [note for note in written["notes"] if "names" in note]
    assert absent == ["the data set's protocol names mrr, which is not given"]
    assert "protocol names mrr, which is not given" in " ".join(stream.getvalue().split())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ConVIRT" in page
    assert "<span>1 %: 61.5,</span> <span>100 %: 70</span>" in page
    assert "MedKLIP" not in page


def test_the_protocol_says_which_findings_count_and_the_command_line_comes_first(run_dir, data_dir, tmp_path):
    data = shutil.copytree(data_dir, tmp_path / "data")
    card = json.loads((data / "card.json").read_text())
    (data / "card.json").write_text(json.dumps(card | {"protocol": {"findings": ["edema"]}}))
    words = ["evaluate", "--run", str(run_dir), "--data", str(data), "--tasks", "zero_shot", "--output", str(tmp_path)]
    for given, counted in (([], ["edema"]), (["evaluation.findings=[effusion]"], ["effusion"])):
        assert cli.main([*words, "evaluation.bootstrap=0", *given]) == 0
        assert list(json.loads((tmp_path / "zero_shot.json").read_text())["protocol"]["findings"]) == counted


def test_findings_of_the_runs_own_data_do_not_stand_in_the_way_on_other_data(run_dir, data_dir, tmp_path, capsys):
    """As a run of the demo, which names the phantoms' findings, on a data set that spells them otherwise."""
    run, other = shutil.copytree(run_dir, tmp_path / "run"), shutil.copytree(data_dir, tmp_path / "data")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluation"]["findings"] = ["Effusion", "edema"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["evaluate", "--run", str(run), "--tasks", "zero_shot", "--output", str(tmp_path)]
    assert cli.main([*words, "--data", str(other), "evaluation.bootstrap=0"]) == 0
    assert f"{other} has no label 'Effusion', which the encoder's own evaluation.findings name: all are judged" in (
        capsys.readouterr().out
    )
    judged = json.loads((tmp_path / "zero_shot.json").read_text())["protocol"]
    assert {*judged["findings"], *judged["left_out"]} == set(read_card(other)["labels"])
    assert cli.main([*words, "--data", str(other), "evaluation.findings=[Effusion]"]) == 2
    assert "has no label 'Effusion'; did you mean 'effusion'?" in capsys.readouterr().err
    assert cli.main([*words, "--data", config["data"]["path"]]) == 2, "a wrong name for one's own data is refused"


def test_a_result_says_what_code_judged_it_and_what_of_reports_was_read(run_dir, data_dir, tmp_path):
    run_evaluation(run_dir, data_dir, ["retrieval"], evaluation=EvaluationConfig(bootstrap=0), output=tmp_path)
    result = json.loads((tmp_path / "retrieval.json").read_text())
    assert result["judged_by"] == {"commit": read_commit(), "version": __version__}
    assert result["protocol"]["sections"] == "all"


def test_a_data_set_without_labels_permits_what_reports_alone_can_tell(run_dir, unlabelled_dir, tmp_path):
    assert list(run_evaluation(run_dir, unlabelled_dir, ["all"], output=tmp_path)) == ["retrieval", "generation"]
    with pytest.raises(UsageError, match="'zero_shot' needs labels"):
        run_evaluation(run_dir, unlabelled_dir, ["zero_shot"], output=tmp_path)


def test_images_without_reports_permit_what_needs_none(run_dir, wordless_dir, tmp_path):
    offers = find_offers(wordless_dir, read_card(wordless_dir), "test")
    assert offers == {"labels", "training labels", "training masks", "training boxes"}
    chosen = choose_tasks(["all"], offers)
    assert {"zero_shot", "classification", "segmentation", "detection"} <= {*chosen}
    assert not {"retrieval", "generation", "grounding"} & {*chosen}
    for name in ("retrieval", "generation", "grounding"):
        with pytest.raises(UsageError, match=f"'{name}' needs"):
            run_evaluation(run_dir, wordless_dir, [name], output=tmp_path)
    results = run_evaluation(run_dir, wordless_dir, ["zero_shot"], output=tmp_path)
    assert 0 <= results["zero_shot"].metrics["mean_auroc"].value <= 1
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("names", "message"),
    [(["retrival"], "did you mean 'retrieval'"), (["xyz"], "take zero_shot, retrieval"), ([], "no task was named")],
)
def test_wrong_task_names_say_what_there_is(names, message):
    with pytest.raises(UsageError, match=message):
        choose_tasks(names, {"labels", "training boxes", "training masks"})


def test_a_probe_without_a_training_split_says_so(run_dir, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    pq.write_table(
        pq.read_table(copy / "manifest.parquet", filters=[("split", "==", "test")]), copy / "manifest.parquet"
    )
    with pytest.raises(UsageError, match="'pixel_probe' needs training labels.*train and val patients"):
        run_evaluation(run_dir, copy, ["pixel_probe"], output=tmp_path)
    rows = pq.read_table(copy / MASKS_FILE, filters=[("split", "==", "test")])
    pq.write_table(rows, copy / MASKS_FILE)
    card = read_card(copy)
    chosen = choose_tasks(["all"], find_offers(copy, card, "test"))
    assert chosen == ["zero_shot", "retrieval", "grounding"], "what only a test split permits"
    assert choose_tasks(["all"], find_offers(copy, card, "test", folds=3)) == [*chosen, "segmentation", "detection"]


@pytest.mark.parametrize("content", [b"", b"PAR1", None], ids=["empty", "short", "torn"])
@pytest.mark.parametrize(
    "read",
    [
        lambda data: find_offers(data, {"labels": []}, "test"),
        lambda data: read_units(data, "test"),
        lambda data: read_rows(data, lambda *_: None),
        lambda data: list_boxed(SimpleNamespace(data_dir=data), "test"),
        lambda data: read_prior(SimpleNamespace(data_dir=data, train_split="train", split="test")),
        lambda data: read_ids(data, "test"),
    ],
    ids=["offers", "patients", "leaks", "detection", "grounding", "generation"],
)
def test_a_damaged_manifest_is_one_line_wherever_it_is_read(data_dir, tmp_path, read, content):
    manifest = shutil.copytree(data_dir, tmp_path / "copy") / "manifest.parquet"
    # Torn: the end, which is read first, is whole.
    whole = manifest.read_bytes()
    manifest.write_bytes(b"\xff" * (len(whole) // 2) + whole[len(whole) // 2 :] if content is None else content)
    with pytest.raises(RunError, match=f"^{manifest} cannot be read .*; prepare the data set again") as caught:
        read(manifest.parent)
    assert "\n" not in str(caught.value)


def test_folds_judge_the_training_images_too_which_the_run_may_not_know(run_dir, data_dir, tmp_path):
    folded = EvaluationConfig(bootstrap=0, folds=3)
    with pytest.raises(RunError, match=r"allow_leaks=\[pretraining.patient,pretraining.image,selection.image\]"):
        run_evaluation(run_dir, data_dir, ["segmentation"], evaluation=folded, output=tmp_path)
    run_evaluation(run_dir, data_dir, ["retrieval"], evaluation=folded, output=tmp_path)


def test_the_split_that_heads_are_trained_on_is_not_offered_to_them(data_dir):
    offers = find_offers(data_dir, read_card(data_dir), "train")
    assert choose_tasks(["all"], offers) == ["zero_shot", "retrieval", "grounding"]


def test_a_folder_that_cannot_be_written_is_named(run_dir, data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="give a folder that can be written"):
        run_evaluation(run_dir, data_dir, ["retrieval"], output=tmp_path / "file" / "below")


@pytest.mark.gpu
def test_a_gpu_gives_the_figures_of_the_cpu_and_trains_every_head(run_dir, data_dir, tmp_path, monkeypatch):
    few = EvaluationConfig(
        bootstrap=0,
        finetune=FinetuneConfig(max_steps=4),
        generation=GenerationConfig(width=32, steps=20, beams=2),
    )
    frozen = ["zero_shot", "retrieval", "classification", "grounding"]
    on_gpu = run_evaluation(run_dir, data_dir, ["all", "finetune", *IN_FOLDS], evaluation=few, output=tmp_path / "gpu")
    monkeypatch.setattr("place.evaluation.suite.choose_device", lambda: torch.device("cpu"))
    on_cpu = run_evaluation(run_dir, data_dir, frozen, evaluation=few, output=tmp_path / "cpu")
    for name in frozen:
        shown, expected = ({key: m.value for key, m in found[name].metrics.items()} for found in (on_gpu, on_cpu))
        assert shown == pytest.approx(expected, abs=0.02, nan_ok=True)
    assert {"finetune", "finetune_segmentation", "segmentation", "detection", "generation"} <= on_gpu.keys()
