"""Each leak is planted in miniature data sets and refused; what is no leak passes; what cannot be checked is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from place.config import Config, EvaluationConfig, PrepareConfig, RunError, UsageError, check_config
from place.data.identity import SPLITS, IdHasher
from place.data.manifest import HASHES_FILE
from place.data.mixture import read_fingerprint
from place.data.perceptual import find_similar, hash_image, measure_error, read_hashes, shrink_to_thumbnail
from place.data.phantom import generate_study
from place.data.prepare import run_prepare
from place.data.prepared import read_card
from place.evaluation.leaks import (
    Judged,
    Pretraining,
    check_leaks,
    list_leak_notes,
    read_id_map,
    read_pretraining,
    read_rows,
    trace_pretraining,
)
from place.evaluation.suite import run_evaluation

SALT = "a secret of sixteen bytes or more"


def quiet(*_) -> None:
    """Progress that nobody watches."""


def encode(image_YX: np.ndarray, kind: str) -> bytes:
    return cv2.imencode(f".{kind.lower()}", image_YX)[1].tobytes()


def draw(seed: int) -> np.ndarray:
    """A chest radiograph of a patient of its own."""
    return generate_study(7, 10 * seed, 96).image_YX


def write_set(folder: Path, rows: list[tuple[str, str, bytes]], **changes) -> Path:
    """Prepare a data set of (patient, split, image file) rows."""
    (folder / "images").mkdir(parents=True)
    (folder / "salt").write_text(SALT)
    lines = ["image,text,patient,split"]
    for number, (patient, split, data) in enumerate(rows):
        (folder / "images" / f"{folder.name}-{number}.png").write_bytes(data)
        report = f"FINDINGS: The heart is normal. IMPRESSION: Nodule in study {number}."
        lines.append(f'{folder.name}-{number}.png,"{report}",{patient},{split}')
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    settings = {"input": str(folder / "table.csv"), "image_root": str(folder / "images"), "num_workers": 1}
    settings |= {"columns": {name: name for name in ("image", "text", "patient", "split")}, "jpeg_quality": 95}
    settings |= {"salt_file": str(folder / "salt"), "views": ("ALL",), "size_px": 96}
    run_prepare(PrepareConfig(source="csv", output=str(folder / "out"), **(settings | changes)))
    return folder / "out"


def build_rows(first: int, name: str) -> list[tuple[str, str, bytes]]:
    """Six patients with an image each."""
    splits = ("train", "train", "train", "val", "test", "test")
    return [(f"{name}{i}", split, encode(draw(first + i), "PNG")) for i, split in enumerate(splits)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What a run was trained on."""
    return write_set(tmp_path_factory.mktemp("sets") / "trained", build_rows(0, "a"))


def check(data_dir: Path, trained: Path | None, split: str = "test", val_split: str = "val", **evaluation) -> dict:
    """The check, of a run that was trained on `trained`, its checkpoint chosen by `val_split`."""
    card = read_card(data_dir)
    pretraining = None
    if trained:
        config = check_config({"data": {"path": str(trained), "val_split": val_split}})
        pretraining = Pretraining(config.data, read_card(trained)["fingerprint"])
    return check_leaks(Judged(data_dir, card, (split,)), EvaluationConfig(**evaluation), pretraining, quiet)


def squeeze(image_YX: np.ndarray) -> np.ndarray:
    return cv2.resize(image_YX, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


COPIES = {
    "the same file": lambda x: encode(x, "PNG"),
    "JPEG again": lambda x: cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, 30])[1].tobytes(),
    "half the size": lambda x: encode(squeeze(x), "PNG"),
    "brighter": lambda x: encode(np.clip(x.astype(int) + 35, 0, 255).astype(np.uint8), "PNG"),
    "more contrast": lambda x: encode(np.clip((x.astype(float) - 128) * 1.3 + 128, 0, 255).astype(np.uint8), "PNG"),
    "a negative": lambda x: encode(255 - x, "PNG"),
}


