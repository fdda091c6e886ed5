"""The controlled experiment: what is planned, what the table says, and one experiment of real runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from tiny import TINY, merge
from training.runs import wait_until

from place.config import RunError, UsageError, build_config
from place.evaluation import ablation
from place.evaluation.ablation import Experiment, build_table, compute_half_width, load_experiment, plan_jobs
from place.runlog import read_jsonl

ROOT = Path(__file__).parents[2]
TREE = {
    "base": "base.yaml",
    "folder": "unused",
    "data": "unused",
    "tasks": "retrieval",
    "seeds": 2,
    "reference": "a",
    "columns": [{"title": "R@1", "metric": "retrieval:r1", "scale": 100, "digits": 1}],
    "rows": {
        "a": {"title": "A", "seeds": 3},
        "b": {"title": "B", "config": ["loss.pathology.weight=0"]},
        "c": {"title": "C", "like": "a", "metrics": {"R@1": "other:r1"}},
    },
}


def test_the_table_has_means_intervals_and_differences_of_equal_seeds() -> None:
    figures = {
        "a": {0: {"retrieval:r1": 0.1, "other:r1": 0.05}, 1: {"retrieval:r1": 0.2}, 2: {"retrieval:r1": 0.3}},
        "b": {0: {"retrieval:r1": 0.5}, 2: {"retrieval:r1": 0.7}},
    }
    _, _, a, b, c = build_table(Experiment.model_validate(TREE), figures).splitlines()
    # Student's quantiles .975 are 4.3027 of 2 degrees of freedom and 12.706 of 1.
    assert a == "| A | 3 | 20.0 ± 24.8 |"
    assert b == "| B | 2 | 60.0 ± 127.1 (**+40.0 ± 0.0**) |"
    assert c == "| C | 3 | 5.0 (-5.0) |"


def test_a_difference_within_its_interval_is_not_bold() -> None:
    figures = {
        "a": {0: {"retrieval:r1": 0.5}, 1: {"retrieval:r1": 0.5}},
        "b": {0: {"retrieval:r1": 0.5}, 1: {"retrieval:r1": 0.7}},
    }
    assert "(+10.0 ± 127.1)" in build_table(Experiment.model_validate(TREE), figures)


def test_the_paired_table_has_a_line_a_seed_and_marks_what_leaves_out_zero() -> None:
    gaps = {"b": {1: {"retrieval:r1": [0.05, -0.01, 0.11]}, 0: {"retrieval:r1": [0.05, 0.02, 0.08]}, 2: {}}}
    assert ablation.build_paired_table(Experiment.model_validate(TREE), gaps).splitlines()[2:] == [
        "| B | 0 | **+5.0 (+2.0 to +8.0)** |",
        "| B | 1 | +5.0 (-1.0 to +11.0) |",
        "| B | 2 | - |",
    ]


def test_runs_are_paired_with_the_reference_of_their_seed(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    experiment = Experiment.model_validate(TREE)
    jobs = plan_jobs(experiment, tmp_path / "base.yaml")
    figures: ablation.Figures = {"a": {0: {}, 2: {}}, "b": {0: {}, 1: {}}}
    pairs = ablation.list_pairs(experiment, jobs, figures)
    assert [((job.row, job.seed), (other.row, other.seed)) for job, other in pairs] == [(("b", 0), ("a", 0))]


def test_one_value_has_no_interval() -> None:
    assert compute_half_width([1.0]) is None
    assert compute_half_width([1.0, 1.0]) == 0


def test_runs_come_seed_by_seed_and_differ_in_seed_folder_and_what_the_row_says(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 3}")
    jobs = plan_jobs(Experiment.model_validate(TREE), tmp_path / "base.yaml")
    assert [(job.row, job.seed) for job in jobs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    first, second = (yaml.safe_load(job.config) for job in jobs[:2])
    assert (first["run"]["seed"], first["train"]["epochs"], first["loss"]["pathology"]["weight"]) == (0, 3, 1.0)
    first["loss"]["pathology"]["weight"] = 0.0
    first["run"]["dir"] = first["run"]["dir"].replace("/a/", "/b/")
    assert first == second


def test_what_a_row_alone_is_judged_by_is_asked_of_the_runs_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    rows = TREE["rows"] | {"c": TREE["rows"]["c"] | {"tasks": ["other"]}}
    jobs = plan_jobs(Experiment.model_validate(TREE | {"rows": rows}), tmp_path / "base.yaml")
    assert {(job.row, job.tasks) for job in jobs} == {("a", "retrieval,other"), ("b", "retrieval")}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs/ablation").glob("*.yaml")))
def test_every_committed_experiment_can_be_planned(name: str) -> None:
    path = ROOT / "configs/ablation" / name
    tree = yaml.safe_load(path.read_text())
    if "rows" not in tree:
        return
    experiment = load_experiment(path)
    assert plan_jobs(experiment, path.parent / experiment.base)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": "z"}, "reference='z' is no row; take a, b, c"),
        ({"rows": {"a": {"title": "A", "like": "b"}}}, "like='b' is no row that is trained"),
        ({"columns": [{"title": "R@1", "metric": "r1"}]}, "expected task:metric"),
        ({"seed": 3}, "seed: extra inputs"),
    ],
)
def test_a_faulty_experiment_is_one_line(change: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(TREE | change))
    with pytest.raises(UsageError) as caught:
        load_experiment(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [RunError, UsageError])
def test_a_failed_run_is_named_and_the_others_go_on(
    kind: type[ValueError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_job(job: ablation.Job, _: Experiment) -> dict[str, float]:
        if (job.row, job.seed) == ("b", 0):
            raise kind("place pretrain ended with 1: no space left")
        return {"retrieval:r1": 0.25}

    monkeypatch.setattr(ablation, "run_job", run_job)
    (tmp_path / "base.yaml").write_text("")
    experiment = Experiment.model_validate(TREE | {"folder": str(tmp_path / "out")})
    failed = ablation.run_experiment(experiment, tmp_path / "base.yaml", 2, lambda line: None)
    assert failed == ["b, seed 0: place pretrain ended with 1: no space left"]
    table = (tmp_path / "out/table.md").read_text()
    assert "| B | 1 | 25.0 (+0.0) |" in table
    assert "\nb, seed 0: place pretrain ended with 1: no space left.\n" in table


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_an_experiment_that_is_stopped_begins_no_other_run(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    second, told = threading.Event(), threading.Event()

    def run_job(job: ablation.Job, _: Experiment) -> dict[str, float]:
        begun.append(f"{job.row}{job.seed}")
        if len(begun) == 2:
            second.set()
            assert told.wait(60)
            raise UsageError("the second fails once the first was told")
        return {"retrieval:r1": 0.25}

    def say(line: str) -> None:
        # The worker takes up the second run by itself, before or after the first is told.
        assert second.wait(60)
        threading.Timer(0.5, told.set).start()
        raise error

    monkeypatch.setattr(ablation, "run_job", run_job)
    (tmp_path / "base.yaml").write_text("")
    experiment = Experiment.model_validate(TREE | {"folder": str(tmp_path / "out")})
    with pytest.raises(type(error)):
        ablation.run_experiment(experiment, tmp_path / "base.yaml", 1, say)
    assert begun == ["a0", "b0"]


def test_runs_of_several_commits_are_told_under_the_table(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    jobs = plan_jobs(Experiment.model_validate(TREE | {"folder": str(tmp_path)}), tmp_path / "base.yaml")
    assert ablation.describe_origin(jobs).endswith("by commit -")
    for job, commit in zip(jobs, ("f00d", "f00d", "beef")):
        (job.folder / "run").mkdir(parents=True)
        (job.folder / "run/run.json").write_text(f'{{"commit": "{commit}"}}')
    assert ablation.describe_origin(jobs[:2]).endswith(" CPU cores by commit f00d")
    assert "by commit f00d and beef; remove" in ablation.describe_origin(jobs)


def test_a_change_of_how_runs_are_judged_trains_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def call(job: ablation.Job, command: str, *arguments: str) -> None:
        calls.append((command, arguments[-1]))
        if command == "pretrain":
            (job.folder / "run").mkdir(exist_ok=True)
            (job.folder / "run/metrics.jsonl").touch()
        else:
            (job.folder / "run/evaluation").mkdir()
            (job.folder / "run/evaluation/retrieval.json").write_text(
                '{"task": "retrieval", "metrics": {"r1": {"value": 0.5}}}'
            )

    monkeypatch.setattr(ablation, "_call", call)
    monkeypatch.setattr(ablation, "read_card", lambda _: {"fingerprint": "f00d"})
    experiment = Experiment.model_validate(TREE | {"folder": str(tmp_path / "out")})
    changes = ("", False, 1000), ("evaluation: {bootstrap: 7}", True, 7), ("optim: {lr: 1}", False, 1000)
    for base, kept, resamples in changes:
        (tmp_path / "base.yaml").write_text(base)
        job = plan_jobs(experiment, tmp_path / "base.yaml")[0]
        mark = job.folder / "run/trained"
        assert ablation.run_job(job, experiment) == {"retrieval:r1": 0.5}
        assert mark.exists() == kept
        mark.touch()
        assert [command for command, _ in calls] == ["pretrain", "evaluate"]
        assert build_config(None, [calls[1][1]]).evaluation.bootstrap == resamples
        calls.clear()


@pytest.mark.multiprocess
def test_whoever_interrupts_an_experiment_is_told_that_it_goes_on(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(merge(TINY, {"train": {"max_steps": 100000}})))
    tree = TREE | {"folder": str(tmp_path / "out"), "data": str(prepared)}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(tree))
    # A shell starts what runs in its background deaf to SIGINT; these tests may be there, who interrupts is not.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from place.evaluation.ablation import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(tmp_path / "experiment.yaml"), "--parallel", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    log = tmp_path / "out/a/seed0/run/metrics.jsonl"
    wait_until(lambda: log.is_file() and log.stat().st_size > 0, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=120) == (
        "",
        "ablation: interrupted; the same command goes on with the runs that are missing\n",
    )
    assert process.returncode == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert "checkpoint" in (tmp_path / "out/a/seed0/pretrain.log").read_text()


@pytest.mark.multiprocess
def test_an_experiment_of_real_runs_ends_in_a_table_and_does_nothing_twice(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(merge(TINY, {"train": {"global_batch": 32}})))
    column = {"title": "median rank", "metric": "retrieval:image_to_text.median_rank"}
    tree = TREE | {"folder": str(tmp_path / "out"), "data": str(prepared), "seeds": 1, "columns": [column]}
    tree["rows"] = {"a": {"title": "A"}, "b": {"title": "B", "config": ["loss.bad=1"]}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert ablation.main([str(path)]) == 2
    assert "unknown config key 'loss.bad'" in capsys.readouterr().err
    tree["rows"]["b"]["config"] = ["train.max_steps=1"]
    path.write_text(yaml.safe_dump(tree))
    assert ablation.main([str(path)]) == 0
    first = (tmp_path / "out/table.md").read_text()
    assert re.search(r"^\| A \| 1 \| \d+\.\d{3} \|$", first, re.MULTILINE)
    number = r"[+-]\d+\.\d{3}"
    assert re.search(rf"^\| B \| 0 \| \**{number} \({number} to {number}\)\** \|$", first, re.MULTILINE)
    shutil.rmtree(tmp_path / "out/a/seed0/run")
    assert ablation.main([str(path)]) == 0
    assert (tmp_path / "out/table.md").read_text() == first
    assert not (tmp_path / "out/a/seed0/run").exists()
    run = tmp_path / "out/b/seed0/run"
    (run / "evaluation/grounding.json").write_text('{"task": "retrieval", "metrics": {"r1": {"value": 2.0}}}')
    tree["rows"]["b"]["config"] = ["train.max_steps=2"]
    path.write_text(yaml.safe_dump(tree))
    assert ablation.main([str(path)]) == 0
    steps = [(record["step"], record["attempt"]) for record in read_jsonl(run / "metrics.jsonl") if "total" in record]
    assert steps == [(1, 0), (2, 0)], "the run of another configuration is not gone on with"
    assert "retrieval:r1" not in ablation.read_figures(run)
