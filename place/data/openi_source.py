"""Source `openi`: Indiana University's chest X-rays, reports as XML beside PNG or DICOM."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from place.config import PrepareConfig, UsageError
from place.data.frame_rows import FrameRows, mark_rejects, name_to_text, text_to_name
from place.data.identity import IdHasher, read_salt
from place.data.images import Rejected, read_file
from place.data.official_split import assign_splits
from place.data.report_files import MAX_REPORT_BYTES, parse_xml
from place.data.rows import Table
from place.data.table import TEXT, hash_file, read_table
from place.data.walk import walk_files

_COLUMNS = ("identity", "patient", "image_id", "report", "reject")
_IMAGES = (".png", ".dcm", ".jpg", ".jpeg")
_PROJECTIONS = "indiana_projections.csv"
_NO_VIEW = "no table of views: a PNG does not tell its view, so lateral images are among them"


def open_openi(config: PrepareConfig) -> Table:
    """A row for each image that a report names (`parentImage`), and one for a report without any (`no_image`).

    Reports are all *.xml below the input folder or --reports, images all PNG, DICOM or JPEG files below it or
    --image-root: named as NLMCXR_png.tgz (CXR1_1_IM-0001-3001.png) or NLMCXR_dcm.tgz (1/1_IM-0001-3001.dcm) names them.
    A report is a patient. Views come from `indiana_projections.csv` (uid, filename, projection), if it is there, or
    from the DICOM header.
    Raises:
        UsageError: no folder, or no reports in it.
    Source: the layout is Open-i's; ours.
    """
    if not config.input or not Path(config.input).is_dir():
        raise UsageError(
            f"source openi needs a folder: --input {config.input or 'DIR'} holds the XML reports and the images"
        )
    root, report_root = Path(config.input), Path(config.reports or config.input)
    image_root = Path(config.image_root or config.input)
    reports = list(_walk(report_root, (".xml",)))
    if not reports:
        raise UsageError(f"{report_root} holds no XML reports; give --reports the folder of NLMCXR_reports.tgz")
    ids = IdHasher(read_salt(config.salt_file))
    told = hashlib.sha256()
    rows = [row for report in reports for row in _read_rows(report_root, report, told)]
    frame = pd.DataFrame(rows, columns=_COLUMNS, dtype=TEXT)
    images = {_image_key(Path(name).name): name for name in _walk(image_root, _IMAGES)}
    frame["study"], frame["number"] = frame["patient"], range(len(frame))
    key = frame["image_id"].map(_image_key)
    frame["image"] = key.map(images).fillna("")
    mark_rejects(frame, (key != "") & key.duplicated(), "duplicate_id")
    frame["split"], rule = assign_splits(frame, config, "")
    projections = root / _PROJECTIONS
    notes = _add_views(frame, key, projections)
    if projections.is_file():
        told.update(hash_file(projections).encode())
    told.update("\n".join([*reports, *sorted(images.values()), str(image_root.resolve())]).encode())
    content = ids.digest("input", told.hexdigest()).hex()
    return Table(FrameRows(frame, [], ids, str(image_root), str(report_root)), [], rule, notes, content)


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Files with one of the suffixes, as paths below the root, in a fixed order."""
    return (name_to_text(name) for name in walk_files(root) if name.lower().endswith(suffixes))


def _read_rows(root: Path, report: str, told: hashlib._Hash) -> list[tuple[str, ...]]:
    try:
        data = read_file(str(root / text_to_name(report)), MAX_REPORT_BYTES)
        told.update(data)
        tree = parse_xml(data)
    except Rejected:
        return [(f"report {report}", f"report {report}", "", report, "unreadable_report")]
    name = next((node.get("id") for node in tree.iter("uId")), None) or f"CXR{Path(report).stem}"
    images = [image for node in tree.iter("parentImage") if (image := (node.get("id") or "").strip())]
    rows: list[tuple[str, ...]] = [(image, name, image, report, "") for image in images]
    return rows or [(f"report {name}", name, "", report, "no_image")]


def _image_key(name: str) -> str:
    """What the names of one image have in common: CXR1_1_IM-0001-3001(.png) and 1_IM-0001-3001.dcm(.png)."""
    stem = re.sub(r"(?:\.(?:dcm|png|jpe?g))+$", "", name, flags=re.IGNORECASE)
    return re.sub(r"^(?:CXR)?(?:(\d+)_(?=\1_))?", "", stem)


def _add_views(frame: pd.DataFrame, key: pd.Series, table: Path) -> list[str]:
    if table.is_file():
        views = read_table(table, {"image": "filename", "view": "projection"}, ())
        known = dict(zip(views["image"].map(_image_key), views["view"]))
        frame["view"] = key.map(known).fillna("")
        return []
    return [] if frame["image"].str.lower().str.endswith(".dcm").any() else [_NO_VIEW]