def test_clean_data_sets_pass(trained, tmp_path):
    other = write_set(tmp_path / "other", build_rows(20, "b"))
    found = check(other, trained, other_tests=[str(trained)])["found"]
    assert set(found.values()) == {0}
    assert set(found) == {
        "selection.image",
        *(f"{name}.{kind}" for name in ("splits", "pretraining", "out") for kind in ("patient", "image")),
    }
    assert check(trained, trained)["found"] == {"splits.patient": 0, "splits.image": 0, "selection.image": 0}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_training_image_in_the_test_split_is_refused(tmp_path, kind):
    rows = build_rows(40, "c")
    data_dir = write_set(tmp_path / "planted", [*rows, ("c9", "test", COPIES[kind](draw(40)))])
    with pytest.raises(RunError, match=r"leak: 1 images of split 'test' .*evaluation.allow_leaks=\[splits.image\]'"):
        check(data_dir, None)


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_pretraining_image_in_another_data_set_is_refused(trained, tmp_path, kind):
    data_dir = write_set(tmp_path / "planted", [*build_rows(50, "d"), ("d9", "test", COPIES[kind](draw(0)))])
    with pytest.raises(RunError, match=r"leak: 1 images .*allow_leaks=\[pretraining.image\]"):
        check(data_dir, trained)


def test_an_image_that_chose_the_checkpoint_is_refused_in_the_test_split(trained, tmp_path):
    data_dir = write_set(tmp_path / "planted", [*build_rows(50, "d"), ("d9", "test", encode(draw(3), "PNG"))])
    with pytest.raises(RunError, match="pretraining.image"):
        check(data_dir, trained)


def test_a_patient_of_the_pretraining_data_is_refused_under_another_image(trained, tmp_path):
    data_dir = write_set(tmp_path / "planted", [*build_rows(60, "e"), ("a1", "test", encode(draw(69), "PNG"))])
    with pytest.raises(RunError, match=r"leak: 1 patients .*allow_leaks=\[pretraining.patient\]"):
        check(data_dir, trained)


