"""What stands in for a misfit gives what the thing itself should have given."""

from __future__ import annotations

import subprocess
import sys

from place.compat import read_peak_mib


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    large = b"1" * (1 << 30)
    code = "from place.compat import read_peak_mib; print(read_peak_mib())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read_peak_mib() > len(large) / 2**20
    assert 10 < float(child.stdout) < 900
