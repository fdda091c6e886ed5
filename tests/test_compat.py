"""What stands in for a misfit gives what the thing itself should have given."""

from __future__ import annotations

import subprocess
import sys

import torch

from place.compat import permit_nms, read_peak_mib


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    large = b"1" * (1 << 30)
    code = "from place.compat import read_peak_mib; print(read_peak_mib())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read_peak_mib() > len(large) / 2**20
    assert 10 < float(child.stdout) < 900


def test_overlaps_are_suppressed_as_torchvision_says() -> None:
    permit_nms()
    from torchvision.ops import batched_nms, nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 5], [20, 20, 30, 30]])
    scores = torch.tensor([0.8, 0.9, 0.3, 0.1])
    assert nms(boxes, scores, 0.6).tolist() == [1, 2, 3]  # 9/11 goes, 45/105 stays
    assert nms(boxes, scores, 0.4).tolist() == [1, 3]
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 0, 0]), 0.6).tolist() == [1, 0, 2, 3]
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []
