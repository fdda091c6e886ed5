"""Source `folder`: images in folders that are called as what they show, CLASS/*.png or SPLIT/CLASS/*.png."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from place.config import PrepareConfig, UsageError
from place.data.frame_rows import MIXED, FrameRows, name_to_text
from place.data.identity import IdHasher, compute_split, read_salt
from place.data.official_split import SPLIT_NAMES, assign_splits
from place.data.rows import Table
from place.data.table import TEXT, Label
from place.data.walk import walk_files

_IMAGES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
_LAYOUT = "expected CLASS/*.png, or SPLIT/CLASS/*.png with folders train, val and test (PNG, JPEG or DICOM)"
_ALONE = f"nobody tells the patients: each image is one of its own, {MIXED}"


def open_folder(config: PrepareConfig) -> Table:
    """The images below each class's folder, as torchvision's ImageFolder takes them; there are no reports.

    Each class is a label, positive in its own folder and negative in the others. Where the folders are called as splits
    are, classes lie in them, and without val its share of train validates, by hash; else the hash splits.
    Raises:
        UsageError: no folder, no images in it, or images that lie otherwise; `min_words` above 0.
    Source: ours.
    """
    if not config.input or not Path(config.input).is_dir():
        raise UsageError(f"source folder needs a folder: --input {config.input or 'DIR'}; {_LAYOUT}")
    if config.min_words:
        raise UsageError(f"--min-words {config.min_words}: source folder has no reports; leave it out")
    root = Path(config.input)
    paths = _list_images(root)
    frame = pd.DataFrame({"image": paths, "identity": paths}, dtype=TEXT)
    frame["number"] = range(len(frame))
    classes, splits = _read_folders(root, paths)
    # With the folder's name: another data set's image of the same name is another patient.
    frame["patient"] = frame["study"] = f"{root.resolve().name}/" + frame["identity"]
    if splits:
        frame["split"] = pd.Series(splits, dtype=TEXT)
    frame["split"], rule = _assign_splits(frame, config)
    labels = [Label(name, name, None) for name in sorted({*classes})]
    for label in labels:
        frame[f"label:{label.name}"] = pd.Series([str(int(name == label.name)) for name in classes], dtype=TEXT)
    ids = IdHasher(read_salt(config.salt_file))
    content = ids.digest("input", "\n".join([*paths, str(root.resolve())])).hex()
    names = [label.name for label in labels]
    notes = [f"each class folder is a label: {', '.join(names)}", _ALONE]
    return Table(FrameRows(frame, labels, ids, str(root)), names, rule, notes, content)


def _list_images(root: Path) -> list[str]:
    """Paths below the root, in a fixed order; links are followed, as ImageFolder does."""
    paths = sorted(name_to_text(name) for name in walk_files(root) if name.lower().endswith(_IMAGES))
    if not paths:
        raise UsageError(f"{root} holds no images; {_LAYOUT}")
    return paths


def _read_folders(root: Path, paths: list[str]) -> tuple[list[str], list[str]]:
    """The class of each image, and its split where the folders tell splits."""
    parts = [path.split(os.sep) for path in paths]
    tops = {folders[0] for folders in parts if len(folders) > 1}
    named = {top for top in tops if top.lower() in SPLIT_NAMES}
    if named and named != tops:
        raise UsageError(f"{root} holds {min(tops - named)} beside {min(named)}, a class beside a split; {_LAYOUT}")
    depth = 2 if named else 1
    if loose := [path for path, folders in zip(paths, parts) if len(folders) <= depth]:
        raise UsageError(f"{len(loose)} images of {root} lie in no class, the first is {loose[0]}; {_LAYOUT}")
    return [folders[depth - 1] for folders in parts], [folders[0] for folders in parts] if named else []


def _assign_splits(frame: pd.DataFrame, config: PrepareConfig) -> tuple[pd.Series, str]:
    told = "split" in frame
    split, rule = assign_splits(frame, config, "")
    if not told:
        return split, rule
    rule = rule.replace("the split column says", "the folders say")
    train, val, _ = config.split
    if "val" in {*split} or not train + val:
        return split, rule
    held = frame["patient"].map(lambda patient: compute_split(patient, config.seed, (train, val, 0.0)))
    rule += f"; {val / (train + val):.3g} of train validates, by hash of the image, seed {config.seed}"
    return split.where(split != "train", held), rule
