"""`place export`: a run as a folder that transformers and timm load, with a card that says where it came from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from place import __version__
from place.config import RunError, UsageError
from place.export_card import build_card
from place.export_onnx import require_onnx, write_onnx
from place.kept import drafted
from place.training.checkpoint import LoadedRun, load_run, read_definition

if TYPE_CHECKING:
    from place.pretrained.model import PlacePretrainedModel

TIMM = "timm"
ONNX = "onnx/vision.onnx"
RESULTS = "evaluation"
_FOLDERS = re.compile(r"(?<![\w/.])(?<!http:)(?<!https:)(?!https?:)(?:\w+:/)?/(?=[^\s/])(?:[^;,]*/)?(?=[^\s/])")
"""What comes before the name in an absolute path or S3 address; as names may hold spaces, up to a clause's last /."""


class Exported(NamedTuple):
    """What was written, and a line for each part that was left out or measured."""

    folder: Path
    size_mib: float
    notes: list[str]


def run_export(run_dir: Path, output: Path, which: str = "best", with_onnx: bool = False) -> Exported:
    """Export a run: weights, configuration, image processor, tokenizer, timm checkpoint and card.

    Args:
        with_onnx: write the vision encoder as ONNX too.
        which: checkpoint, `best`, `latest` or a folder name such as step_00000100.
        output: a folder that is not there yet or is empty; written whole or not at all.
    Raises:
        UsageError: no such run or checkpoint, the folder is taken, or packages for ONNX are missing.
        RunError: it cannot be written, or the ONNX file does not give what torch gives.
    Source: ours.
    """
    if output.resolve() == Path.cwd():
        raise UsageError(f"--output {output} is the folder that this runs in; give a new one")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"--output {output} is there already; give a new folder or remove it")
    if with_onnx:
        require_onnx()
    run = load_run(run_dir, which)
    try:
        with drafted(output) as draft:
            draft.mkdir(parents=True)
            notes = write_parts(run_dir, run, draft, with_onnx)
            size_mib = sum(path.stat().st_size for path in draft.rglob("*")) / 2**20
    except OSError as error:
        raise RunError(f"{output}: {error.strerror or error}; give a folder that can be written") from None
    return Exported(output, size_mib, notes)


def write_parts(run_dir: Path, run: LoadedRun, folder: Path, with_onnx: bool = False) -> list[str]:
    """Write every part into a folder that is there. Returns the notes."""
    from place.pretrained.images import PlaceImageProcessor

    model = build_pretrained(run_dir, run)
    model.save_pretrained(folder, safe_serialization=True)
    PlaceImageProcessor(run.config.data.image_size_px, run.mean, run.std).save_pretrained(folder)
    run.tokenizer.save(folder)
    notes = [write_timm(run_dir, run, folder / TIMM)]
    if with_onnx:
        notes.append(write_onnx(run.model.vision, run.config.data.image_size_px, folder / ONNX))
    else:
        notes.append("no ONNX of the vision encoder: --onnx writes it")
    results = {name: hide_folders(result) for name, result in read_results(run_dir, run.step).items()}
    for name, result in results.items():
        path = folder / RESULTS / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    parts = {name for name in (TIMM, ONNX) if (folder / name).exists()}
    (folder / "README.md").write_text(build_card(model.config, results, TIMM in parts, ONNX in parts))
    return notes


def build_pretrained(run_dir: Path, run: LoadedRun) -> PlacePretrainedModel:
    """The run's model behind transformers' interface; it shares no weight with the run."""
    from place.pretrained.config import KEPT, PlaceConfig
    from place.pretrained.model import PlacePretrainedModel

    portable, definition = read_definition(run_dir, run.config)
    kept = portable.model_dump(mode="json", include=KEPT)
    kept["model"]["text"]["source"] = "scratch"
    report_encoder = {name: value for name, value in definition.to_diff_dict().items() if not name.startswith("_")}
    info = json.loads((run_dir / "run.json").read_text())
    trained = {
        "step": run.step,
        "commit": run.commit,
        "data_fingerprint": info["data_fingerprint"],
        "exported_by": f"place {__version__}",
        "started_from": {part: name_source(getattr(run.config.model, part).source) for part in ("vision", "text")},
    }
    model = PlacePretrainedModel(
        PlaceConfig(kept, report_encoder, run.tokenizer.vocab_size, run.mean, run.std, trained)
    )
    model.place.load_state_dict(run.model.state_dict())
    return model.eval()


def name_source(source: str) -> str:
    """An encoder's source without the folders of the machine that trained."""
    return f"folder {Path(source).name}" if Path(source).is_absolute() or Path(source).is_dir() else source


def hide_folders(tree: Any) -> Any:
    """A result without the folders of the machine that judged: of each path in it the name alone is left."""
    if isinstance(tree, dict):
        return {name: hide_folders(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [hide_folders(value) for value in tree]
    return _FOLDERS.sub("", tree) if isinstance(tree, str) else tree


def write_timm(run_dir: Path, run: LoadedRun, folder: Path) -> str:
    """Write the vision transformer as `timm.create_model('local-dir:FOLDER', pretrained=True)` takes it.

    Its output is the image summary that the run was trained with. Returns a note.
    """
    import timm

    vision = read_definition(run_dir, run.config)[0].model.vision
    if vision.stem != "patch":
        return f"{TIMM}: left out, as timm has no such stem (model.vision.stem={vision.stem})"
    size_px = run.config.data.image_size_px
    arguments = {
        "in_chans": 1,
        "num_classes": 0,
        "img_size": size_px,
        "dynamic_img_size": True,
        **vision.overrides,
        "global_pool": "token" if vision.pooling == "cls" else "avg",
        # The last norm stays before the pooling.
        "use_fc_norm" if timm.models.is_model_in_modules(vision.architecture, ["eva"]) else "fc_norm": False,
    }
    vit = timm.create_model(vision.architecture, **arguments)
    vit.load_state_dict(run.model.vision.vit.state_dict())
    timm.models.save_for_hf(
        vit,
        str(folder),
        model_config={"pretrained_cfg": {"tag": "place", "license": "other"}},
        model_args=arguments,
        safe_serialization=True,
        data_config={"input_size": (1, size_px, size_px), "mean": (run.mean,), "std": (run.std,), "crop_pct": 1.0},
    )
    return f"{TIMM}: timm.create_model('local-dir:{TIMM}', pretrained=True), run in the exported folder"


def read_results(run_dir: Path, step: int) -> dict[str, dict[str, Any]]:
    """The evaluation results of a run that are of one checkpoint, by task."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted((run_dir / RESULTS).glob("*.json"))}
    return {name: tree for name, tree in results.items() if tree.get("checkpoint", {}).get("step") == step}
