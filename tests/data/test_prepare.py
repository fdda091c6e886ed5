"""`place prepare` end to end: what is kept, what is rejected and why, and that a kill changes nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_sets import draw_image, edit_table, encode, write_csv_source

from place.config import PrepareConfig, RunError, UsageError
from place.data import prepare
from place.data.manifest import MANIFEST, pack_table
from place.data.pool import map_in_processes
from place.data.prepare import run_prepare
from place.data.prepared import list_splits, read_samples
from place.data.report_files import read_report
from place.data.shards import COLUMNS, PartWriter, publish_shards
from place.data.storage import Folder, open_store
from place.data.verify import find_faults
from place.kept import try_lock

RUN = """
import os, signal, sys
from place.config import PrepareConfig
from place.data import manifest, prepare, shards
if __name__ == "__main__":
    config = PrepareConfig.model_validate_json(sys.argv[1])
    kill_at, renames = int(sys.argv[2]), 0
    replace = os.replace
    def counted(source, target):
        global renames
        renames += 1
        if renames == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = counted
    prepare.run_prepare(config, on_progress=lambda *counts: print(*counts, flush=True))
"""


def read_rows(config: PrepareConfig, name: str) -> list[dict]:
    return pq.read_table(Path(config.output) / name).to_pylist()


def read_reasons(config: PrepareConfig) -> dict[int, str]:
    return {row["row"]: row["reason"] for row in read_rows(config, "rejected.parquet")}


def read_bytes(folder: str | Path, stamp: bool = False) -> dict[str, bytes]:
    """All files of a data set; the cards without the time they were made at."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    if not stamp:
        created = json.loads(files["card.json"])["created"].encode()
        files = {name: data.replace(created, b"") for name, data in files.items()}
    return files