def test_a_patient_of_another_source_is_the_same_one_unless_a_source_has_names_of_its_own(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    data_dir = write_set(tmp_path / "planted", [*build_rows(60, "e"), ("a1", "test", encode(draw(69), "PNG"))])

    def count_shared(*sources: str) -> int:
        for folder, source in zip((copy, data_dir), sources):
            (folder / "card.json").write_text(json.dumps(read_card(folder) | {"source": source}))
        return check(data_dir, copy, allow_leaks=["pretraining.patient"])["found"]["pretraining.patient"]

    assert count_shared("mimic-cxr", "csv") == count_shared("phantom", "phantom") == 1
    assert count_shared("csv", "phantom") == count_shared("openi", "csv") == 0
    assert count_shared("openi", "r2gen-json") == count_shared("r2gen-json", "openi") == 1


def test_patients_under_another_salt_are_told(trained, tmp_path):
    (tmp_path / "salt").write_text(SALT[::-1])
    other = write_set(tmp_path / "other", build_rows(60, "a"), salt_file=str(tmp_path / "salt"))
    leaks = check(other, trained, other_tests=[str(trained)])
    assert set(leaks["found"].values()) == {0}
    assert list_leak_notes(leaks) == [
        f"no check against patients: {trained} was prepared with another salt than {other}; prepare both with the same "
        "salt, into new folders"
    ]


def test_patients_under_a_salt_that_nobody_noted_are_told_where_a_salt_matters(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    data_dir = write_set(tmp_path / "other", build_rows(60, "e"))

    def tell(source: str, other: str, *salts: str | None) -> dict[str, str]:
        for folder, name, salt in zip((data_dir, copy), (source, other), salts, strict=True):
            card = {key: value for key, value in read_card(folder).items() if key != "salt_check"}
            card |= {"source": name} | ({"salt_check": salt} if salt else {})
            (folder / "card.json").write_text(json.dumps(card))
        return check(data_dir, copy)["not_checked"]

    for where, salts in ((copy, ("a", None)), (data_dir, (None, "a")), (f"{data_dir} and {copy}", (None, None))):
        told = tell("csv", "mimic-cxr", *salts)["patients"]
        assert told.startswith(f"{where} was prepared before the salt was noted, which may be another one; prepare")
    assert tell("csv", "csv", "a", "a") == tell("phantom", "phantom", "a", None) == {}
    assert tell("csv", "openi", "a", "b") == tell("phantom", "csv", "a", "b") == {}


def test_a_patient_in_two_splits_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    rows = pq.read_table(copy / "manifest.parquet").to_pylist()
    moved = next(row for row in rows if row["split"] == "train")["patient"]
    next(row for row in rows if row["split"] == "test")["patient"] = moved
    pq.write_table(pa.Table.from_pylist(rows), copy / "manifest.parquet")
    with pytest.raises(RunError, match=r"leak: 1 patients of split 'test' .*allow_leaks=\[splits.patient\]"):
        check(copy, None)


def test_the_split_trained_on_is_no_test(trained):
    with pytest.raises(RunError, match=r"allow_leaks=\[pretraining.patient,pretraining.image\]"):
        check(trained, trained, "train")


@pytest.mark.parametrize(("split", "count"), [("val", 1), ("test", 2)])
def test_a_split_that_chose_the_checkpoint_is_no_test(trained, split, count):
    told = rf"{count} images of split '{split}' of .* are judged and also chose .*allow_leaks=\[selection.image\]"
    with pytest.raises(RunError, match=told):
        check(trained, trained, split, val_split=split)
    leaks = check(trained, trained, split, val_split=split, allow_leaks=["selection.image"])
    assert leaks["allowed"] == ["selection.image"]
    assert list_leak_notes(leaks) == [f"leak allowed: selection.image, {count} of them"]
    assert check(trained, trained, split, val_split="none")["found"]["selection.image"] == 0


def test_thresholds_are_not_tuned_on_what_is_judged(run_dir, data_dir, tmp_path):
    with pytest.raises(RunError, match=r"40 images of split 'val' .*allow_leaks=\[selection.image\]"):
        run_evaluation(run_dir, data_dir, ["classification"], "val", "latest", output=tmp_path / "tuned")
    with pytest.raises(RunError, match=r"allow_leaks=\[selection.image\]"):
        run_evaluation(run_dir, data_dir, ["retrieval"], "val", "best", output=tmp_path / "chosen")
    run_evaluation(run_dir, data_dir, ["retrieval"], "val", "latest", output=tmp_path)
    assert json.loads((tmp_path / "retrieval.json").read_text())["protocol"]["leaks"]["found"]["selection.image"] == 0


def test_a_test_image_of_another_data_set_is_refused_in_any_split(trained, tmp_path):
    image = COPIES["JPEG again"](draw(4))
    data_dir = write_set(tmp_path / "planted", [*build_rows(70, "f"), ("f9", "train", image)])
    other = trained.rename(trained.with_name("nih"))
    try:
        with pytest.raises(RunError, match=r"allow_leaks=\[nih.image\]"):
            check(data_dir, None, other_tests=[str(other)])
        leaks = check(data_dir, None, other_tests=[str(other)], allow_leaks=["nih.image"])
    finally:
        other.rename(trained)
    assert leaks["found"]["nih.image"] == 1
    assert leaks["allowed"] == ["nih.image"]


def test_other_data_sets_of_one_name_are_refused(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "b" / trained.name)
    with pytest.raises(UsageError, match=f"{other} and {trained} have one name, .*; give a folder of another name"):
        check(trained, None, other_tests=[str(trained), str(other)], allow_leaks=["out.patient"])
    for name in ("splits", "pretraining", "selection"):
        with pytest.raises(UsageError, match=f"/b/{name} and the relation '{name}' have one name"):
            check(trained, None, other_tests=[str(other.rename(other.with_name(name)))])
        other = other.with_name(name)


def test_a_published_map_of_ids_finds_what_pixels_do_not(trained, tmp_path):
    data_dir = write_set(tmp_path / "rsna", build_rows(80, "g"))
    check(data_dir, trained)
    settings = {"id_map": str(tmp_path / "map.csv"), "salt_file": str(tmp_path / "rsna" / "salt")}
    for rows in (
        "rsna,nih\nrsna-5.png,trained-1.png\nrsna-0.png,trained-2.png\n",
        "nih,rsna\ntrained-1.png,rsna-5.png\ntrained-2.png,rsna-0.png\n",
    ):
        (tmp_path / "map.csv").write_text(rows)
        with pytest.raises(RunError, match=r"leak: 1 images .*allow_leaks=\[pretraining.image\]"):
            check(data_dir, trained, **settings)
    (tmp_path / "map.csv").write_text("rsna,nih\nrsna-55.png,trained-1.png\n")
    with pytest.raises(RunError, match="none of its 1 rows names an image"):
        check(data_dir, trained, **settings)
    (tmp_path / "map.csv").write_text("rsna\nrsna-5.png\n")
    with pytest.raises(UsageError, match="expected a csv of two columns"):
        check(data_dir, trained, **settings)
    (tmp_path / "map.csv").write_text("")
    with pytest.raises(RunError, match="table map.csv: cannot be read .*; write or download it again"):
        check(data_dir, trained, **settings)


def test_the_json_that_rsna_publishes_is_a_map_of_ids(trained, tmp_path):
    data_dir = write_set(tmp_path / "rsna", build_rows(80, "g"))
    path = tmp_path / "map.json"
    settings = {"id_map": str(path), "salt_file": str(tmp_path / "rsna" / "salt")}
    path.write_text(json.dumps([{"subset_img_id": "0004cfab", "img_id": "rsna-5.png", "orig_labels": ["Mass"]}]))
    ids = IdHasher(SALT.encode())
    pairs = read_id_map(EvaluationConfig(**settings), read_rows(data_dir, quiet))
    names = ("stage_2_train_images/0004cfab.dcm", "rsna-5.png")
    assert pairs == [tuple(ids.number("image", name) for name in names)]
    for text in ('[{"subset_img_id": "a"}]', '{"a": 1}', "[", "3"):
        path.write_text(text)
        with pytest.raises(UsageError, match="expected a list of records with subset_img_id and img_id") as caught:
            check(data_dir, trained, **settings)
        assert "\n" not in str(caught.value)


def write_protocol(path: Path, *relatives: str) -> str:
    """A protocol for `write_set`, of a data set that shares images with others."""
    tree = {"name": path.stem, "shares_images_with": relatives, "source": "csv", "files": {}, "tasks": {}}
    tree |= dict.fromkeys(("title", "licence", "download", "split", "uncertain"), "none")
    path.write_text(json.dumps(tree | {"url": "https://example.org"}))
    return str(path)


def test_data_sets_with_the_same_images_that_nobody_looked_into_are_told(trained, tmp_path):
    rsna = write_set(tmp_path / "a", build_rows(80, "g"), protocol=write_protocol(tmp_path / "rsna.yaml", "nih"))
    nih = write_set(tmp_path / "b", build_rows(90, "h"), protocol=write_protocol(tmp_path / "nih.yaml", "rsna"))
    leaks = check(rsna, trained)
    assert list_leak_notes(leaks) == [
        "no check against nih: it has images of this data set; give the folder it is prepared in with "
        "'evaluation.other_tests=[DIR]'"
    ]
    assert {*check(rsna, None)["not_checked"]} == {"pretraining", "nih"}
    assert {*check(rsna, trained, other_tests=[str(trained)])["not_checked"]} == {"nih"}
    assert check(rsna, trained, other_tests=[str(nih)])["not_checked"] == {}
    assert check(rsna, nih)["not_checked"] == {}


def test_a_data_set_that_was_prepared_without_a_protocol_is_known_by_its_source(trained, tmp_path):
    protocol = write_protocol(tmp_path / "ms_cxr.yaml", "mimic_cxr")
    data_dir = write_set(tmp_path / "a", build_rows(80, "g"), protocol=protocol)
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert {*check(data_dir, copy)["not_checked"]} == {"mimic_cxr"}
    (copy / "card.json").write_text(json.dumps(read_card(copy) | {"source": "mimic-cxr-jpg"}))
    assert check(data_dir, copy)["not_checked"] == {}


def test_patients_that_nobody_knows_are_no_check(tmp_path):
    columns = {name: name for name in ("image", "text", "split")}
    data_dir = write_set(tmp_path / "alone", build_rows(80, "g"), columns=columns)
    reason = "no patient column: each study is a patient of its own, so one person may be in two splits"
    assert check(data_dir, None)["not_checked"]["patients"] == reason


def test_an_allowed_leak_is_written_into_the_results_and_unknown_names_are_told(trained, tmp_path):
    data_dir = write_set(tmp_path / "planted", [*build_rows(50, "d"), ("d9", "test", encode(draw(0), "PNG"))])
    leaks = check(data_dir, trained, allow_leaks=["pretraining.image", "splits.patient"])
    assert leaks["allowed"] == ["pretraining.image"]
    assert list_leak_notes(leaks) == ["leak allowed: pretraining.image, 1 of them"]
    with pytest.raises(RunError, match="pretraining.image"):
        check(data_dir, trained, allow_leaks=["pretraining.patient", "splits.image"])
    with pytest.raises(UsageError, match="no check is called 'pretraning'; there are selection.image, splits.patient"):
        check(data_dir, trained, allow_leaks=["pretraning"])


def test_pretraining_data_that_is_gone_or_another_is_told(trained, tmp_path):
    data_dir = write_set(tmp_path / "other", build_rows(20, "b"))
    gone = Pretraining(check_config({"data": {"path": str(tmp_path / "gone")}}).data, "0")
    judged = Judged(data_dir, read_card(data_dir), ("test",))
    leaks = check_leaks(judged, EvaluationConfig(), gone, quiet)
    assert "gone is not there; give the folder" in leaks["not_checked"]["pretraining"]
    assert list_leak_notes(leaks)[0].startswith("no check against pretraining: ")
    changed = Pretraining(check_config({"data": {"path": str(trained)}}).data, "0")
    leaks = check_leaks(judged, EvaluationConfig(), changed, quiet)
    assert "another fingerprint" in leaks["not_checked"]["pretraining"]
    assert "nobody knows" in check(data_dir, None)["not_checked"]["pretraining"]


def test_pretraining_data_that_moved_is_found_where_the_user_says(trained, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"data_fingerprint": read_card(trained)["fingerprint"]}))
    evaluation = EvaluationConfig(pretraining=[str(trained)])
    config: Config = check_config({"data": {"path": "gone"}})
    assert read_pretraining(tmp_path, config, evaluation).data.path == str(trained)
    streams = check_config({"data": {"streams": [{"path": "gone", "repeat": 2}, {"path": "lost"}]}})
    with pytest.raises(UsageError, match="has 1 folders; the run has 2 data sets"):
        read_pretraining(tmp_path, streams, evaluation)
    two = EvaluationConfig(pretraining=[str(trained), "here"])
    assert [stream.path for stream in read_pretraining(tmp_path, streams, two).data.streams] == [str(trained), "here"]


