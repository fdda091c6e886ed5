"""Which views of the chest are kept: frontal ones, unless a user says others."""

from __future__ import annotations

from place.config import PrepareConfig
from place.data.images import Rejected

FRONTAL = ("AP", "PA", "AP SUPINE", "AP ERECT", "PA ERECT", "AP PORTABLE", "FRONTAL")
"""What stands for a frontal view; decubitus, lordotic and axial ones are none."""
_TELL_VIEWS = ("mimic-cxr", "mimic-cxr-jpg", "dicom-tree", "phantom")


def resolve_views(config: PrepareConfig) -> frozenset[str]:
    """Names of the views that are kept, in upper case; an empty one stands for an unknown view, ALL for every one.

    Without a wish the frontal ones; an unknown view only of sources that often cannot tell it (csv, folder, openi,
    r2gen-json, table).
    Source: ours; MIMIC-CXR's users take AP and PA as frontal.
    """
    wanted = {" ".join(view.upper().split()) for view in config.views}
    if not wanted:
        return frozenset(FRONTAL if config.source in _TELL_VIEWS else (*FRONTAL, ""))
    more = FRONTAL if "FRONTAL" in wanted else ()
    return frozenset({*wanted, *more, *([""] if "UNKNOWN" in wanted else [])})


def check_view(view: str, kept: frozenset[str]) -> None:
    """Raises Rejected: `view_excluded`, `view_unknown`."""
    if view in kept or "ALL" in kept:
        return
    if view:
        raise Rejected("view_excluded", view)
    raise Rejected("view_unknown", "neither the source nor the file tells the view; --views FRONTAL UNKNOWN keeps it")