def start_prepare(config: PrepareConfig, kill_at: int = 0, **options) -> subprocess.Popen:
    script = Path(config.output).parent / "run.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(RUN)
    command = [sys.executable, str(script), config.model_dump_json(), str(kill_at)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_every_row_is_kept_or_rejected_with_its_reason(tmp_path):
    config = write_csv_source(tmp_path, count=14, views=("ap", "PA"))
    images = tmp_path / "images"
    (images / "secret-file-1.jpg").unlink()
    whole = encode(draw_image(2, 200, 200))
    (images / "secret-file-2.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "secret-file-3.jpg").write_bytes(b"this is no image")
    edit_table(config, 4, note="")
    edit_table(config, 5, note="Clear.")
    edit_table(config, 6, file="secret-file-0.jpg")
    edit_table(config, 7, pos="LATERAL")
    edit_table(config, 8, file="")
    (images / "secret-file-9.jpg").write_bytes(encode(np.full((50, 50), 9, np.uint8)))
    edit_table(config, 10, pos="")
    card = run_prepare(config)
    assert read_reasons(config) == {
        1: "missing_image",
        2: "truncated_image",
        3: "unreadable_image",
        4: "empty_report",
        5: "short_report",
        6: "duplicate_id",
        7: "view_excluded",
        8: "missing_image",
        9: "blank_image",
        10: "view_unknown",
    }
    assert [row["row"] for row in read_rows(config, "manifest.parquet")] == [0, 11, 12, 13]
    assert (card["counts"]["input"], card["counts"]["kept"], card["counts"]["rejected"]) == (14, 4, 10)
    assert card["drop_reasons"]["missing_image"] == 2


def test_shards_hold_the_contract_and_the_manifest_lists_them_in_order(tmp_path):
    config = write_csv_source(tmp_path, count=24)
    card = run_prepare(config)
    manifest = read_rows(config, "manifest.parquet")
    assert sorted(list_splits(config.output)) == sorted({row["split"] for row in manifest})
    assert list(find_faults(config.output)) == []
    for split in list_splits(config.output):
        samples = list(read_samples(config.output, split))
        assert [sample["sample_id"] for sample in samples] == [
            row["sample_id"] for row in manifest if row["split"] == split
        ]
        assert {name for sample in samples for name in sample} == {
            "image",
            "sentences",
            "labels",
            "view",
            "sample_id",
            "study_id",
            "report_group",
            "boxes",
        }
        assert card["counts"][split]["images"] == len(samples)
    sample = next(read_samples(config.output, "train"))
    assert Image.open(io.BytesIO(sample["image"])).size == (48, 60)
    assert [item["section"] for item in sample["sentences"]] == ["findings", "findings", "impression"]
    assert sample["sentences"][1]["text"] == "A 2.5 cm nodule is seen."
    patients = {
        split: {row["patient"] for row in manifest if row["split"] == split} for split in ("train", "val", "test")
    }
    assert (
        not patients["train"] & patients["val"]
        | patients["train"] & patients["test"]
        | patients["val"] & patients["test"]
    )


def test_reports_that_say_nearly_the_same_are_one_near_group(tmp_path):
    config = write_csv_source(tmp_path)
    edit_table(config, 3, note="FINDINGS: The lungs are clear. IMPRESSION: No effusion.")
    edit_table(config, 4, note="FINDINGS: There is no effusion. IMPRESSION: Lungs clear.")
    edit_table(config, 5, note="FINDINGS: There is an effusion. IMPRESSION: Lungs clear.")
    run_prepare(config)
    rows = read_rows(config, "manifest.parquet")
    groups = [row["near_group"] for row in rows]
    assert groups[3] == groups[4]
    assert len({*groups[:3], *groups[6:]}) == 1  # they differ in the number of the study
    assert len({groups[0], groups[3], groups[5]}) == 3
    assert len({row["report_group"] for row in rows}) == len(rows)


def test_findings_and_impression_columns_are_its_sections(tmp_path):
    config = write_csv_source(
        tmp_path, columns={"image": "file", "findings": "note", "impression": "exam"}, min_words=1
    )
    run_prepare(config)
    assert {item["section"] for item in next(read_samples(config.output, "train"))["sentences"]} == {
        "findings",
        "impression",
    }


def test_mean_and_deviation_are_those_of_the_stored_training_pixels(tmp_path):
    config = write_csv_source(tmp_path, jpeg_quality=100)
    card = run_prepare(config)
    stored = [np.asarray(Image.open(io.BytesIO(sample["image"]))) for sample in read_samples(config.output, "train")]
    pixels = np.concatenate([image.ravel() for image in stored]) / 255
    assert (card["image"]["mean"], card["image"]["std"]) == pytest.approx((pixels.mean(), pixels.std()), abs=2e-3)


def test_no_identifier_reaches_any_file(tmp_path):
    config = write_csv_source(tmp_path, count=12)
    edit_table(config, 1, file="secret-missing.jpg")
    edit_table(config, 2, file="secret-file-0.jpg")
    run_prepare(config)
    seen = list(read_bytes(config.output, stamp=True).values())
    for split in list_splits(config.output):
        seen += [repr(sample).encode() for sample in read_samples(config.output, split)]
    seen += [json.dumps(read_rows(config, name)).encode() for name in ("manifest.parquet", "rejected.parquet")]
    for word in ("secret", "SECRET", str(tmp_path), "table.csv"):
        assert not any(word.encode() in data for data in seen), word


@pytest.mark.parametrize("source", ["csv", "phantom"])
def test_bytes_do_not_depend_on_workers_or_on_the_order_of_tasks(tmp_path, source):
    def backwards(function, tasks, num_workers):
        yield from (function(task) for task in reversed(list(tasks)))

    config = write_csv_source(tmp_path, count=20)
    if source == "phantom":
        config = PrepareConfig(
            source="phantom", output=config.output, count=20, size_px=64, rows_per_task=4, num_workers=1
        )
    two, reverse = (
        config.model_copy(update={"output": str(tmp_path / name), "num_workers": 2}) for name in ("two", "reverse")
    )
    run_prepare(config)
    run_prepare(two)
    run_prepare(reverse, map_tasks=backwards)
    assert read_bytes(config.output) == read_bytes(two.output) == read_bytes(reverse.output)
    assert len(list(Path(config.output).rglob("*.mds.zstd"))) > 3


def test_a_second_run_does_nothing_and_says_so(tmp_path):
    config = write_csv_source(tmp_path)
    first = run_prepare(config)
    before = read_bytes(config.output, stamp=True)
    second = run_prepare(config.model_copy(update={"num_workers": 2}), map_tasks=None)
    assert second == {**first, "already_prepared": True}
    assert read_bytes(config.output, stamp=True) == before


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
def test_storage_that_does_not_answer_costs_no_row(tmp_path, monkeypatch, fault):
    config = write_csv_source(tmp_path)
    with monkeypatch.context() as outage:
        outage.setattr("builtins.open", _break(open, "secret-file-5.jpg", fault))
        with pytest.raises(
            RunError, match=r"row 5 of the input cannot be read now .*: put that right and run the same"
        ):
            run_prepare(config)
    assert [path.name for path in sorted((tmp_path / "out" / ".parts").glob("0*.json"))] == ["00000.json"]
    assert run_prepare(config)["counts"]["kept"] == 12


def test_reports_and_masks_on_storage_that_does_not_answer_cost_no_row(tmp_path, monkeypatch):
    config = write_csv_source(tmp_path, masks={"nodule": "{stem}-nodule.png"})
    mask = np.zeros((80, 64), np.uint8)
    mask[20:40, 20:40] = 255
    (tmp_path / "images" / "secret-file-2-nodule.png").write_bytes(encode(mask, "PNG"))
    with monkeypatch.context() as outage:
        outage.setattr("os.stat", _break(os.stat, "secret-file-2-nodule.png", errno.EIO))
        with pytest.raises(RunError, match=r"row 2 of the input cannot be read now \(Input/output error\)"):
            run_prepare(config)
    run_prepare(config)
    assert len(read_rows(config, "masks.parquet")) == 1
    report = tmp_path / "report.txt"
    report.write_text("FINDINGS: Clear.")
    monkeypatch.setattr("os.stat", _break(os.stat, "report.txt", errno.ESTALE))
    with pytest.raises(OSError, match="Stale file handle"):
        read_report(str(report))


def test_reports_that_cannot_be_opened_now_are_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "1.xml").write_text("<eCitation/>")
    config = PrepareConfig(source="openi", input=str(tmp_path), output=str(tmp_path / "out"), num_workers=1)
    monkeypatch.setattr("os.stat", _break(os.stat, "1.xml", errno.EIO))
    with pytest.raises(RunError, match=r"the input cannot be read now \(Input/output error\): put that right"):
        run_prepare(config)


def _break(act, end: str, fault: int):
    """The same function, failing for paths with such an end."""

    def broken(path, *arguments, **options):
        if str(path).endswith(end):
            raise OSError(fault, os.strerror(fault), path)
        return act(path, *arguments, **options)

    return broken


def test_other_settings_in_the_same_folder_are_named(tmp_path):
    config = write_csv_source(tmp_path)
    run_prepare(config)
    with pytest.raises(UsageError, match=r"prepared with other settings: size_px=48, not 32; choose another --output"):
        run_prepare(config.model_copy(update={"size_px": 32}))
    edit_table(config, 0, note="The lungs are clear today.")
    with pytest.raises(UsageError, match="another table, image root or salt"):
        run_prepare(config)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    config = write_csv_source(tmp_path)
    with pytest.raises(UsageError, match=r"holds other files \(images\)"):
        run_prepare(config.model_copy(update={"output": str(tmp_path)}))


def test_two_runs_never_write_into_one_folder(tmp_path):
    config = write_csv_source(tmp_path)

    def intrude(*_):
        with pytest.raises(UsageError, match="another prepare is writing"):
            run_prepare(config)

    run_prepare(config, on_progress=intrude)


def test_the_lock_is_on_a_file_that_is_written_because_file_servers_lock_no_folders(tmp_path):
    config = write_csv_source(tmp_path)

    def lock(*_):
        with (tmp_path / "out" / ".lock").open("a") as file:
            assert not try_lock(file.fileno())

    run_prepare(config, on_progress=lock)
    assert not (tmp_path / "out" / ".lock").exists()


def test_storage_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert run_prepare(write_csv_source(tmp_path))["counts"]["kept"] == 12


def test_a_read_only_data_set_is_told_to_be_there(tmp_path, small_disk):
    config = write_csv_source(tmp_path / "set", output=str(small_disk / "out"))
    run_prepare(config)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run_prepare(config)["already_prepared"]


def test_a_part_whose_folder_was_emptied_under_it_is_told(tmp_path):
    with PartWriter(tmp_path, shard_mib=1) as writer:
        writer.write("train", {**dict.fromkeys(COLUMNS, 0), "image": b"", "view": ""})
    (tmp_path / "train" / "index.json").unlink()
    with pytest.raises(RunError, match="emptied while it was written: 0 of 1 images of train are left; keep other"):
        publish_shards(tmp_path, "train", 0, 1, open_store(tmp_path / "out"))


def test_listings_that_lag_behind_lose_no_part(tmp_path, monkeypatch):
    config = write_csv_source(tmp_path)
    run_prepare(config)
    listed, late = Folder.list_files, config.model_copy(update={"output": str(tmp_path / "late")})
    monkeypatch.setattr(Folder, "list_files", lambda *given: [name for name in listed(*given) if "00002" not in name])
    run_prepare(late)
    assert read_bytes(late.output) == read_bytes(config.output)


@pytest.mark.parametrize("lost", ["shards", "rows"])
def test_a_data_set_that_does_not_have_every_row_is_never_finished(tmp_path, lost):
    config = write_csv_source(tmp_path)
    parts = tmp_path / "out" / ".parts"

    def lose(done, total, _):
        if done == total:
            record = json.loads((parts / "00001.json").read_text())
            record["shards"]["train"] = [] if lost == "shards" else record["shards"]["train"]
            if lost == "rows":
                (parts / "00001.manifest.parquet").write_bytes(pack_table([], MANIFEST))
                record["tables"]["manifest"] = len(pack_table([], MANIFEST))
            (parts / "00001.json").write_text(json.dumps(record))

    words = {"shards": r"\d+ of \d+ images of train are in the shards", "rows": "8 of 12 rows of the input are in"}
    with pytest.raises(RunError, match=words[lost] + ".*: delete .* and prepare again, one at a time"):
        run_prepare(config, on_progress=lose)
    assert not (tmp_path / "out" / "card.json").exists()


@pytest.mark.parametrize(
    "name",
    [".parts/00001.json", ".parts/00001.manifest.parquet", ".parts/00001.rejected.parquet", "train/shard.00001*"],
)
def test_a_part_that_a_power_loss_emptied_is_made_again(tmp_path, monkeypatch, name):
    config = write_csv_source(tmp_path)
    run_prepare(config)
    cut = config.model_copy(update={"output": str(tmp_path / "cut")})
    _prepare_parts(cut, monkeypatch)
    (found,) = Path(cut.output).glob(name)
    found.write_bytes(b"")
    redone = []

    def spy(function, tasks, num_workers):
        redone.extend(tasks)
        yield from map(function, redone)

    run_prepare(cut, map_tasks=spy)
    assert [task.number for task in redone] == [1]
    assert read_bytes(cut.output) == read_bytes(config.output)


def test_a_table_with_other_bytes_than_it_had_is_named(tmp_path, monkeypatch):
    config = write_csv_source(tmp_path)
    _prepare_parts(config, monkeypatch)
    table = tmp_path / "out" / ".parts" / "00001.manifest.parquet"
    table.write_bytes(bytes(table.stat().st_size))
    with pytest.raises(RunError, match=r"00001.manifest.parquet is damaged: delete that file and run the same command"):
        run_prepare(config)
    table.unlink()
    assert run_prepare(config)["counts"]["kept"] == 12


@pytest.mark.parametrize("name", [".parts/request.json", "card.json"])
def test_an_emptied_card_or_request_is_one_clear_line(tmp_path, monkeypatch, name):
    config = write_csv_source(tmp_path)
    _prepare_parts(config, monkeypatch)
    if name == "card.json":
        run_prepare(config)
    (tmp_path / "out" / name).write_bytes(b"")
    with pytest.raises(RunError, match=rf"{name} is damaged: delete that file and run the same command as before, or"):
        run_prepare(config)
    (tmp_path / "out" / name).unlink()
    assert run_prepare(config)["counts"]["kept"] == 12


def _prepare_parts(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare up to the merge."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(prepare, "_merge_parts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_prepare(config)


def test_progress_counts_up_to_all_rows(tmp_path):
    config = write_csv_source(tmp_path, count=10)
    edit_table(config, 9, note="")
    seen: list[tuple[int, int, int]] = []
    run_prepare(config, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(0, 10, 0), (4, 10, 0), (8, 10, 0), (10, 10, 1)]


def test_if_nothing_is_left_the_reasons_are_told_and_the_folder_can_be_used_again(tmp_path):
    config = write_csv_source(tmp_path)
    wrong = config.model_copy(update={"image_root": str(tmp_path)})
    with pytest.raises(RunError, match=r"all 12 rows were rejected \(missing_image 12\)"):
        run_prepare(wrong)
    assert set(read_reasons(config).values()) == {"missing_image"}
    assert run_prepare(config)["counts"]["kept"] == 12


def test_a_killed_run_continues_from_its_finished_parts(tmp_path):
    def settings(name: str) -> PrepareConfig:
        return PrepareConfig(
            source="phantom",
            output=str(tmp_path / name / "out"),
            count=80,
            size_px=96,
            rows_per_task=5,
            num_workers=2,
        )

    killed = settings("killed")
    # Workers must not take up another copy of the package that lies where the run is started.
    (tmp_path / "here" / "place").mkdir(parents=True)
    (tmp_path / "here" / "place" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    process = start_prepare(killed, start_new_session=True, cwd=tmp_path / "here")
    for line in process.stdout:
        if int(line.split()[0]) >= 20:
            break
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _wait_for_end_of_session(process.pid)
    parts = Path(killed.output) / ".parts"
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.json")}
    assert 4 <= len(finished) < 16
    assert not (Path(killed.output) / "card.json").exists()
    redone = []

    def spy(function, tasks, num_workers):
        redone.extend(tasks)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
        yield from map(function, redone)

    run_prepare(killed, map_tasks=spy)
    assert len(redone) == 16 - len(finished)
    run_prepare(settings("whole").model_copy(update={"num_workers": 1}))
    assert read_bytes(killed.output) == read_bytes(settings("whole").output)


def _wait_for_end_of_session(session: int) -> None:
    """The workers of a killed run end by themselves."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("workers outlived the run that started them")


@pytest.mark.parametrize("source", ["csv", "phantom"])
def test_a_kill_at_any_rename_is_made_good(tmp_path, source):
    config = write_csv_source(tmp_path, count=5)
    if source == "phantom":  # has masks
        settings = {"source": "phantom", "count": 3, "size_px": 32, "rows_per_task": 2}
        config = PrepareConfig(output=config.output, num_workers=1, **settings)
    run_prepare(config)
    whole = read_bytes(config.output)
    killed = config.model_copy(update={"output": str(tmp_path / "killed")})
    for kill_at in range(1, 100):
        shutil.rmtree(killed.output, ignore_errors=True)
        if _prepare_until(killed, kill_at):
            break
        run_prepare(killed)
        assert read_bytes(killed.output) == whole, f"killed at rename {kill_at}"
    assert kill_at > 12
    assert read_bytes(killed.output) == whole


def _prepare_until(config: PrepareConfig, kill_at: int) -> bool:
    """Prepare in a forked process that is killed at its n-th rename; true if it came to its end before."""
    child = os.fork()
    if child == 0:
        renames, replace = [], os.replace

        def counted(source, target):
            renames.append(source)
            if len(renames) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = counted
        run_prepare(config)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_part_under_way_is_thrown_away(tmp_path):
    config = write_csv_source(tmp_path)
    stale = Path(config.output) / ".parts" / "00001.host-1.partial"
    stale.mkdir(parents=True)
    (stale.parent / "request.json.partial").write_text("{")
    (stale.parent / ".request.json.1-00c0ffee.partial").write_text("{")
    (stale.parents[1] / "train").mkdir()
    (stale.parents[1] / "train" / ".index.json.1-00c0ffee.partial").write_text("{")
    (stale.parents[1] / ".card.json.1-00c0ffee.partial").write_text("{")
    run_prepare(config)
    assert not stale.parent.exists()
    assert not list(Path(config.output).rglob("*.partial"))


def test_a_draft_that_a_killed_evaluation_left_is_no_foreign_file(tmp_path):
    config = write_csv_source(tmp_path)
    run_prepare(config)
    whole, draft = read_bytes(config.output), Path(config.output) / ".hashes.parquet.1-00c0ffee.partial"
    draft.write_bytes(b"PAR1")
    assert run_prepare(config)["already_prepared"]
    assert read_bytes(config.output) == whole
    (Path(config.output) / ".notes.txt.1-00c0ffee.partial").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files \(.notes.txt"):
        run_prepare(config)


def test_a_part_that_lost_a_shard_is_told(tmp_path):
    config = write_csv_source(tmp_path)

    def lose(done, total, _):
        if done == total:
            next(Path(config.output).glob("train/shard*")).unlink()

    with pytest.raises(RunError, match="the unfinished parts are damaged: run the same command again"):
        run_prepare(config, on_progress=lose)
    assert run_prepare(config)["counts"]["kept"] == 12


def test_a_map_that_forgets_rows_is_found_out(tmp_path):
    config = write_csv_source(tmp_path)

    def forgetful(function, tasks, num_workers):
        yield from map(function, list(tasks)[1:])

    with pytest.raises(RunError, match="8 of 12 rows are accounted for"):
        run_prepare(config, map_tasks=forgetful)


@pytest.mark.parametrize("place", ["below a file", "read-only"])
def test_no_write_permission_is_one_clear_line(tmp_path, place):
    config = write_csv_source(tmp_path)
    output = Path(config.input) / "out" if place == "below a file" else Path("/proc/out")
    with pytest.raises(UsageError, match=r"cannot write to .*; choose another --output"):
        run_prepare(config.model_copy(update={"output": str(output)}))


def test_a_folder_that_takes_no_files_is_one_clear_line(tmp_path, monkeypatch):
    config = write_csv_source(tmp_path)
    monkeypatch.setattr(prepare, "write_json", _refuse)
    with pytest.raises(UsageError, match=r"cannot write to .*: Permission denied; choose another --output"):
        run_prepare(config)


def _refuse(*_):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_too_little_disk_is_told_before_work_begins(tmp_path):
    rows = 10**11
    config = PrepareConfig(source="phantom", output=str(tmp_path / "out"), count=rows, rows_per_task=rows)
    with pytest.raises(RunError, match=r"too little disk at .*: about .* GiB needed, .* GiB free"):
        run_prepare(config)
    smaller = config.model_copy(update={"count": 3, "rows_per_task": 3, "size_px": 32, "num_workers": 1})
    assert run_prepare(smaller)["counts"]["kept"] == 3, "the refused command has left nothing in the folder"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_is_one_clear_line_and_the_run_continues_once_there_is_room(tmp_path, small_disk):
    filler = small_disk / "filler"
    config = write_csv_source(tmp_path / "set", output=str(small_disk / "out"))

    def fill(done, *_):
        if done == 8:
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(free - free % 4096))

    with pytest.raises(RunError, match=r"disk full at .*: free some and run the same command again"):
        run_prepare(config, on_progress=fill)
    filler.unlink()
    assert run_prepare(config)["counts"]["kept"] == 12


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (1000, r"does not fit into the temporary folder .* \(File too large\)"),
        (7000, r"disk full at .* \(File too large\)"),
    ],
)
def test_a_file_size_limit_is_one_clear_line(tmp_path, limit, words):
    config = write_csv_source(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match=words):
            run_prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_workers_say_nothing_of_an_interruption():
    # Two work and the third waits for work; a shell starts what runs in its background deaf to SIGINT.
    code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from place.data.pool import map_in_processes\n"
    code += "try:\n list(map_in_processes(time.sleep, [600, 600, 0.1], 3))\n"
    code += "except KeyboardInterrupt:\n print('interrupted')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    family = psutil.Process(process.pid)
    while len(family.children(recursive=True)) < 5:  # the server, what tracks its resources, three workers
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=120)[0] == "interrupted\n"


def test_a_worker_that_dies_is_one_clear_line(tmp_path):
    with pytest.raises(BrokenProcessPool):
        list(map_in_processes(os._exit, [1, 1, 1], 2))
    config = write_csv_source(tmp_path)

    def broken(*_):
        raise BrokenProcessPool

    with pytest.raises(RunError, match="a worker process died, perhaps for lack of memory; run the same command again"):
        run_prepare(config, map_tasks=broken)
    assert run_prepare(config.model_copy(update={"num_workers": 1}))["counts"]["kept"] == 12, "as advised"


def test_phantoms_through_dicom_are_those_through_jpeg(tmp_path):
    settings = {"source": "phantom", "count": 8, "size_px": 96, "num_workers": 1}
    for kind in ("jpeg", "dicom"):
        run_prepare(PrepareConfig(**settings, phantom_format=kind, output=str(tmp_path / kind)))
    pairs = zip(read_samples(tmp_path / "jpeg", "train"), read_samples(tmp_path / "dicom", "train"), strict=True)
    for jpeg, dicom in pairs:
        first, second = (
            np.asarray(Image.open(io.BytesIO(sample.pop("image")))).astype(float) for sample in (jpeg, dicom)
        )
        assert jpeg == dicom
        assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.98
    assert {row["modality"] for row in pq.read_table(tmp_path / "dicom" / "manifest.parquet").to_pylist()} == {"DX"}


def test_boxes_follow_the_image_when_it_is_made_smaller(tmp_path):
    from place.data.task import _scale_box

    box = {"box_xyxy": [0, 10, 20, 40], "side": "left"}
    assert _scale_box(box, (100, 80), (0.5, 0.25)) == {"box_xyxy": [0, 5, 5, 20], "side": "left"}
    larger = {"box_xyxy": [0, 20, 40, 80], "side": "left", "drawn_on": (160, 200)}
    assert _scale_box(larger, (100, 80), (0.5, 0.25)) == _scale_box(box, (100, 80), (0.5, 0.25))


def test_the_card_reads_as_a_page(tmp_path):
    config = write_csv_source(tmp_path, columns={"image": "file", "text": "note", "view": "pos"})
    edit_table(config, 3, note="")
    card = run_prepare(config)
    page = (Path(config.output) / "card.md").read_text()
    assert "12 rows in, 11 kept, 1 rejected." in page
    assert "| empty_report | 1 |" in page
    assert "by hash of the patient, 0.8/0.1/0.1 train/val/test, seed 0" in page
    assert "no patient column" in page
    assert card["fingerprint"] in page
    assert json.loads((Path(config.output) / "card.json").read_text()) == card


def test_the_fingerprint_tells_any_change_of_the_data(tmp_path):
    first = write_csv_source(tmp_path)
    second = first.model_copy(update={"output": str(tmp_path / "second")})
    before = run_prepare(first)["fingerprint"]
    (tmp_path / "images" / "secret-file-3.jpg").write_bytes(encode(draw_image(99)))
    assert run_prepare(second)["fingerprint"] != before


def test_the_real_radiographs_are_all_accounted_for(tmp_path, real_data):
    folder = real_data / "covid-cxr"
    columns = {"image": "filename", "text": "clinical_notes", "patient": "patientid", "view": "view"}
    config = PrepareConfig(
        source="csv",
        input=str(folder / "metadata.csv"),
        image_root=str(folder / "images"),
        columns=columns,
        label_columns=("finding",),
        output=str(tmp_path / "out"),
        num_workers=1,
    )
    card = run_prepare(config)
    counts = card["counts"]
    assert counts["input"] == 135 == counts["kept"] + counts["rejected"]
    assert sum(counts[split]["images"] for split in ("train", "val", "test")) == counts["kept"] == 135
    assert "finding=COVID-19" in card["labels"]