def test_hashes_are_kept_beside_the_data_until_it_changes(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    before = read_hashes(copy)
    written = (copy / HASHES_FILE).stat().st_mtime_ns
    assert np.array_equal(read_hashes(copy).bits_NH, before.bits_NH)
    assert (copy / HASHES_FILE).stat().st_mtime_ns == written
    card = json.loads((copy / "card.json").read_text())
    (copy / "card.json").write_text(json.dumps(card | {"fingerprint": "0"}))
    read_hashes(copy)
    assert (copy / HASHES_FILE).stat().st_mtime_ns != written


def test_hashes_that_are_damaged_are_written_anew(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    before = read_hashes(copy)
    whole = (copy / HASHES_FILE).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-4] + b"nope"):
        (copy / HASHES_FILE).write_bytes(damaged)
        assert np.array_equal(read_hashes(copy).bits_NH, before.bits_NH)
        assert (copy / HASHES_FILE).read_bytes() == whole


def test_phantoms_of_one_patient_and_of_others_are_told_apart():
    images = [generate_study(3, number, 80).image_YX for number in range(120)]
    bits = np.array([np.unpackbits(np.frombuffer(hash_image(x), np.uint8)) for x in images]).astype(bool)
    small = [shrink_to_thumbnail(x) for x in images]
    pairs = [(a, b) for a, b in find_similar(bits, bits) if a < b]
    assert [pair for pair in pairs if measure_error(small[pair[0]], small[pair[1]]) <= 0.25] == []
    assert measure_error(small[0], 255 - small[0]) == pytest.approx(0, abs=1e-3)
    assert measure_error(small[0], 0.5 * small[0] + 9) == pytest.approx(0, abs=1e-3)


