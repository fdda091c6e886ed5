"""An exported folder as what evaluation takes: the same model, tokenizer and numbers as of the run it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from place.config import RunError, UsageError
from place.data.tokens import ReportTokenizer
from place.training.checkpoint import LoadedRun


def is_export(folder: str | Path) -> bool:
    """Whether a folder was written by `place export`."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text()).get("model_type") == "place"
    except (OSError, ValueError, AttributeError):
        return False


def read_trained(folder: str | Path) -> dict[str, Any]:
    """What an export says of its training: step, commit, data_fingerprint and so on."""
    return json.loads((Path(folder) / "config.json").read_text())["trained"]


def read_evaluation(folder: str | Path) -> dict[str, Any]:
    """How an export is judged where nothing else is said: its `evaluation` section."""
    return json.loads((Path(folder) / "config.json").read_text())["place"].get("evaluation", {})


def load_export(folder: str | Path) -> LoadedRun:
    """Load an exported folder.

    Raises:
        UsageError: no export. RunError: its weights are damaged or do not fit.
    Source: ours.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    if not is_export(folder):
        raise UsageError(f"{folder} is no exported model; give a folder written by `place export`")
    try:
        pretrained = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder}: {' '.join(str(error).split())[:200]}; export the run again") from None
    about = pretrained.config
    config = about.build_place_config()
    tokenizer = ReportTokenizer.load(folder, config.data.max_tokens, config.data.max_sentences)
    step, commit = about.trained["step"], about.trained["commit"]
    return LoadedRun(pretrained.place, tokenizer, config, about.image_mean, about.image_std, step, commit)
