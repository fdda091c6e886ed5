"""Results on the screen, readable at 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from place.evaluation.leaks import list_leak_notes
from place.evaluation.metrics import Metric, TaskResult

WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}
MODES = ("instance", "pathology", "combined")
RETRIEVAL_ROWS = {
    "r_at_1": "R@1 %",
    "r_at_5": "R@5 %",
    "r_at_10": "R@10 %",
    "median_rank": "median rank",
    "mrr": "MRR",
    "p_at_5": "P@5 by label %",
    "p_at_10": "P@10 by label %",
    "p_at_100": "P@100 by label %",
}


def print_results(results: dict[str, TaskResult], console: Console) -> None:
    """Print a table for each task, its headline score first, with 95 % intervals and chance levels."""
    pixels = results.get("pixel_probe") if "classification" in results else None
    for result in results.values():
        if result is pixels:
            continue
        if "not_applicable" in result.protocol:
            console.print(f"{result.task.replace('_', ' ')}: not applicable, {result.protocol['not_applicable']}\n")
            continue
        is_beside = pixels is not None and result.task == "classification"
        build = BUILDERS.get(result.task, _build_findings)
        console.print(_build_classification(result, pixels) if is_beside else build(result))
        for note in _list_notes(result) + ([f"pixels: {pixels.protocol['score']}"] if pixels and is_beside else []):
            console.print(f"  {note}", style="dim", highlight=False)
        if peers := result.protocol.get("peers"):
            console.print(_build_peers(peers))
        console.print()
    for note in _list_leaks(results):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)


def _list_leaks(results: dict[str, TaskResult]) -> list[str]:
    """What the check for leaks has to say, once: it is the same for all tasks."""
    leaks = next((result.protocol["leaks"] for result in results.values() if "leaks" in result.protocol), None)
    return list_leak_notes(leaks) if leaks else []


def _build_findings(result: TaskResult) -> Table:
    title = f"{result.task.replace('_', ' ')}: {result.num_samples} images"
    others = [mode for mode in MODES if f"{mode}.mean_auroc" in result.metrics]
    table = _build_table(title, ("finding", "positive", "negative", "no label", "AUROC", "95 %", "AP", *others))
    rows = [("mean", "mean_auroc", "mean_average_precision", None)]
    rows += [
        (name, f"auroc.{name}", f"average_precision.{name}", counts)
        for name, counts in result.protocol["findings"].items()
    ]
    for name, auroc, precision, counts in rows:
        numbers = [str(counts[key]) for key in ("positive", "negative", "no_label")] if counts else [""] * 3
        metric, other = result.metrics[auroc], [f"{result.metrics[f'{mode}.{auroc}'].value:.3f}" for mode in others]
        cells = [
            name,
            *numbers,
            f"{metric.value:.3f}",
            _show_interval(metric),
            f"{result.metrics[precision].value:.3f}",
            *other,
        ]
        table.add_row(*cells, style="" if counts else "bold", end_section=not counts)
    return table


def _build_retrieval(result: TaskResult) -> Table:
    others = [mode for mode in MODES if f"{mode}.image_to_text.r_at_1" in result.metrics]
    title = f"retrieval: {result.protocol['num_images']} images, {result.protocol['num_reports']} unique reports"
    table = _build_table(title, ("direction", "measure", "value", "95 %", "chance", *others))
    for way, label in WAYS.items():
        shown = [name for name in RETRIEVAL_ROWS if f"{way}.{name}" in result.metrics]
        for name in shown:
            key, scale = f"{way}.{name}", 100 if "%" in RETRIEVAL_ROWS[name] else 1
            digits = 3 if name == "mrr" else 1
            metric, chance = result.metrics[key], result.protocol["chance"][way][name]
            figures = [chance, *(result.metrics[f"{mode}.{key}"].value for mode in others)]
            cells = [f"{metric.value * scale:.{digits}f}", _show_interval(metric, scale, digits)]
            cells += [f"{figure * scale:.{digits}f}" for figure in figures]
            first = name == shown[0]
            table.add_row(label if first else "", RETRIEVAL_ROWS[name], *cells, end_section=name == shown[-1])
    return table


def _build_classification(result: TaskResult, pixels: TaskResult | None = None) -> Table:
    """AUROC at each share of the labels, that of raw pixels beside it; the other figures are those of the largest."""
    first, *fewer = result.protocol["shares"]
    befores = {share: "" if share == "100 %" else f"at_{share.removesuffix(' %')}." for share in (first, *fewer)}
    beside = ("pixels",) if pixels else ()
    heads = [head for share in reversed(fewer) for head in (share, *beside)]
    heads += [first, "95 %", *beside, "AP", "F1", "Brier"]
    title = f"{result.task.replace('_', ' ')}: AUROC by share of training labels, {result.num_samples} images"
    table = _build_table(title, ("finding", *heads))
    for name in ("mean", *result.protocol["findings"]):
        form = "{}mean_{}" if name == "mean" else f"{{}}{{}}.{name}"
        cells = []
        for share in (*reversed(fewer), first):
            key = form.format(befores[share], "auroc")
            cells.append(f"{result.metrics[key].value:.3f}")
            cells += [_show_interval(result.metrics[key])] if share == first else []
            cells += [f"{pixels.metrics[key].value:.3f}"] if pixels else []
        others = (form.format(befores[first], kind) for kind in ("average_precision", "f1", "brier"))
        cells += [f"{result.metrics[key].value:.3f}" for key in others]
        table.add_row(name, *cells, style="bold" if name == "mean" else "", end_section=name == "mean")
    return table


def _build_grounding(result: TaskResult) -> Table:
    others = list(result.protocol["other_scores"])
    heads = ("finding", "phrases", "pointing", "95 %", "CNR", "95 %", "mIoU", *others)
    table = _build_table(f"grounding: {result.num_samples} phrases", heads)

    def show(form: str, _: dict[str, Any]) -> list[str]:
        pointing, cnr, miou = (result.metrics[form.format(kind)] for kind in ("pointing_game", "cnr", "miou"))
        cells = [f"{pointing.value:.3f}", _show_interval(pointing), f"{cnr.value:.2f}", _show_interval(cnr, digits=2)]
        beside = [result.metrics[f"{other}.{form}".format("pointing_game")] for other in others]
        return [*cells, f"{miou.value:.3f}", *(f"{other.value:.3f}" for other in beside)]

    return _add_findings(table, result, "phrases", show)


def _build_segmentation(result: TaskResult) -> Table:
    heads = ("finding", "images", "Dice", "95 %", "IoU", "95 %", "empty images", "kept empty")
    table = _build_table(f"{result.task}: {result.num_samples} images", heads)

    def show(form: str, found: dict[str, Any]) -> list[str]:
        dice, iou = result.metrics[form.format("dice")], result.metrics[form.format("iou")]
        kept = result.metrics.get(form.format("empty_kept"))
        cells = [f"{dice.value:.3f}", _show_interval(dice), f"{iou.value:.3f}", _show_interval(iou)]
        return [*cells, str(found.get("empty", "")), f"{kept.value:.3f}" if kept else "-"]

    return _add_findings(table, result, "images", show)


def _build_detection(result: TaskResult) -> Table:
    heads = ("finding", "boxes", "AP .5:.95", "95 %", "AP .4:.75", "95 %", "AP .5", "empty images")
    table = _build_table(f"detection: {result.num_samples} images", heads)

    def show(form: str, found: dict[str, Any]) -> list[str]:
        coco, field, half = (result.metrics[form.format(kind)] for kind in ("ap", "ap_40_75", "ap_50"))
        cells = [cell for metric in (coco, field) for cell in (f"{metric.value:.3f}", _show_interval(metric))]
        return [*cells, f"{half.value:.3f}", str(found.get("empty", ""))]

    return _add_findings(table, result, "boxes", show)


def _add_findings(
    table: Table, result: TaskResult, count: str, show: Callable[[str, dict[str, Any]], list[str]]
) -> Table:
    """A row of the means, then one a finding.

    Args:
        count: what the protocol counts of each finding, in the second column.
        show: the other cells, from the form of a metric's name, such as `mean_{}`, and what the protocol says of the
            finding: nothing, of the means.
    """
    rows = [("mean", "mean_{}", dict[str, Any]())]
    rows += [(name, f"{{}}.{name}", found) for name, found in result.protocol["findings"].items()]
    for name, form, found in rows:
        style = "" if found else "bold"
        table.add_row(name, str(found.get(count, "")), *show(form, found), style=style, end_section=not found)
    return table


def _build_generation(result: TaskResult) -> Table:
    others = [name for name in result.protocol["other_scores"] if f"{name}.bleu_1" in result.metrics]
    heads = ("measure", "generated", "95 %", *(name.replace("_", " ") for name in others))
    table = _build_table(f"generation: {result.num_samples} reports", heads)
    for name in (name for name in result.metrics if "." not in name):
        metric, beside = result.metrics[name], [result.metrics[f"{other}.{name}"] for other in others]
        cells = [f"{metric.value:.3f}", _show_interval(metric), *(f"{other.value:.3f}" for other in beside)]
        table.add_row(name.replace("_", " "), *cells)
    return table


def _build_table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        is_text = name in ("finding", "direction", "measure", "method", "score", "known from")
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            style="dim" if name in (*MODES, "pixels") else None,
        )
    return table


def _build_peers(peers: list[dict[str, Any]]) -> Table:
    """Scores of others, a row a method; each by its own protocol."""
    kinds = list(dict.fromkeys(kind for peer in peers for kind in peer["values"]))
    table = _build_table(
        "others, each by its own protocol and in the units of its source", ("method", "score", *kinds, "known from")
    )
    for peer in peers:
        cells = [f"{peer['values'][kind]:g}" if kind in peer["values"] else "" for kind in kinds]
        table.add_row(peer["name"], peer["metric"], *cells, f"{peer['source']} ({peer['evidence']})")
    return table


def _show_interval(metric: Metric, scale: float = 1, digits: int = 3) -> str:
    if metric.low is None or metric.high is None:
        return "-"
    return f"{metric.low * scale:.{digits}f} to {metric.high * scale:.{digits}f}"


def _list_notes(result: TaskResult) -> list[str]:
    protocol = result.protocol
    notes = [protocol["score"]]
    notes += [f"left out {name}: {reason}" for name, reason in protocol.get("left_out", {}).items()]
    if protocol.get("prompts_from_template"):
        notes.append(f"template prompts: {', '.join(protocol['prompts_from_template'])}")
    if "accuracy" in result.metrics:
        accuracy = result.metrics["accuracy"]
        notes.append(
            f"accuracy over {len(protocol['findings'])} classes {accuracy.value:.3f}, {_show_interval(accuracy)}"
        )
    notes += protocol.get("notes", [])
    for share, found in protocol.get("shares", {}).items():
        names = sorted({name for some in found["untrained"] for name in some})
        if names:
            notes.append(f"not trained, as {share} of the patients lack a class (logit 0): {', '.join(names)}")
    if "gallery" in protocol:
        notes.append(f"ties {protocol['ties']}")
    return notes


BUILDERS = {
    "retrieval": _build_retrieval,
    "classification": _build_classification,
    "finetune": _build_classification,
    "pixel_probe": _build_classification,
    "grounding": _build_grounding,
    "segmentation": _build_segmentation,
    "finetune_segmentation": _build_segmentation,
    "detection": _build_detection,
    "generation": _build_generation,
}
