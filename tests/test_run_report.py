"""`place report`: the page of a run, by logs that the code of a run wrote."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browser.look import look_at
from clock import Clock

from place import cli
from place.config import Config, RunError, dump_config
from place.reporting.charts import MOST_POINTS, Line, Marks, Panel, choose_log, draw_attention, draw_panel, thin
from place.reporting.history import compute_gpu_hours, compute_working_s, read_history
from place.reporting.page import write_report
from place.reporting.panels import build_charts, build_marks, build_time_line
from place.runlog import RunLog, note_end, note_start, write_attempt

GPU = {"host": "node-1", "pid": 7, "device": "NVIDIA H200"}
CPU = {"host": "node-1", "pid": 7, "device": "cpu"}
PLAN = {
    "world": 2, "num_samples": 66, "global_batch": 2, "local_batch": 1, "accumulation": 1, "dropped_per_epoch": 6,
    "epochs": 2, "total_steps": 60, "steps_per_epoch": 30, "peak_lr": 1e-3,
}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(1_700_000_000.0)
    monkeypatch.setattr("place.runlog.time", SimpleNamespace(time=clock.read))
    return clock


def write_run(run: Path) -> Path:
    """A run folder as `prepare_run` leaves it."""
    run.mkdir(parents=True)
    config = Config.model_validate({"run": {"dir": str(run)}, "data": {"path": "datasets/mine"}})
    (run / "config.yaml").write_text(dump_config(config))
    about = {"commit": "abc", "versions": {"torch": "2.13.0"}, "world": 2, "data_fingerprint": "f00d", "plan": PLAN}
    (run / "run.json").write_text(json.dumps(about))
    return run


def train(run: Path, clock: Clock, attempt: int, first: int, last: int, worker: dict = GPU, **values: Any) -> None:
    """A worker group that trains steps (first, last], 2 s each, 10 s after its start; logs each tenth."""
    write_attempt(run, {"attempt": attempt, "launch": "1-a", "workers": [worker, worker]})
    clock.sleep(10)
    write_attempt(run, {"attempt": attempt, "from_step": first, "notes": [f"resumed from step {first}"] * bool(first)})
    log = RunLog(run, attempt)
    for step in range(first + 1, last + 1):
        clock.sleep(2)
        epoch, place = divmod(step - 1, PLAN["steps_per_epoch"])
        log.write_samples(step, epoch, [2 * place, 2 * place + 1])
        if step % 10 == 0:
            base = {"epoch": epoch, "total": 9.0 - 0.1 * step + attempt, "samples_per_s": 1.0, "tokens": 0.0}
            log.write_metrics(step, {**base, **values})
        if step % PLAN["steps_per_epoch"] == 0:
            log.write_metrics(step, {"epoch": epoch, "val_total": 10.0 - 0.1 * step + attempt, "val_tokens": 0.0})
            log.write_attention(step, [[0.7, 0.1, 0.1, 0.1], [0.25 + 0.05 * attempt] * 4])
    log.close()


@pytest.fixture
def restarted(tmp_path: Path, clock: Clock) -> Path:
    """A run of three attempts: killed at step 50, begun again at 20, killed at 40, begun again there, and done."""
    run = write_run(tmp_path / "run")
    note_start(run)
    train(run, clock, 0, 0, 50, straggler="rank 1 on node-1", lag_s=0.3)
    clock.sleep(5)
    write_attempt(run, {"notes": ["1 of 2 workers failed: rank 1 on node-1 died"]})
    clock.sleep(100)
    train(run, clock, 1, 20, 40, lag_s=0.0, grad_norm=1.0)
    write_attempt(run, {"notes": ["1 of 2 workers failed: rank 0 on node-1 died"]})
    write_attempt(run, {"notes": ["going on with 2 workers on node-1"]})
    train(run, clock, 2, 40, 60, lag_s=0.0, grad_norm=2.0)
    note_end(run, "done", "")
    return run


def read_charts(page: str) -> Iterator[ElementTree.Element]:
    """Every picture of a page, parsed."""
    for data in re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', page):
        yield ElementTree.fromstring(base64.b64decode(data))


def test_each_step_counts_once_by_the_attempt_that_was_built_upon(restarted: Path) -> None:
    history = read_history(restarted)
    assert [(record["step"], record["attempt"]) for record in history.steps] == [
        *((10, 0), (20, 0), (30, 1), (40, 1), (50, 2), (60, 2)),
    ]
    assert [(record["step"], record["attempt"]) for record in history.lost] == [(30, 0), (40, 0), (50, 0)]
    assert [(record["step"], record["attempt"]) for record in history.validations] == [(30, 1), (60, 2)]
    # 30 steps of 2 pairs an epoch, though steps 21 to 40 were done twice.
    assert [tuple(epoch) for epoch in history.epochs] == [(1, 30, 60, 60), (2, 30, 60, 60)]


def test_attention_over_time_is_that_of_the_attempts_that_count(restarted: Path) -> None:
    looks = read_history(restarted).attention
    assert [(look["step"], look["attempt"], look["attention"][1][0]) for look in looks] == [(30, 1, 0.3), (60, 2, 0.35)]
    page = write_report(restarted).read_text()
    (picture,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)" alt="attention of V-PORs over steps"', page)
    drawn = base64.b64decode(picture).decode()
    for label in ("step 30", "step 60", "query 1", "query 2"):
        assert label in drawn
    assert drawn.count("<image") == 4


def test_attention_that_a_restarted_run_has_yet_to_do_again_does_not_count(tmp_path: Path, clock: Clock) -> None:
    run = write_run(tmp_path / "run")
    train(run, clock, 0, 0, 50)
    train(run, clock, 1, 20, 25)
    assert read_history(run).attention == []


def test_of_many_queries_and_validations_a_few_are_drawn() -> None:
    """Those that end most peaked, at steps from first to last."""
    peaked = {2, 5, 6, 7}
    maps = [
        (step, [[0.9, 0.1, 0, 0] if query in peaked else [0.25] * 4 for query in range(8)]) for step in range(1, 21)
    ]
    drawn = draw_attention(maps).decode()
    assert re.findall(r"<!-- step (\d+) -->", drawn) == ["1", "5", "9", "12", "16", "20"]
    assert re.findall(r"<!-- query (\d+) -->", drawn) == ["3", "6", "7", "8"]


def test_steps_that_a_restarted_run_has_yet_to_do_again_do_not_count(tmp_path: Path, clock: Clock) -> None:
    run = write_run(tmp_path / "run")
    train(run, clock, 0, 0, 50)
    train(run, clock, 1, 20, 30)
    history = read_history(run)
    assert [record["step"] for record in history.steps] == [10, 20, 30]
    assert [record["step"] for record in history.lost] == [30, 40, 50]
    assert [epoch.pairs for epoch in history.epochs] == [60]


def test_pairs_that_an_epoch_saw_twice_are_counted(tmp_path: Path, clock: Clock) -> None:
    run = write_run(tmp_path / "run")
    train(run, clock, 0, 0, 2)
    log = RunLog(run, 0)
    log.write_samples(3, 0, [0, 40])
    log.close()
    (epoch,) = read_history(run).epochs
    assert (epoch.pairs, epoch.distinct) == (6, 5)


def test_attempts_last_from_their_start_to_what_ended_them(restarted: Path) -> None:
    first, second, third = read_history(restarted).attempts
    assert [first.ended - first.began, second.began - first.ended] == [10 + 50 * 2 + 5, 100]
    assert (second.from_step, second.to_step, third.from_step, third.to_step) == (20, 40, 40, 60)
    assert first.reasons == ["1 of 2 workers failed: rank 1 on node-1 died"]
    assert second.reasons[1] == "going on with 2 workers on node-1"
    assert (second.notes, third.reasons) == (["resumed from step 20"], ["done"])
    working_s = 115 + (10 + 40) + (10 + 40)
    assert compute_working_s([first, second, third]) == working_s
    assert compute_gpu_hours([first, second, third]) == pytest.approx(2 * working_s / 3600)


def test_a_start_that_found_no_workers_lengthens_no_attempt_before_it(tmp_path: Path, clock: Clock) -> None:
    run = write_run(tmp_path / "run")
    note_start(run)
    train(run, clock, 0, 0, 50)
    clock.sleep(86_400)
    note_start(run)
    write_attempt(run, {"notes": ["waiting for 2 hosts"]})
    note_end(run, "failed", "too few hosts")
    clock.sleep(3600)
    note_start(run)
    train(run, clock, 1, 20, 60)
    note_end(run, "done", "")
    killed, second = read_history(run).attempts
    assert (killed.ended - killed.began, killed.reasons) == (10 + 50 * 2, [])
    assert second.notes == ["waiting for 2 hosts", "failed: too few hosts", "resumed from step 20"]
    assert second.reasons == ["done"]
    assert compute_gpu_hours([killed]) == pytest.approx(2 * 110 / 3600)


def test_gpu_hours_are_none_where_workers_did_not_say_what_they_compute_on(restarted: Path) -> None:
    attempts = read_history(restarted).attempts
    assert compute_gpu_hours([attempts[0], attempts[1]._replace(workers=[{"host": "a", "pid": 1}])]) is None
    assert compute_gpu_hours([attempts[0]._replace(workers=[CPU])]) == 0


def test_restarts_and_stragglers_are_marked_where_they_were(restarted: Path) -> None:
    history = read_history(restarted)
    assert build_marks(history) == Marks([20, 40], [10, 20], 60)
    panel, marks = build_time_line(history)
    # 115 s, 50 s and 50 s of work, the time between cut out; stragglers of lost steps were there too.
    assert marks.restarts == pytest.approx([115 / 60, 165 / 60])
    assert marks.stragglers == pytest.approx([(10 + 2 * step) / 60 for step in (10, 20, 30, 40, 50)])
    assert [line.y for line in panel.lines] == [[0, 10, 20, 30, 40, 50], [20, 30, 40], [40, 50, 60]]


def test_what_was_not_recorded_or_is_zero_is_named_and_not_drawn(restarted: Path) -> None:
    charted = build_charts(read_history(restarted))
    titles = [panel.title for panels in charted.groups.values() for panel in panels]
    assert titles == ["Total loss", "Gradient norm", "Throughput", "How much later the last rank comes"]
    said = "; ".join(charted.left_out)
    left_out = (
        "Tokens: patches with words: 0 throughout",
        "Learning rate: not recorded",
        "GPU utilisation, mean of the",
    )
    for words in left_out:
        assert words in said
    lines = {line.name: line.x for line in charted.groups["Losses"][0].lines}
    assert lines == {"train": [10, 20, 30, 40, 50, 60], "validation": [30, 60], "done again later": [30, 40, 50]}


def test_phases_of_a_step_are_drawn_where_they_were_timed(tmp_path: Path, clock: Clock) -> None:
    run = write_run(tmp_path / "run")
    train(run, clock, 0, 0, 20, phase_s={"wait": 0.001, "forward": 0.25}, sent_mib=3.5)
    panels = {panel.title: panel for panel in build_charts(read_history(run)).groups["Speed and memory"]}
    lines = {line.name: (line.x, line.y) for line in panels["Where the time of a step goes"].lines}
    assert lines == {"wait": ([10, 20], [1.0, 1.0]), "forward": ([10, 20], [250.0, 250.0])}
    assert panels["Sent by all hosts, a step"].lines[0].y == [3.5, 3.5]
    assert draw_panel(panels["Where the time of a step goes"], Marks([], [])).startswith(b"<?xml")


def test_what_is_0_throughout_is_named_and_not_drawn(tmp_path: Path, clock: Clock) -> None:
    run = write_run(tmp_path / "run")
    train(run, clock, 0, 0, 20, sent_mib=0.0, lag_s=0.5)
    charted = build_charts(read_history(run))
    assert "Sent by all hosts, a step: 0 throughout" in charted.left_out
    drawn = {panel.title: panel for panel in charted.groups["Speed and memory"]}
    assert "Sent by all hosts, a step" not in drawn
    assert drawn["How much later the last rank comes"].lines[0].y == [0.5, 0.5]


def test_the_page_needs_nothing_else_and_holds_no_empty_picture(
    restarted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(restarted)]) == 0
    assert capsys.readouterr().out.startswith(f"{restarted / 'report.html'}: ")
    page = (restarted / "report.html").read_text()
    assert re.findall(r"(?:src|href)=\"(?!data:|#)|url\(|<script|https?://", page) == []
    charts = list(read_charts(page))
    assert len(charts) == 6
    for chart in charts:
        drawn = [path.get("d", "") for path in chart.iter(f"{SVG}path") if path.get("clip-path")]
        assert any(len(d.split("L")) > 2 for d in drawn) or list(chart.iter(f"{SVG}image"))
    for words in ("rank 1 on node-1 died", "2 on NVIDIA H200", "of 60 steps", "abc", "f00d", "3 logged steps"):
        assert words in re.sub(r"workers on", "on", page), words
    assert write_report(restarted).read_text() == page


@pytest.mark.browser
def test_the_page_is_whole_in_a_browser(restarted: Path) -> None:
    note_end(restarted, "failed", f"no space left in /shared/{'a_long_name_of_a_folder_' * 8}")
    assert look_at([write_report(restarted)]) == []


def test_a_run_whose_workers_have_not_trained_yet_has_a_page_without_charts(tmp_path: Path, clock: Clock) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(RunError, match="no worker has started yet"):
        write_report(run)
    train(run, clock, 0, 0, 0)
    page = write_report(run).read_text()
    assert "<img" not in page
    assert "Total loss: not recorded" in page


@pytest.mark.parametrize(
    ("name", "text", "code", "words"),
    [
        ("run.json", None, 2, "is no run folder"),
        ("attempts.jsonl", "", 1, "lacks attempt 0"),
        ("metrics.jsonl", "x\n\ny\n", 1, "line 1 is damaged"),
        ("metrics.jsonl", '{"step": 10}\n', 1, "is no whole run folder"),
        ("metrics.jsonl", b'{"\xff": 1}\n', 1, "metrics.jsonl cannot be read (UnicodeDecodeError"),
        ("run.json", "{}", 1, "run.json has no 'plan'; restore it"),
        ("run.json", '{"plan": {}}', 1, "is no whole run folder (KeyError"),
        ("config.yaml", "", 1, "config.yaml holds null, expected names and values; restore it"),
        ("config.yaml", "cluster:", 1, "config.yaml has cluster: null, expected its keys"),
        ("config.yaml", "run: {}", 1, "is no whole run folder (KeyError: 'data'); restore its files"),
        ("config.yaml", b"run: \xff", 1, "config.yaml cannot be read (UnicodeDecodeError"),
        ("samples.jsonl", '{"step": 1, "attempt": 0, "epoch": 0}\n', 1, "samples.jsonl cannot be read (KeyError"),
        ("samples.jsonl", b"\xff\n", 1, "samples.jsonl cannot be read (UnicodeDecodeError"),
        ("attention.jsonl", "{}\n", 1, "attention.jsonl cannot be read (KeyError"),
        ("checkpoints/latest", "", 1, "latest holds '', expected step_N"),
        ("checkpoints/latest", "the newest", 1, "latest holds 'the newest', expected step_N"),
        ("report.html", "a folder", 1, "report.html: Is a directory"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    name: str, text: str | bytes | None, code: int, words: str, restarted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (restarted / "checkpoints").mkdir()
    (restarted / name).unlink(missing_ok=True)
    if text == "a folder":
        (restarted / name).mkdir()
    elif text is not None:
        (restarted / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["report", str(restarted)]) == code
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert words in err[0]


def test_a_long_line_is_thinned_to_means_with_a_band_that_keeps_its_peak() -> None:
    y = np.zeros(100 * MOST_POINTS)
    y[777] = 5.0
    x_P, y_P, low_P, high_P = thin(list(range(len(y))), list(y))
    assert len(x_P) == len(y_P) == MOST_POINTS
    assert (y_P.max(), low_P.max(), high_P.max()) == (0.05, 0.0, 5.0)
    short = thin([1, 2], [3, 4])
    assert [list(part) for part in short] == [[1, 2], [3, 4], [3, 4], [3, 4]]
    svg = draw_panel(Panel("peak", [Line("a", "train", list(range(len(y))), list(y))]), Marks([], []))
    assert len(svg) < 200_000


@pytest.mark.parametrize(("values", "is_log"), [([1, 2, 3], False), ([1, 1, 1000], True), ([0, 1, 1000], False)])
def test_a_scale_is_logarithmic_where_values_span_much(values: list[float], is_log: bool) -> None:
    assert choose_log(Panel("norm", [Line("a", "train", [1, 2, 3], values)])) is is_log


def test_reports_and_lists_import_no_torch(restarted: Path) -> None:
    code = (
        "import sys; from place.cli import main; main(['report', sys.argv[1]]); main(['runs', sys.argv[1]]);"
        "print([n for n in ('torch', 'ray', 'deepspeed', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(restarted)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_real_run_that_failed_and_went_on_is_reported(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.runs import write_config

    run, calls = tmp_path / "run", count(1)
    settings = {"train": {"checkpoint_every_steps": 2, "max_steps": 8}, "run": {"log_every_steps": 1}}
    config = str(write_config(tmp_path, prepared, cluster={"launcher": "local"}, **settings))

    def read_memory(_: object) -> int:
        if next(calls) == 4:
            while not (run / "checkpoints" / "latest").is_file():
                time.sleep(0.01)
            raise RuntimeError("the host lost a memory bank")
        return 1024

    monkeypatch.setattr("place.training.meter._read_memory_mib", read_memory)
    with pytest.raises(RuntimeError, match="memory bank"):
        cli.main(["pretrain", "--config", config])
    latest = (run / "checkpoints" / "latest").read_text()
    assert cli.main(["pretrain", "--config", config]) == 0
    history = read_history(run)
    first, second = history.attempts
    assert first.reasons == ["failed: the host lost a memory bank"]
    assert (first.num_gpus, latest, second.from_step) == (0, f"step_{second.from_step:08d}", second.from_step)
    assert [record["step"] for record in history.steps] == list(range(1, 9))
    assert [record["step"] for record in history.lost] == [3]
    page = write_report(run).read_text()
    assert len(list(read_charts(page))) == 13
    assert "failed: the host lost a memory bank" in page
    assert "GPU utilisation, mean of the workers: not recorded" in page
    assert "Resident memory of rank 0 over steps" in page
