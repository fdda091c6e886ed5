"""Tables on disk that are read as if they were in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import pyarrow as pa


def map_from_disk(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """Write batches to a file without a name in the temporary folder, and map it.

    So a table of reports takes pages that the system may drop and read again, and no memory of the process.
    Returns:
        The table; its file is gone with it, also when the process is killed.
    Source: ours.
    """
    descriptor, name = tempfile.mkstemp(prefix="place-table-")
    os.close(descriptor)
    try:
        with pa.OSFile(name, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        pa.default_memory_pool().release_unused()
        return pa.ipc.open_file(pa.memory_map(name)).read_all()
    finally:
        os.unlink(name)
