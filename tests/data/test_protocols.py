"""Protocol files: every shipped one loads and fits the code that reads it, and what is wrong is said in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from documents import read_commands
from miniatures import PROTOCOLS, parse_prepare

from place.cli import build_parser
from place.config import UsageError, build_config
from place.data.layout import PLACEHOLDER
from place.data.protocol import SHIPPED, fill_options, list_counts, read_protocol
from place.data.sources import SOURCES
from place.evaluation.finetune import plan_schedule
from place.evaluation.heads import build_schedule
from place.evaluation.suite import NEEDS, TASKS

FILES = sorted(PROTOCOLS.glob("*.yaml"))


def write(path: Path, **changes: object) -> Path:
    """The RSNA protocol with some keys changed; None takes one away."""
    tree = yaml.safe_load((PROTOCOLS / "rsna.yaml").read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_protocol_fits_sources_tasks_and_options(path: Path) -> None:
    protocol = read_protocol(path)
    assert protocol.name == path.stem
    assert protocol.source in SOURCES
    config = parse_prepare("--protocol", path, "--input", "data", "--output", "out")
    assert config.source == protocol.source
    assert config.protocol == str(path)
    for task, metrics in protocol.tasks.items():
        assert task in TASKS
        assert metrics
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in (f"--protocol configs/eval/{path.name}", "hardware", "cost", "expected"):
        assert any(word in line for line in header), f"no '{word}' in the header"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_protocol_offers_what_its_tasks_need(path: Path) -> None:
    protocol = read_protocol(path)
    needs = {NEEDS.get(task, "") for task in protocol.tasks}
    if protocol.layout is None:
        return  # other sources bring labels, boxes and reports of their own
    assert ("labels" in needs) <= bool(protocol.layout.labels)
    assert ("masks" in needs) <= bool(protocol.layout.masks)
    assert ("training boxes" in needs) <= bool(protocol.layout.boxes)
    assert bool(needs & {"reports", "training reports"}) <= bool(protocol.layout.text)
    assert (protocol.layout.text is None) == (protocol.prepare.get("min_words") == 0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_that_a_layout_reads_are_told_to_the_user(path: Path) -> None:
    protocol = read_protocol(path)
    if protocol.layout is None:
        return
    tables = [*protocol.layout.tables, *(table for rule in protocol.layout.boxes for table in rule.tables)]
    tables += [protocol.layout.patients.table] if protocol.layout.patients else []
    for name in [table.file for table in tables] + list(protocol.layout.lists.values()):
        assert name in protocol.files, name
    folders = {table.folder for table in protocol.layout.tables}
    for folder in folders:
        first = PLACEHOLDER.split(protocol.layout.image.replace("{folder}", folder))[0].split("*")[0]
        assert any(name.startswith(first) for name in protocol.files), first


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_peers_name_a_task_a_source_and_how_sure_it_is(path: Path) -> None:
    for peer in read_protocol(path).peers:
        assert peer.task in TASKS
        assert peer.values
        assert peer.source
        assert all(0 < abs(value) <= 100 for value in peer.values.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_half_a_download_does_not_meet_the_counts(path: Path) -> None:
    """Rows are of the tables, which come whole; images, or none that is missing, are of the archive."""
    assert {name.split(".")[1] for name in list_counts(read_protocol(path))} & {"images", "missing"}


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("chestx_det10", 2701),
        ("chexpert", 186_252),
        ("covidx", 84_818),
        ("nih", 75_709),
        ("object_cxr", 7200),
        ("rsna", 16_011),
        ("siim", 8433),
        ("vindr", 13_500),
    ],
)
def test_the_command_of_a_big_data_set_goes_five_times_through_its_training_images(name: str, images: int) -> None:
    """Training images by the counts and shares of the file; of covidx all images, for no more is stated."""
    lines = (PROTOCOLS / f"{name}.yaml").read_text().splitlines()
    commands = read_commands(["\n".join(line[14:] for line in lines if line.startswith("#"))])
    trained = set()
    for words in (words for words in commands if words[0] == "evaluate"):
        arguments = build_parser().parse_args(words)
        config = build_config(None, arguments.overrides).evaluation
        for task in {"segmentation", "detection", "finetune"} & {*arguments.tasks.split(",")}:
            section = getattr(config, task)
            plan = plan_schedule(section, images) if task == "finetune" else build_schedule(section)
            assert task == "finetune" or config.max_train_images is None
            assert plan.max_steps * plan.batch_size >= 5 * images, task
            assert plan.patience * plan.every * plan.batch_size >= images, f"{task} may stop before it saw its images"
            trained.add(task)
    assert trained


def test_data_sets_that_share_images_name_each_other() -> None:
    assert sorted(SHIPPED) == [path.stem for path in FILES]
    relatives = {path.stem: {*read_protocol(path).shares_images_with} for path in FILES}
    for name, others in relatives.items():
        assert all(name in relatives[other] for other in others), name
    assert "nih" in relatives["rsna"]
    assert relatives["vindr"] == set()


def test_a_protocol_of_ones_own_names_a_shipped_one_or_one_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "cut.yaml", name="cut")
    whole = write(tmp_path / "whole.yaml", name="whole", shares_images_with=["cut", "vindr"])
    assert read_protocol(whole).shares_images_with == ("cut", "vindr")


def test_the_scoreboard_is_the_same_in_every_file() -> None:
    measured = [peer for path in FILES for peer in read_protocol(path).peers if peer.source.startswith("BenchX")]
    assert len(measured) > 60
    assert {peer.evidence for peer in measured} == {"measured"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour: unknown key"),
        ({"licence": None}, "licence: Field required"),
        ({"url": "www.kaggle.com"}, "url: expected the https:// page"),
        ({"layout": None}, "`layout` goes with source table"),
        ({"source": "openi"}, "`layout` goes with source table"),
        ({"prepare": {"output": "x"}}, "prepare.output is no option of a protocol"),
        ({"counts_from": ""}, "counts need `counts_from`"),
        ({"counts": {"all": {"positive": {"Pneumnia": 3}}}}, "positive.Pneumnia is no label"),
        ({"findings": ["Pneumnia"]}, "findings.Pneumnia is no label of the layout"),
        ({"counts": {"test": {"missing": -1}}}, "counts.test.missing: Input should be greater than or equal to 0"),
        ({"counts": {"dev": {"images": 3}}}, "counts.dev"),
        ({"peers": [{"name": "MRM"}]}, "peers.0.task: Field required"),
        ({"shares_images_with": ["nih", "nhi"]}, "shares_images_with: no other protocol is called 'nhi', only"),
        ({"shares_images_with": ["rsna"]}, "shares_images_with: no other protocol is called 'rsna'"),
    ],
)
def test_a_wrong_protocol_is_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    path = write(tmp_path / "rsna.yaml", **changes)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_protocol(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"image": "{folder}/*/{patientId}*.dcm"}, "`*` stands for folders"),
        ({"patient_match": "p[0-9"}, "no regular expression"),
        ({"patient_match": "p[0-9]+"}, "with a group"),
        ({"boxes": [{"finding": "x"}]}, "either `columns` or `shapes`"),
        ({"boxes": [{"finding": "x", "shapes": "a", "agree": 2}]}, "needs the column of the `reader`"),
        ({"masks": [{"finding": "x", "kind": "runs"}]}, "`column` goes with kind shapes or runs"),
        ({"masks": [{"finding": "x", "kind": "file"}]}, "`file` goes with kind file"),
        ({"masks": [{"finding": "{x}", "kind": "boxes"}]}, "a pattern as `finding` goes with kind shapes or runs"),
        ({"labels": [{"names": ["a", "b"], "column": "c", "empty": [""]}]}, "a column and one label"),
        ({"labels": [{"names": ["a"], "uncertain_as": {"b": "positive"}}]}, "names 'b', which is no label"),
        ({"labels": [{"names": ["a"]}, {"names": ["a"]}]}, "label 'a' has two rules"),
        ({"sample": {"one_of": ["a", "b"], "per_label": 2}}, "sample names 'a', which is no label"),
        ({"patient": "{patientId}"}, "either `patient` or `patients`"),
        (
            {"patients": {"table": {"file": "a.csv"}, "patient": "{b}", "patient_match": "p[0-9]+"}},
            "layout.patients.patient_match: expected a regular expression with a group",
        ),
        ({"tables": []}, "layout.tables"),
    ],
)
def test_a_wrong_layout_is_one_line(tmp_path: Path, layout: dict, message: str) -> None:
    tree = yaml.safe_load((PROTOCOLS / "rsna.yaml").read_text())["layout"] | layout
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_protocol(write(tmp_path / "rsna.yaml", layout=tree, counts={}))
    assert "\n" not in str(caught.value)


def test_what_the_user_says_comes_before_the_protocol(tmp_path: Path) -> None:
    words = ("--protocol", PROTOCOLS / "rsna.yaml", "--input", "data", "--output", "out")
    assert parse_prepare(*words).split == (0.6, 0.2, 0.2)
    config = parse_prepare(*words, "--split", 0.7, 0.1, 0.2, "--size-px", 512, "--allow-counts", "all.images")
    assert (config.split, config.size_px, config.min_words) == ((0.7, 0.1, 0.2), 512, 0)
    assert config.allow_counts == ("all.images",)
    config = parse_prepare(*words, "--split", 0.8, 0.1, 0.1, "--min-words", 3)
    assert (config.split, config.min_words) == ((0.8, 0.1, 0.1), 3), "said, though they are the defaults"
    with pytest.raises(UsageError, match="--source csv: protocol rsna is prepared with --source table"):
        parse_prepare(*words, "--source", "csv")
    with pytest.raises(UsageError, match="say --source phantom|.*, or --protocol"):
        parse_prepare("--output", "out")


def test_paths_of_a_protocol_start_from_the_folder_of_the_data_set() -> None:
    protocol = read_protocol(PROTOCOLS / "rsna.yaml").model_copy(update={"prepare": {"boxes": "b.csv", "size_px": 9}})
    filled = fill_options({"input": "data", "size_px": 8}, protocol)
    assert filled == {"source": "table", "boxes": "data/b.csv", "size_px": 8, "input": "data"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", 0, 0, 0), "--split: value error, expected three shares from 0 up, one of them above 0"),
        (("--split", 1.2, "-0.1", "-0.1"), "--split: "),
        (("--split", "nan", 0.5, 0.5), "--split: "),
        (("--split", "inf", 0.5, 0.5), "--split: "),
        (("--seed", -1), "--seed: input should be greater than or equal to 0"),
    ],
)
def test_numbers_that_share_nothing_out_are_one_line(words: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse_prepare("--source", "phantom", "--output", "out", *words)
    assert "\n" not in str(caught.value)