def test_an_evaluation_says_what_was_checked_and_stops_at_a_leak(run_dir, data_dir, tmp_path):
    run_evaluation(run_dir, data_dir, ["retrieval"], output=tmp_path)
    leaks = json.loads((tmp_path / "retrieval.json").read_text())["protocol"]["leaks"]
    assert leaks["found"] == {"splits.patient": 0, "splits.image": 0, "selection.image": 0}
    with pytest.raises(RunError, match="the split that the run was trained on"):
        run_evaluation(run_dir, data_dir, ["retrieval"], "train", output=tmp_path / "train")
    assert not (tmp_path / "train").exists()


def test_folds_that_judge_the_images_trained_on_are_refused(trained, tmp_path):
    card = read_card(trained)
    pretraining = Pretraining(check_config({"data": {"path": str(trained)}}).data, card["fingerprint"])
    with pytest.raises(RunError, match=r"allow_leaks=\[pretraining.patient,pretraining.image,selection.image\]"):
        check_leaks(Judged(trained, card, SPLITS), EvaluationConfig(folds=3), pretraining, quiet)
    other = write_set(tmp_path / "other", [*build_rows(20, "b"), ("b9", "train", encode(draw(0), "PNG"))])
    check(other, trained)
    with pytest.raises(RunError, match=r"1 images of split 'train, val, test' of .*allow_leaks=\[pretraining.image\]"):
        check_leaks(Judged(other, read_card(other), SPLITS), EvaluationConfig(folds=3), pretraining, quiet)


