"""`place compare`: two evaluations of the same images side by side, paired by a bootstrap over patients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from place.config import RunError, UsageError, build_config
from place.data.identity import SPLITS
from place.data.prepared import read_card
from place.data.storage import find_folder
from place.evaluation.encoder import get_units, read_units
from place.evaluation.metrics import Array, count_resamples, draw_weights, note_resamples
from place.evaluation.paired import Difference, Rows, compare_rows

KEYS = ("sample_id", "finding", "phrase", "label", "truths", "reference_findings")
"""Columns of TASK.parquet that must be the same in both: what was judged, and the truth."""
SETTINGS = ("settings", "chosen_on", "gallery", "sections")
"""Of a protocol, how heads were trained and what was judged, beside the score and the images trained on."""
METHOD = "bootstrap over patients, the same resamples for both; B - A with its 95 % percentile interval"


class Judged(NamedTuple):
    """A task as one evaluation has it: TASK.json and the columns of TASK.parquet."""

    result: dict[str, Any]
    columns: dict[str, Array]


class Comparison(NamedTuple):
    """Differences by task and figure, and what could not be compared or was judged in another way."""

    first: str
    second: str
    split: str
    data_fingerprint: str
    tasks: dict[str, dict[str, Difference]]
    notes: list[str]


def run_compare(
    first: Path, second: Path, data_dir: Path | None = None, bootstrap: int = 1000, tasks: Sequence[str] = ()
) -> Comparison:
    """Compare every task that two evaluations share.

    Args:
        first, second: run folders, or folders that `place evaluate --output` wrote.
        data_dir: the prepared data set, whose manifest says the patients; none takes the one `first` was trained on.
        bootstrap: resamples of patients.
        tasks: names; empty takes all.
    Raises:
        UsageError: nothing to compare, or another data set, split or other images.
        RunError: a damaged file.
    Source: ours.
    """
    ours, theirs = (read_judged(find_results(run)) for run in (first, second))
    shared = [name for name in ours if name in theirs and (not tasks or name in tasks)]
    if not shared:
        there = [", ".join(judged) or "none" for judged in (ours, theirs)]
        raise UsageError(f"no task was judged in both: {first} has {there[0]}, {second} has {there[1]}")
    kept = ours[shared[0]].result
    for name in shared:
        check_same(name, ours[name], theirs[name], kept)
    split, fingerprint = kept["protocol"]["split"], kept["data_fingerprint"]
    folder = find_data(first, data_dir, fingerprint)
    # Of all splits: cross-validation judges them together.
    units = {sample_id: unit for name in SPLITS for sample_id, unit in read_units(folder, name).items()}
    found = {name: compare_task(ours[name].columns, theirs[name].columns, units, bootstrap) for name in shared}
    notes = [note for name in shared for note in list_notes(name, ours[name].result, theirs[name].result, found[name])]
    gaps = {name: {key: item.difference for key, item in found[name].items()} for name in shared}
    few = {name: note_resamples(count_resamples(gaps[name], bootstrap), bootstrap) for name in shared}
    notes += [f"{name}: {note}" for name, told in few.items() for note in told]
    notes += [f"{name}: judged in one of the two only" for name in sorted(ours.keys() ^ theirs.keys()) if not tasks]
    compared = {name: differences for name, differences in found.items() if differences}
    return Comparison(str(first), str(second), split, fingerprint, compared, notes)


def compare_task(
    ours: dict[str, Array], theirs: dict[str, Array], units: dict[int, str], bootstrap: int
) -> dict[str, Difference]:
    """Every figure of a task in both; patients are drawn with seed 0. Raises RunError for an unknown image."""
    if "sample_id" not in ours or "sample_id" not in theirs:
        return {}
    ids_B = np.unique(ours["sample_id"])
    weight_RB = draw_weights(get_units(units, ids_B.tolist()), bootstrap)
    first, second = (Rows(columns, np.searchsorted(ids_B, columns["sample_id"])) for columns in (ours, theirs))
    return compare_rows(first, second, weight_RB)


def find_results(run: Path) -> Path:
    """The folder with TASK.json files of a run, or the folder itself. Raises UsageError."""
    for folder in (run / "evaluation", run):
        if list(folder.glob("*.json")) and (folder != run or not (run / "config.yaml").is_file()):
            return folder
    raise UsageError(f"{run} has no evaluation; run `place evaluate` first, or give the folder of its --output")


def find_data(run: Path, data_dir: Path | None, fingerprint: str) -> Path:
    """The prepared data set that was judged. Raises UsageError where it is another one or is not known."""
    config = run / "config.yaml"
    if data_dir is None and not config.is_file():
        raise UsageError(f"{run} is no run folder and does not say where its data set lies; give --data")
    folders = (
        [data_dir] if data_dir else [find_folder(stream.path) for stream in build_config(config).data.list_streams()]
    )
    prints = {folder: read_card(folder)["fingerprint"] for folder in folders}
    for folder, own in prints.items():
        if own == fingerprint:
            return folder
    there = ", ".join(f"{folder} has fingerprint {own[:12]}" for folder, own in prints.items())
    raise UsageError(f"{there}, judged was {fingerprint[:12]}; give that one by --data")


def read_judged(folder: Path) -> dict[str, Judged]:
    """Every task of a folder. Raises RunError for a damaged file."""
    judged = {}
    for path in sorted(folder.glob("*.json")):
        rows = path.with_suffix(".parquet")
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            table = pq.read_table(rows) if rows.is_file() else pa.table({})
            columns = {name: table[name].to_numpy() for name in table.column_names}
            judged[result["task"]] = Judged(result, columns)
        except (ValueError, KeyError, TypeError, pa.ArrowException):
            raise RunError(f"{path} is no result of an evaluation, or damaged; evaluate again") from None
    return judged


def check_same(name: str, first: Judged, second: Judged, kept: dict[str, Any]) -> None:
    """Whether both judged the same labels of the same images, on the data and split of `kept`. Raises UsageError."""
    for what, ours, theirs in (
        *zip(("data fingerprint", "split"), _name_data(kept), _name_data(first.result)),
        *zip(("data fingerprint", "split"), _name_data(first.result), _name_data(second.result)),
        ("images", first.result["num_samples"], second.result["num_samples"]),
    ):
        if ours != theirs:
            raise UsageError(f"{name}: {what} {ours} against {theirs}; evaluate both on the same data and split")
    shared = [name for name in KEYS if name in first.columns and name in second.columns]
    keys = [set(zip(*(judged.columns[name].tolist() for name in shared))) for judged in (first, second)]
    if "sample_id" in shared and keys[0] != keys[1]:
        raise UsageError(
            f"{name}: {len(keys[0] ^ keys[1])} images or findings were judged, or labelled, in one of the two only; "
            "evaluate both on the same data, split and evaluation.findings"
        )


def _name_data(result: dict[str, Any]) -> tuple[str, str]:
    return result["data_fingerprint"][:12], result["protocol"]["split"]


def list_notes(name: str, first: dict[str, Any], second: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What a reader of a task's differences has to know."""
    if not found:
        return [f"{name}: no figures of single images are there, in TASK.parquet; evaluate again, or see TASK.json"]
    ours, theirs = first["protocol"], second["protocol"]
    notes = [f"{name}: A is {ours.get('score')}; B is {theirs.get('score')}"] * (
        ours.get("score") != theirs.get("score")
    )
    changes = list_changes(read_settings(ours), read_settings(theirs))
    notes += [f"{name}: {path} is {a} in A, {b} in B" for path, a, b in changes]
    notes += [f"{name}: {ours['judged']}"] if "judged" in ours else []
    if name == "generation":
        notes.append("generation: F1 of findings alone is compared report by report; see TASK.json of both for words")
    return notes


