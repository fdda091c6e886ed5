"""Sources `mimic-cxr` (DICOM) and `mimic-cxr-jpg`: the tree of PhysioNet with its official split."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from place.config import PrepareConfig, UsageError
from place.data.frame_rows import FrameRows, mark_mixed_studies, mark_rejects
from place.data.identity import IdHasher, read_salt
from place.data.ms_cxr import find_boxes
from place.data.official_split import assign_splits
from place.data.rows import Table
from place.data.table import Label, build_labels, hash_file, read_header, read_table

_IDS = {"image": "dicom_id", "study": "study_id", "patient": "subject_id"}
_VIEW, _VIEW_MEANING = "ViewPosition", "ViewCodeSequence_CodeMeaning"
_MEANINGS = {
    "postero-anterior": "PA",
    "antero-posterior": "AP",
    "lateral": "LATERAL",
    "left lateral": "LL",
    "right lateral": "RL",
}
_SUFFIX = {"mimic-cxr": ".dcm", "mimic-cxr-jpg": ".jpg"}
_LABELS = ("chexpert", "negbio")
_ADVICE = "this is not the official split; download mimic-cxr-2.0.0-split.csv.gz again"


def open_mimic(config: PrepareConfig) -> Table:
    """The images that the metadata lists, as files/p10/p10000032/s50414267/DICOM_ID.dcm (or .jpg).

    Looked for in the input folder: `files/`; `mimic-cxr-2.0.0-split.csv.gz`; the images' list and views in
    `mimic-cxr-2.0.0-metadata.csv.gz`, or without views in `cxr-record-list.csv.gz`; reports as files/.../s50414267.txt
    there, in `mimic-cxr-reports/` or in --reports; labels of CheXpert or else NegBio, if their tables are there;
    boxes with phrases of MS-CXR as --boxes; --only keeps the images of a published test set.
    Raises:
        UsageError: a folder or table is missing.
        RunError: unreadable table, a patient in two splits.
    Source: the layout is PhysioNet's; ours.
    """
    root = _find_root(config)
    frame = _read_images(root)
    frame["number"] = range(len(frame))
    only = Path(config.only) if config.only else None
    if only:
        frame = _keep_only(frame, only)
    mark_rejects(frame, frame["identity"].duplicated(), "duplicate_id")
    splits_file = _require(root, "split")
    splits = read_table(splits_file, {"identity": "dicom_id", "split": "split"}, ())
    frame["split"] = frame["identity"].map(splits.drop_duplicates("identity").set_index("identity")["split"]).fillna("")
    frame["split"], rule = assign_splits(frame, config, _ADVICE)
    if only:
        frame["split"], rule = "test", f"all images are test images, those of {only.name}"
    mark_mixed_studies(frame)
    labels, labels_file = _add_labels(frame, root, config)
    report_root = _find_reports(root, config)
    patient, study = "p" + frame["patient"], "s" + frame["study"]
    folder = "files/" + patient.str[:3] + "/" + patient + "/" + study
    frame["image"] = folder + "/" + frame["identity"] + _SUFFIX[config.source]
    frame["report"] = folder + ".txt"
    ids = IdHasher(read_salt(config.salt_file))
    boxes_file = Path(config.boxes) if config.boxes else None
    boxes, notes = find_boxes(boxes_file, set(frame["identity"]))
    parts = [hash_file(file) for file in (_find_list(root), splits_file, labels_file, boxes_file, only) if file]
    content = ids.digest("input", ":".join([*parts, str(root.resolve()), str(report_root.resolve())])).hex()
    rows = FrameRows(frame, labels, ids, str(root), str(report_root), boxes=boxes)
    return Table(rows, [label.name for label in labels], rule, notes, content)


def _find_root(config: PrepareConfig) -> Path:
    if not config.input:
        raise UsageError(f"source {config.source} needs a folder: say --input DIR, which holds files/")
    root = Path(config.input)
    if not (root / "files").is_dir():
        raise UsageError(
            f"{root} holds no folder files/: --input is the folder of the PhysioNet download with files/p10"
        )
    return root


def _find_table(root: Path, name: str) -> Path | None:
    found = [root / f"mimic-cxr-2.0.0-{name}.csv{ending}" for ending in (".gz", "")]
    return next((path for path in found if path.is_file()), None)


def _require(root: Path, name: str) -> Path:
    found = _find_table(root, name)
    if found is None:
        raise UsageError(f"{root} holds no mimic-cxr-2.0.0-{name}.csv.gz; put it there (it comes with MIMIC-CXR-JPG)")
    return found


def _find_list(root: Path) -> Path:
    lists = [root / f"cxr-record-list.csv{ending}" for ending in (".gz", "")]
    return (
        _find_table(root, "metadata")
        or next((path for path in lists if path.is_file()), None)
        or _require(root, "metadata")
    )


def _read_images(root: Path) -> pd.DataFrame:
    table = _find_list(root)
    present = read_header(table)
    columns = {"identity": _IDS["image"], "study": _IDS["study"], "patient": _IDS["patient"]}
    views = {"view": _VIEW, "meaning": _VIEW_MEANING}
    frame = read_table(table, {**columns, **{ours: name for ours, name in views.items() if name in present}}, ())
    if "meaning" in frame:
        meant = frame.pop("meaning").map(lambda text: _MEANINGS.get(text.lower(), ""))
        frame["view"] = frame["view"].where(frame["view"] != "", meant) if "view" in frame else meant
    return frame


def _keep_only(frame: pd.DataFrame, only: Path) -> pd.DataFrame:
    """The images that a published list names. Raises UsageError where one of them is missing."""
    wanted = {*read_table(only, {"identity": _IDS["image"]}, ())["identity"]}
    kept = frame[frame["identity"].isin(wanted)].reset_index(drop=True)
    missing = len(wanted) - kept["identity"].nunique()
    if missing:
        raise UsageError(f"--only {only.name}: {missing} of its {len(wanted)} images are not in this MIMIC-CXR")
    return kept


def _add_labels(frame: pd.DataFrame, root: Path, config: PrepareConfig) -> tuple[list[Label], Path | None]:
    file = next(filter(None, (_find_table(root, name) for name in _LABELS)), None)
    if file is None:
        if config.label_columns:
            raise UsageError(f"--labels: {root} holds no mimic-cxr-2.0.0-chexpert.csv.gz and no ...-negbio.csv.gz")
        return [], None
    names = config.label_columns or tuple(name for name in read_header(file) if name not in ("subject_id", "study_id"))
    table = read_table(file, {"study": "study_id"}, names).drop_duplicates("study").set_index("study")
    for name in names:
        frame[f"label:{name}"] = frame["study"].map(table[f"label:{name}"]).fillna("")
    return build_labels(frame, names), file


def _find_reports(root: Path, config: PrepareConfig) -> Path:
    """The folder below which files/p10/.../s50414267.txt are found."""
    if config.reports:
        given = Path(config.reports)
        if not (given / "files").is_dir():
            raise UsageError(
                f"--reports {given} holds no folder files/: give the folder that mimic-cxr-reports.zip makes"
            )
        return given
    beside = root / "mimic-cxr-reports"
    return beside if (beside / "files").is_dir() else root
