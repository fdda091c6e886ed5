"""Two evaluations side by side: the figures of the evaluations, the same patients in both, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from place.cli import main
from place.config import (
    DetectionConfig,
    EvaluationConfig,
    RunError,
    SegmentationConfig,
    UsageError,
    build_config,
    dump_config,
)
from place.evaluation.ablation import Experiment, Job, pair_job
from place.evaluation.compare import read_judged, run_compare
from place.evaluation.encoder import get_units, read_units
from place.evaluation.metrics import draw_weights, summarize
from place.evaluation.paired import Rows, compare, compare_rows, compute_figures
from place.evaluation.report import draw_curves
from place.evaluation.suite import run_evaluation

TASKS = ["zero_shot", "retrieval", "classification", "grounding", "segmentation", "detection"]
BOOTSTRAP = 60


@pytest.fixture(scope="module")
def evaluated(run_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    options = EvaluationConfig(
        bootstrap=BOOTSTRAP,
        batch_size=16,
        label_shares=(0.5, 1.0),
        label_subsets=2,
        segmentation=SegmentationConfig(max_steps=40, look_every_steps=20),
        # With 40 steps it makes no mistakes.
        detection=DetectionConfig(max_steps=12, look_every_steps=6, batch_size=32),
    )
    run_evaluation(run_dir, data_dir, TASKS, evaluation=options, output=folder)
    return folder


def copy(evaluated: Path, folder: Path, **changes: object) -> Path:
    """A copy whose zero_shot.json says something else."""
    shutil.copytree(evaluated, folder)
    path = folder / "zero_shot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rewrite(path: Path, **columns: object) -> None:
    """Put other columns into a TASK.parquet."""
    table = pq.read_table(path).to_pydict()
    pq.write_table(pa.table(table | columns), path)


def test_the_rows_give_every_figure_of_every_task_again(evaluated: Path, data_dir: Path) -> None:
    same = run_compare(evaluated, evaluated, data_dir, BOOTSTRAP)
    assert list(same.tasks) == sorted(TASKS)
    for task, found in same.tasks.items():
        metrics = json.loads((evaluated / f"{task}.json").read_text())["metrics"]
        expected = {
            name for name in metrics if not name.startswith(("text_to_image", "instance.", "pathology.", "combined."))
        }
        expected -= {name for name in metrics if "brier" in name or "calibration" in name or "p_at" in name}
        assert set(found) == expected
        for name, item in found.items():
            assert item.first == item.second == pytest.approx(metrics[name]["value"], abs=1e-6), (task, name)
            assert item.difference == (0, 0, 0)
            assert item.p == 1


def test_the_intervals_of_every_task_are_those_of_resampled_patients(evaluated: Path, data_dir: Path) -> None:
    units = read_units(data_dir, "test")
    assert len(set(units.values())) < len(units)
    right = set(TASKS)
    for task, (result, columns) in read_judged(evaluated).items():
        ids_B, image_Q = np.unique(columns["sample_id"], return_inverse=True)
        figures = compute_figures(Rows(columns, image_Q), draw_weights(get_units(units, ids_B.tolist()), BOOTSTRAP))
        told = {name: (metric["low"], metric["high"]) for name, metric in result["metrics"].items() if name in figures}
        assert any(low < high for low, high in told.values()), task
        if any(told[name] != pytest.approx(summarize(0, value_R)[1:]) for name, value_R in figures.items()):
            right.remove(task)
    assert right == set(TASKS)


def test_both_are_judged_in_the_same_resamples_of_patients(evaluated: Path, data_dir: Path, tmp_path: Path) -> None:
    better = copy(evaluated, tmp_path / "better")
    rows = pq.read_table(evaluated / "zero_shot.parquet").to_pydict()
    score = np.array(rows["score"]) + 0.05 * np.array(rows["label"])
    order = np.random.default_rng(0).permutation(len(score))  # rows are matched by image, not by place
    shuffled = {name: np.array(rows[name])[order] for name in ("sample_id", "finding", "label")}
    rewrite(better / "zero_shot.parquet", score=score[order], **shuffled)
    found = run_compare(evaluated, better, data_dir, 300, ["zero_shot"]).tasks["zero_shot"]["auroc.edema"]
    gap, low, high = found.difference
    assert gap == pytest.approx(found.second - found.first)
    assert 0 < low < gap < high
    assert found.p == pytest.approx(2 / 301)
    back = run_compare(better, evaluated, data_dir, 300, ["zero_shot"]).tasks["zero_shot"]["auroc.edema"]
    assert back.difference == pytest.approx((-gap, -high, -low))
    assert back.p == found.p


def test_against_equal_scores_the_interval_is_that_of_the_evaluation_itself(
    evaluated: Path, data_dir: Path, tmp_path: Path
) -> None:
    blind = copy(evaluated, tmp_path / "blind")
    count = pq.read_metadata(evaluated / "zero_shot.parquet").num_rows
    rewrite(blind / "zero_shot.parquet", score=np.zeros(count))
    gap = run_compare(blind, evaluated, data_dir, BOOTSTRAP, ["zero_shot"]).tasks["zero_shot"]["auroc.edema"].difference
    own = json.loads((evaluated / "zero_shot.json").read_text())["metrics"]["auroc.edema"]
    assert gap == pytest.approx((own["value"] - 0.5, own["low"] - 0.5, own["high"] - 0.5))


def test_the_interval_and_p_are_those_of_the_resampled_differences() -> None:
    rng = np.random.default_rng(1)
    first_R, second_R = rng.normal(0, 1, 1001), rng.normal(0.5, 1, 1001)
    first_R[5] = np.nan
    found = compare(first_R, second_R)
    gaps = np.delete(second_R - first_R, [0, 5])
    assert found.difference == pytest.approx((second_R[0] - first_R[0], *np.percentile(gaps, [2.5, 97.5])))
    assert found.p == pytest.approx(2 * (1 + (gaps <= 0).sum()) / (len(gaps) + 1))
    alone = compare(first_R[:1], second_R[:1])
    assert (alone.p, alone.difference.low) == (None, None)


def test_patients_come_and_go_together() -> None:
    columns = {"finding": np.array(["a"] * 40), "dice": np.arange(40.0) % 2}
    other = columns | {"dice": np.zeros(40)}
    rows = [Rows(part, np.arange(40)) for part in (columns, other)]
    widths = []
    for unit_B in (np.arange(40), np.arange(40) % 2):
        gap = compare_rows(*rows, draw_weights(unit_B, 400))["mean_dice"].difference
        assert gap.low is not None
        assert gap.high is not None
        widths.append(gap.high - gap.low)
    assert widths[1] == 1  # two patients, of whom one has all: in a quarter of the resamples she is alone
    assert widths[0] < 0.5


def test_curves_are_of_the_first_probe_alone(evaluated: Path) -> None:
    rows = pq.read_table(evaluated / "classification.parquet").to_pydict()
    assert {(share, subset) for share, subset in zip(rows["share"], rows["subset"])} == {(1.0, 0), (0.5, 0), (0.5, 1)}
    first = [row for row, share in enumerate(rows["share"]) if share == 1]
    alone = {name: [rows[name][row] for row in first] for name in ("finding", "label", "score")}
    assert draw_curves(rows) == draw_curves(alone)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"data_fingerprint": "e" * 64},
            "zero_shot: data fingerprint ffffffffffff against eeeeeeeeeeee; evaluate both",
        ),
        ({"protocol": {"split": "val"}}, "zero_shot: split test against val; evaluate both"),
        ({"num_samples": 40}, "zero_shot: images 41 against 40; evaluate both"),
    ],
)
def test_other_data_are_refused_in_one_line(
    evaluated: Path, data_dir: Path, tmp_path: Path, change: dict, said: str
) -> None:
    other = copy(evaluated, tmp_path / "other", **change)
    with pytest.raises(UsageError) as caught:
        run_compare(evaluated, other, data_dir)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_images_and_labels_are_refused(evaluated: Path, data_dir: Path, tmp_path: Path) -> None:
    rows = pq.read_table(evaluated / "zero_shot.parquet").to_pydict()
    for name, column in {
        "sample_id": [1, *rows["sample_id"][1:]],
        "label": [1 - rows["label"][0], *rows["label"][1:]],
    }.items():
        other = copy(evaluated, tmp_path / name)
        rewrite(other / "zero_shot.parquet", **{name: column})
        with pytest.raises(UsageError, match="zero_shot: 2 images or findings were judged, or labelled, in one of"):
            run_compare(evaluated, other, data_dir)


def test_an_ablation_pairs_each_task_that_it_can_and_says_which_it_cannot(
    evaluated: Path, data_dir: Path, tmp_path: Path
) -> None:
    for row in "ab":
        shutil.copytree(evaluated, tmp_path / row / "run" / "evaluation")
    rewrite(
        tmp_path / "b/run/evaluation/zero_shot.parquet",
        finding=["other"] * pq.read_metadata(evaluated / "zero_shot.parquet").num_rows,
    )
    column, row = {"title": "Dice", "metric": "segmentation:mean_dice"}, {"title": ""}
    tree = {"base": "", "folder": "", "data": str(data_dir), "tasks": ",".join(TASKS), "reference": "a"}
    experiment = Experiment.model_validate(tree | {"columns": [column], "rows": {"a": row, "b": row}})
    first, second = (Job(row, 0, tmp_path / row, "", experiment.tasks) for row in "ab")
    said: list[str] = []
    gaps = pair_job(second, first, experiment, said.append)
    assert {name.split(":")[0] for name in gaps} == set(TASKS) - {"zero_shot"}
    assert gaps["segmentation:mean_dice"] == [0.0, 0.0, 0.0]
    (line,) = said
    assert line.startswith("b, seed 0: not paired with a: zero_shot: ")


def test_what_cannot_be_compared_is_said(evaluated: Path, data_dir: Path, tmp_path: Path) -> None:
    other = copy(evaluated, tmp_path / "other", protocol={"split": "test", "score": "another one"})
    (other / "segmentation.parquet").unlink()
    (other / "detection.json").unlink()
    found = run_compare(evaluated, other, data_dir, 100)
    assert set(found.tasks) == set(TASKS) - {"segmentation", "detection"}
    assert "detection: judged in one of the two only" in found.notes
    assert any(note.startswith("segmentation: no figures of single images") for note in found.notes)
    assert any(note.startswith("zero_shot: A is ") and note.endswith("B is another one") for note in found.notes)
    with pytest.raises(UsageError, match="no task was judged in both"):
        run_compare(evaluated, other, data_dir, tasks=["detection"])


def test_other_settings_of_a_head_and_other_training_images_are_said(
    evaluated: Path, data_dir: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(evaluated, tmp_path / "other")
    path = other / "segmentation.json"
    tree = json.loads(path.read_text())
    tree["protocol"]["settings"] |= {"max_steps": 900}
    images, _, stopped = tree["protocol"]["trained_on"].partition(";")
    assert stopped, "the step that was kept is no setting"
    tree["protocol"]["trained_on"] = "7 images of 'train'; stopped at another step"
    tree["protocol"]["judged"] = "images of all splits, in 3 folds of patients"
    path.write_text(json.dumps(tree))
    assert run_compare(other, evaluated, data_dir, 100, ["segmentation"]).notes == [
        "segmentation: settings.max_steps is 900 in A, 40 in B",
        f"segmentation: trained_on is 7 images of 'train' in A, {images} in B",
        "segmentation: images of all splits, in 3 folds of patients",
    ]


def test_differences_that_few_resamples_tell_are_noted(evaluated: Path, data_dir: Path, tmp_path: Path) -> None:
    rows = pq.read_table(evaluated / "zero_shot.parquet").to_pydict()
    label = np.zeros(len(rows["label"]), np.int8)
    label[[rows["finding"].index(name) for name in set(rows["finding"])]] = 1
    rare = [copy(evaluated, tmp_path / name) for name in "ab"]
    for folder in rare:
        rewrite(folder / "zero_shot.parquet", label=label)
    notes = run_compare(*rare, data_dir, 200, ["zero_shot"]).notes
    assert any(note.startswith("zero_shot: intervals of fewer than the 200 resamples") for note in notes)
    assert not run_compare(evaluated, evaluated, data_dir, 200, ["zero_shot"]).notes


def test_folders_that_do_not_fit_are_named(evaluated: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty has no evaluation; run `place evaluate` first"):
        run_compare(evaluated, tmp_path / "empty", data_dir)
    with pytest.raises(UsageError, match="does not say where its data set lies; give --data"):
        run_compare(evaluated, evaluated)
    (tmp_path / "card.json").write_text(json.dumps({"fingerprint": "d" * 64}))
    with pytest.raises(UsageError, match="has fingerprint dddddddddddd, judged was ffffffffffff"):
        run_compare(evaluated, evaluated, tmp_path)
    damaged = copy(evaluated, tmp_path / "damaged")
    (damaged / "grounding.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"grounding.json is no result of an evaluation, or damaged"):
        run_compare(evaluated, damaged, data_dir)


def test_data_on_s3_are_refused_by_name(
    evaluated: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, remote = "s3://b/x is no local folder, and evaluation reads one; copy it", ["--data", "s3://b/x"]
    encoder = ["evaluate", "--encoder", str(tmp_path), "--output", str(tmp_path / "out")]
    for words in (["evaluate", "--run", str(run_dir)], encoder, ["compare", str(evaluated), str(evaluated)]):
        assert main([*words, *remote]) == 2
        assert capsys.readouterr().err.splitlines() == [f"place {words[0]}: {told} and give the copy by --data"]
    shutil.copytree(evaluated, tmp_path / "run" / "evaluation")
    config = build_config(run_dir / "config.yaml", ["data.path=s3://b/x"])
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UsageError, match=f"^{told}"):
        run_compare(tmp_path / "run", evaluated)


def test_the_verb_prints_a_table_of_100_columns_and_writes_all_figures(
    evaluated: Path, run_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run / "evaluation")
    shutil.copy(run_dir / "config.yaml", run)
    assert main(["compare", str(run), str(evaluated), "--bootstrap", "100", "--output", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr().out
    assert "attention.mean pointing game" in shown
    assert "at 50.mean f1" in shown
    assert "edema" not in shown
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 110
    tree = json.loads((tmp_path / "c.json").read_text())
    assert tree["tasks"]["zero_shot"]["auroc.edema"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert main(["compare", str(run), str(run), "--bootstrap", "100", "--findings", "--tasks", "detection"]) == 0
    assert "ap.effusion" in capsys.readouterr().out
    assert (run / "compare/run.json").is_file()
    assert main(["compare", str(run), str(run), "--bootstrap", "3"]) == 2
