"""Tables on disk that are read as if they were in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import pyarrow as pa

from place.config import RunError
from place.kept import FULL


def map_from_disk(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """Write batches to a file without a name in the temporary folder, and map it.

    So a table of reports takes pages that the system may drop and read again, and no memory of the process.
    Returns:
        The table; its file is gone with it, also when the process is killed.
    Raises:
        RunError: the temporary folder is full.
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
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(
            f"the table does not fit into the temporary folder {tempfile.gettempdir()} "
            f"({os.strerror(error.errno or 0)}): free some or set TMPDIR to another one"
        ) from None
    finally:
        os.unlink(name)
