"""The sources of `place prepare`, by name: each opens a table of rows."""

from __future__ import annotations

from collections.abc import Callable

from place.config import PrepareConfig, UsageError
from place.data.csv_source import open_csv
from place.data.dicom_tree_source import open_dicom_tree
from place.data.folder_source import open_folder
from place.data.mimic_source import open_mimic
from place.data.openi_source import open_openi
from place.data.phantom_source import open_phantom
from place.data.r2gen_source import open_r2gen
from place.data.rows import Table
from place.data.table_source import open_table

SOURCES: dict[str, Callable[[PrepareConfig], Table]] = {
    "phantom": open_phantom,
    "csv": open_csv,
    "folder": open_folder,
    "mimic-cxr": open_mimic,
    "mimic-cxr-jpg": open_mimic,
    "openi": open_openi,
    "dicom-tree": open_dicom_tree,
    "r2gen-json": open_r2gen,
    "table": open_table,
}

TAKE_MASKS = ("csv",)
_MIMIC = ("mimic-cxr", "mimic-cxr-jpg")
TAKEN_BY = {
    "columns": ("column", ("csv", "dicom-tree")),
    "label_columns": ("labels", ("csv", "dicom-tree", *_MIMIC)),
    "image_root": ("image-root", ("csv", "openi", "r2gen-json")),
    "reports": ("reports", ("dicom-tree", "openi", *_MIMIC)),
    "boxes": ("boxes", _MIMIC),
    "only": ("only", _MIMIC),
}
"""Settings that not every source looks at: the option, and the sources that do."""


def open_source(config: PrepareConfig) -> Table:
    """The table of the source that was asked for.

    Raises:
        UsageError: an option that the source would not look at, or what its opener raises.
    Source: ours.
    """
    if config.masks and config.source not in TAKE_MASKS:
        raise UsageError(
            f"--masks {' '.join(config.masks)}: source {config.source} takes no mask files, only "
            f"{', '.join(TAKE_MASKS)} does; leave it out, or prepare a table of these images with --source csv"
        )
    for name, (option, sources) in TAKEN_BY.items():
        if getattr(config, name) and config.source not in sources:
            told = f"source {config.source} takes none, only {', '.join(sources)} do; leave it out"
            raise UsageError(f"--{option}: {told}")
    return SOURCES[config.source](config)