@pytest.mark.parametrize("data", [{"views_per_study": "one"}, {"streams": [{"path": "own", "repeat": 2}]}])
def test_the_data_set_is_known_again_however_an_epoch_goes_through_it(trained, data):
    data = {"path": str(trained)} | json.loads(json.dumps(data).replace("own", str(trained)))
    config = check_config({"data": data}).data
    pretraining = Pretraining(config, read_fingerprint(config))
    allowed = EvaluationConfig(allow_leaks=["selection.image"])
    leaks = check_leaks(Judged(trained, read_card(trained), ("val",)), allowed, pretraining, quiet)
    assert leaks["found"]["selection.image"] == 1
    assert leaks["not_checked"] == {}


def test_an_encoder_that_names_no_folder_is_looked_up_where_the_user_says(trained, tmp_path):
    other = write_set(tmp_path / "other", [*build_rows(20, "b"), ("b9", "test", encode(draw(0), "PNG"))])
    told = EvaluationConfig(pretraining=[str(trained)])
    own = read_card(trained)["fingerprint"]
    for fingerprint in (None, own):
        pretraining = trace_pretraining(check_config({}).data, fingerprint, told)
        with pytest.raises(RunError, match=r"allow_leaks=\[pretraining.image\]"):
            check_leaks(Judged(other, read_card(other), ("test",)), told, pretraining, quiet)
    untold = trace_pretraining(check_config({}).data, own, EvaluationConfig())
    leaks = check_leaks(Judged(other, read_card(other), ("test",)), EvaluationConfig(), untold, quiet)
    assert leaks["not_checked"]["pretraining"].startswith("the pretraining data is not there; give the folder")
    with pytest.raises(RunError, match="the split that the run was trained on"):
        check_leaks(Judged(trained, read_card(trained), ("train",)), EvaluationConfig(), untold, quiet)
    assert trace_pretraining(check_config({}).data, None, EvaluationConfig()) is None
