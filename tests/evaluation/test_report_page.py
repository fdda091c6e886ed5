"""The page of an evaluation: whole, self-contained, true to the files beside it, and without identifiers."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from browser.look import look_at
from sklearn.metrics import roc_auc_score

from place.config import EvaluationConfig, RunError
from place.data.prepared import read_card, read_samples
from place.evaluation.curves import Scored, draw_precision_recall, draw_roc
from place.evaluation.report import write_report
from place.evaluation.report_tables import build_bars, build_tables, show_name
from place.evaluation.suite import TASKS, run_evaluation
from place.evaluation.task import Task, TaskInput
from place.training.checkpoint import load_run

TASK_NAMES = ["zero_shot", "retrieval", "segmentation"]
OPTIONS = EvaluationConfig(bootstrap=20, batch_size=16)


class Page(HTMLParser):
    """The text of a page, its tags and the addresses it names."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text, self.words = text, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href") and value[0] != "#"]

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def folder(run_dir, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run_evaluation(run_dir, data_dir, TASK_NAMES, evaluation=OPTIONS, output=folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


def rewrite(run_dir, data_dir, folder) -> Page:
    task = Task(TaskInput(load_run(run_dir), data_dir, read_card(data_dir), "test", OPTIONS))
    return Page(write_report(task, folder, "A title", list(TASKS)).read_text())


def test_the_page_needs_nothing_else_and_runs_nothing(page):
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    kinds = [address.split(";")[0] for address in page.addresses]
    assert kinds.count("data:image/svg+xml") == 2
    for address in page.addresses:
        data = base64.b64decode(address.split(",")[1])
        assert data.startswith(b"<?xml") or cv2.imdecode(np.frombuffer(data, np.uint8), 0).std() > 5


@pytest.mark.browser
def test_the_page_is_whole_in_a_browser_also_with_long_names(folder, tmp_path):
    longer = tmp_path / "longer.html"
    longer.write_text((folder / "report.html").read_text().replace("effusion", "effusion_of_both_sides_" * 5))
    assert look_at([folder / "report.html", longer]) == []


def test_every_figure_of_every_task_is_on_the_page(page, folder):
    for name in TASK_NAMES:
        for metric in json.loads((folder / f"{name}.json").read_text())["metrics"].values():
            digits = 1 if abs(metric["value"]) >= 10 else 3
            assert f"{metric['value']:.{digits}f}" in page.words
            if metric["low"] is not None and abs(metric["low"]) < 10 > abs(metric["high"]):
                assert f"{metric['low']:.3f} to {metric['high']:.3f}" in page.words


def test_the_page_says_what_was_judged_and_how(page):
    for told in ("f" * 64, "c0ffee", "step 3", "'test'", "percentile bootstrap over patients", "left out", "nodule"):
        assert told in page.words, told


def test_the_page_names_no_patient_study_or_path(page, data_dir, run_dir):
    rows = pq.read_table(data_dir / "manifest.parquet").to_pylist()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.text)
    assert not [row for row in rows if str(row["sample_id"]) in text or (row["patient"] and row["patient"] in text)]
    assert str(data_dir) not in text
    assert str(run_dir.parent) not in text


def test_found_reports_stand_beside_their_images_with_a_true_verdict(page, folder, data_dir):
    rows = pq.read_table(folder / "retrieval.parquet").to_pylist()
    reports = {
        item["sample_id"]: " ".join(s["text"] for s in item["sentences"]) for item in read_samples(data_dir, "test")
    }
    assert all(
        reports[row["sample_id"]] == row["report"] and reports[row["found_sample_id"]] == row["found"] for row in rows
    )
    assert all((row["report"] == row["found"]) == (row["rank"] == 1) for row in rows)
    r_at_1 = json.loads((folder / "retrieval.json").read_text())["metrics"]["image_to_text.r_at_1"]["value"]
    assert np.mean([row["rank"] == 1 for row in rows]) == pytest.approx(r_at_1)
    shown = [*rows[:4], *[row for row in rows if row["rank"] == 1][:4]]
    assert page.words.count("own report at rank") == len({row["sample_id"] for row in shown})
    for row in shown:
        assert row["found"] in page.words
        assert row["report"] in page.words


def test_stored_scores_give_the_figures_again(folder):
    table, metrics = (
        pq.read_table(folder / "zero_shot.parquet").to_pandas(),
        json.loads((folder / "zero_shot.json").read_text())["metrics"],
    )
    assert set(table.finding) == {"effusion", "edema"}
    assert (table.finding == "effusion").sum() == 41 - 5
    for name, rows in table.groupby("finding"):
        assert roc_auc_score(rows.label, rows.score) == pytest.approx(metrics[f"auroc.{name}"]["value"], abs=1e-6)


def test_results_of_other_data_or_checkpoints_are_named_and_left_out(run_dir, data_dir, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    result = json.loads((copy / "segmentation.json").read_text())
    result["checkpoint"]["step"] = 77
    (copy / "segmentation.json").write_text(json.dumps(result))
    page = rewrite(run_dir, data_dir, copy)
    assert "segmentation.json: run tiny, step 77" in page.words
    assert "SETR" not in page.words
    assert "A title" in page.words


@pytest.mark.parametrize("name", ["retrieval.json", "retrieval.parquet", "segmentation.png"])
def test_a_damaged_file_is_named(run_dir, data_dir, folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_text("{}")
    with pytest.raises(RunError, match=rf"{name}.*evaluate again"):
        rewrite(run_dir, data_dir, copy)


def test_a_page_that_cannot_be_written_is_one_line(run_dir, data_dir, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    with pytest.raises(RunError, match="give a folder that can be written"):
        rewrite(run_dir, data_dir, copy)


def test_metric_names_become_tables_of_findings_and_kinds():
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = ["mean_auroc", "auroc.a b", "auroc.b", "other.mean_auroc", "other.auroc.b", "num_boxes"]
    protocol = {"findings": {"b": {}, "a b": {}}, "chance": {"mean_auroc": 0.25}}
    first, other, left = build_tables({"task": "x", "metrics": dict.fromkeys(names, metric), "protocol": protocol})
    assert (first.title, first.columns) == ("", ["AUROC"])
    assert [(name, cells[0].value) for name, cells in first.rows] == [
        ("mean", "0.500"), ("chance", "0.250"), ("a b", "0.500"), ("b", "0.500")
    ]  # fmt: skip
    assert first.rows[0][1][0].interval == "0.400 to 0.600"
    assert (other.title, [name for name, _ in other.rows]) == ("other", ["mean", "b"])
    assert [name for name, _ in left.rows] == ["num boxes"]


def test_metrics_without_findings_stand_beside_chance_and_variants():
    names = ["image_to_text.r_at_5", "pathology.image_to_text.r_at_5"]
    metrics = {name: {"value": 20.0, "low": None, "high": None} for name in names}
    (table,) = build_tables(
        {"task": "x", "metrics": metrics, "protocol": {"chance": {"image_to_text": {"r_at_5": 0.1}}}}
    )
    assert table.columns == ["image to text", "image to text chance", "pathology image to text"]
    assert [(name, [cell.value for cell in cells]) for name, cells in table.rows] == [
        ("R@5", ["20.0", "0.100", "20.0"])
    ]
    assert table.rows[0][1][0].interval == ""


def test_bars_show_the_first_kind_of_each_finding_and_stay_in_their_track():
    values = {"mean_cider": 2.0, "cider.a": 4.0, "cider.b": -1.0, "other.a": 0.5}
    metrics = {name: {"value": value, "low": value / 2, "high": None} for name, value in values.items()}
    bars = build_bars({"task": "a_task", "metrics": metrics, "protocol": {"findings": {"a": {}, "b": {}}}})
    assert bars.title == "a task: CIDEr"
    assert [(bar.label, bar.length, bar.low, bar.high) for bar in bars.bars] == [("a", 1, 0.5, None), ("b", 0, 0, None)]
    assert build_bars({"task": "x", "metrics": metrics, "protocol": {}}) is None


def test_names_read_as_words():
    assert show_name("text_to_image.r_at_10") == "text to image R@10"
    assert show_name("nearest.f1_macro_14") == "nearest F1 macro 14"


@pytest.mark.parametrize("count", [1, 14])
def test_curves_are_the_same_for_the_same_scores_and_name_every_finding(count):
    rng = np.random.default_rng(0)
    scored = [Scored(f"finding {n}", np.arange(30) % 2, rng.random(30)) for n in range(count)]
    for draw in (draw_roc, draw_precision_recall):
        assert draw(scored) == draw(scored)
        assert draw(scored) != draw([item._replace(score_B=-item.score_B) for item in scored])
        assert draw(scored).count(b'<g id="text_') > count
