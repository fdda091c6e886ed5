"""The sources of `place prepare`, by name: each opens a table of rows."""

from __future__ import annotations

from collections.abc import Callable

from place.config import PrepareConfig
from place.data.csv_source import open_csv
from place.data.phantom_source import open_phantom
from place.data.rows import Table

SOURCES: dict[str, Callable[[PrepareConfig], Table]] = {"phantom": open_phantom, "csv": open_csv}
