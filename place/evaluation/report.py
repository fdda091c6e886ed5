"""`report.html`: one page that shows a whole evaluation, made of the files beside it; it needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from place.config import RunError
from place.data.page import embed, embed_thumbnail, render_page, write_page
from place.data.prepared import read_samples
from place.data.transforms import read_image
from place.evaluation.curves import Scored, draw_precision_recall, draw_roc
from place.evaluation.explain import crop_square
from place.evaluation.report_tables import build_bars, build_cell, build_chance, build_tables, show_name
from place.evaluation.task import Task

PAGE = "report.html"
NUM_EXAMPLES = 4
PICTURE_QUALITY, PICTURE_WIDTH_PX = 86, 1500
PICTURES = {
    "explain": "Where the observation (V-POR) that a sentence is paired with looks",
    "grounding": "Where a phrase points",
    "segmentation": "Masks",
    "finetune_segmentation": "Masks, encoder fine-tuned",
    "detection": "Boxes",
}
OWN_SECTIONS = ("findings", "chance", "peers")
Table = dict[str, list[Any]]


class Judged(NamedTuple):
    """Results of the same data, split and checkpoint, and a line for each other one in the folder."""

    results: list[dict[str, Any]]
    left_out: list[str]


def write_report(task: Task, folder: Path, title: str, order: Sequence[str]) -> Path:
    """Write the page of an evaluation's folder, from its TASK.json, TASK.parquet and pictures.

    Args:
        task: what was judged; results in the folder that judge anything else are named and left out.
        title: what the run and the data set are called.
        order: of the tasks on the page; others come last.
    Raises:
        RunError: a file of the folder is damaged, or the page cannot be written.
    Source: ours.
    """
    judged = read_results(folder, task, order)
    tables = {result["task"]: read_rows(folder, result["task"]) for result in judged.results}
    found, written = choose_found(tables.get("retrieval", {})), choose_written(tables.get("generation", {}))
    samples = read_chosen(task, [row[key] for row in (*found, *written) for key in row if key.endswith("sample_id")])
    page = render_page(
        "place.evaluation",
        "report.html",
        title=title,
        task=task,
        card=task.card,
        results=[build_section(result) for result in judged.results],
        left_out=judged.left_out,
        bars=[bars for result in judged.results if (bars := build_bars(result))],
        curves=[(show_name(name), *draw_curves(rows)) for name, rows in tables.items() if "score" in rows],
        found=[show_found(row, samples) for row in found],
        written=[row | {"thumbnail": show_square(samples[row["sample_id"]])} for row in written],
        pictures=list(read_pictures(folder, [*(["explain"] if task.has_reports else []), *tables])),
    )
    return write_page(folder / PAGE, page, "give a folder that can be written")


def read_results(folder: Path, task: Task, order: Sequence[str]) -> Judged:
    """The folder's TASK.json files as far as they judge what `task` does. Raises RunError for a damaged one."""
    results, left_out = [], []
    ranks = {name: rank for rank, name in enumerate(order)}
    for path in sorted(folder.glob("*.json"), key=lambda path: (ranks.get(path.stem, len(ranks)), path.stem)):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            own = result["data_fingerprint"], result["protocol"]["split"], result["checkpoint"]["step"]
            weights = result.get("encoder", {}).get("weights")
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path} is no result of an evaluation; evaluate again into an empty folder") from None
        same = (task.card["fingerprint"], task.split, task.encoder.step)
        if own == same and weights == task.encoder.weights:
            results.append(result)
        else:
            left_out.append(f"{path.name}: {show_subject(result)}, split '{own[1]}', data {own[0][:12]}")
    return Judged(results, left_out)


def show_subject(result: dict[str, Any]) -> str:
    """The encoder that a result judges, and its step if it is of a run."""
    step = result["checkpoint"]["step"]
    name = result.get("encoder", {}).get("name", "an encoder of another version")
    return name + (f", step {step}" if step is not None else "")


def read_rows(folder: Path, name: str) -> Table:
    """Columns of TASK.parquet; empty where a task has none. Raises RunError for a damaged one."""
    path = folder / f"{name}.parquet"
    try:
        return pq.read_table(path).to_pydict() if path.is_file() else {}
    except pa.ArrowInvalid:
        raise RunError(f"{path} is damaged; evaluate again") from None