def read_settings(protocol: dict[str, Any]) -> dict[str, Any]:
    """Of a protocol what the two must share for their difference to be of the encoders alone, flat."""
    settings: dict[str, Any] = {}
    for key in (key for key in SETTINGS if key in protocol):
        entry = protocol[key]
        settings |= (
            {f"{key}.{name}": value for name, value in entry.items()} if isinstance(entry, dict) else {key: entry}
        )
    if "trained_on" in protocol:
        # Behind the images stands where training stopped, which is a result.
        settings["trained_on"] = protocol["trained_on"].split(";")[0]
    return settings


def list_changes(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Where two flat trees that have a key in common differ in it."""
    return ((key, first[key], second[key]) for key in first if key in second and first[key] != second[key])


def is_mean(name: str) -> bool:
    """Whether a figure is of the whole task, not of one finding."""
    return "." not in name or name.startswith("image_to_text.") or name.rpartition(".")[2].startswith("mean_")


def write_comparison(comparison: Comparison, bootstrap: int, path: Path) -> None:
    """Write all figures as JSON. Raises RunError where the file cannot be written."""
    tree = comparison._asdict() | {
        "method": METHOD,
        "bootstrap": bootstrap,
        "tasks": {
            task: {name: item._asdict() | {"difference": item.difference._asdict()} for name, item in found.items()}
            for task, found in comparison.tasks.items()
        },
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; give another --output") from None


def print_comparison(comparison: Comparison, console: Console, with_findings: bool) -> None:
    """Print a table a task: means, or with the figures of each finding too."""
    console.print(f"A  {comparison.first}\nB  {comparison.second}", soft_wrap=True, markup=False)
    for task, found in comparison.tasks.items():
        shown = {name: item for name, item in found.items() if with_findings or is_mean(name)}
        console.print(_build_table(f"{task.replace('_', ' ')}, split '{comparison.split}'", shown))
        console.print()
    for note in comparison.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"{METHOD}; p is two-sided, of each line alone", style="dim", markup=False)


def _build_table(title: str, found: dict[str, Difference]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    table.add_column("figure", overflow="fold", min_width=34)
    for name in ("A", "B", "B - A", "95 %", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (first, second, (gap, low, high), p) in found.items():
        interval = "-" if low is None else f"{low:+.3f} to {high:+.3f}"
        is_apart = low is not None and high is not None and (low > 0 or high < 0)
        cells = (f"{first:.3f}", f"{second:.3f}", f"{gap:+.3f}", interval, "-" if p is None else f"{p:.3f}")
        table.add_row(name.replace("_", " "), *cells, style="bold" if is_apart else "")
    return table