def build_section(result: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one result."""
    name, headline = next(iter(result["metrics"].items()))
    protocol = {key: value for key, value in result["protocol"].items() if key not in OWN_SECTIONS}
    counts = result["protocol"].get("findings", {})
    return {
        "task": show_name(result["task"]),
        "headline": show_name(name),
        "cell": build_cell(headline),
        "chance": build_chance(result, name),
        "num_samples": result["num_samples"],
        "tables": build_tables(result),
        "peers": result["protocol"].get("peers", []),
        "counts": counts if isinstance(counts, dict) else {},
        "protocol": [(show_name(key), list(list_lines(value))) for key, value in protocol.items()],
        **{key: result[key] for key in ("commit", "data_fingerprint", "checkpoint")},
    }


def list_lines(value: Any) -> Iterator[str]:
    """An entry of a protocol as lines of text; what is empty gives none."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield f"{name}: {'; '.join(list_lines(part)) or 'none'}"
    elif isinstance(value, (list, tuple)):
        yield from (line for part in value for line in list_lines(part))
    elif value is not None:
        yield str(value)


def draw_curves(rows: Table) -> tuple[str, str]:
    """ROC and precision-recall curves of a task's scores, as addresses; of several probes the first one's."""
    columns = {name: np.array(rows[name]) for name in ("finding", "label", "score", "share", "subset") if name in rows}
    if "share" in columns:
        is_first = (columns["share"] == columns["share"][0]) & (columns["subset"] == columns["subset"][0])
        columns = {name: column[is_first] for name, column in columns.items()}
    finding, label, score = (columns[name] for name in ("finding", "label", "score"))
    scored = [Scored(name, label[finding == name], score[finding == name]) for name in dict.fromkeys(finding.tolist())]
    roc, precision = (embed(draw(scored), "image/svg+xml") for draw in (draw_roc, draw_precision_recall))
    return roc, precision


def choose_found(rows: Table) -> list[dict[str, Any]]:
    """The first images by hash, then the first whose own report was found, if these are others."""
    rank = np.array(rows.get("rank", []))
    chosen = [*range(len(rank))[:NUM_EXAMPLES], *np.flatnonzero(rank == 1)[:NUM_EXAMPLES].tolist()]
    return [_take_row(rows, place) for place in dict.fromkeys(chosen)]


def choose_written(rows: Table) -> list[dict[str, Any]]:
    """The first images by hash: no score decides."""
    return [_take_row(rows, place) for place in range(len(rows.get("sample_id", [])))[: 2 * NUM_EXAMPLES]]


def read_chosen(task: Task, sample_ids: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Stored samples of the split by id."""
    wanted, samples = set(sample_ids), {}
    for sample in read_samples(task.data_dir, task.split) if wanted else ():
        if sample["sample_id"] in wanted:
            samples[sample["sample_id"]] = sample
            if len(samples) == len(wanted):
                break
    return samples


def show_found(row: dict[str, Any], samples: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """An image beside the report that was found for it, and the findings that the two share or not."""
    own, other = (samples[row[key]] for key in ("sample_id", "found_sample_id"))
    has, told = ([name for name, sign in sample["labels"].items() if sign == 1] for sample in (own, other))
    return row | {"thumbnail": show_square(own), "has": has, "told": told}


def show_square(sample: dict[str, Any]) -> str:
    """The part of a stored image that the model sees, as an address."""
    return embed_thumbnail(crop_square(read_image(sample["image"]), [])[0])


def read_pictures(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Title and address of the folder's pictures, made smaller: PNG sheets are megabytes."""
    for name in names:
        path = folder / f"{name}.png"
        if path.is_file():
            picture_YXC = cv2.imread(str(path))
            if picture_YXC is None:
                raise RunError(f"{path} does not decode; evaluate again")
            scale = min(1.0, PICTURE_WIDTH_PX / picture_YXC.shape[1])
            small_YXC = cv2.resize(picture_YXC, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            encoded = cv2.imencode(".jpg", small_YXC, [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY])[1]
            yield PICTURES.get(name, show_name(name)), embed(encoded.tobytes(), "image/jpeg")


def _take_row(rows: Table, place: int) -> dict[str, Any]:
    return {name: column[place] for name, column in rows.items()}
