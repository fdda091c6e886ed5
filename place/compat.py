"""Misfits of our stack and of the systems it runs on, put right in one place."""

import resource
from pathlib import Path

import torch

_library: torch.library.Library | None = None


def patch_torchvision() -> None:
    """Declare torchvision's two compiled operators where its CUDA wheel stands beside a CPU build of torch.

    The wheel's Python part asks for their schemas at import and dies without; its decoders and nms stay unusable.
    Call it before timm, streaming or torchvision are imported. Source: ours.
    """
    global _library
    if torch.version.cuda is not None or _library is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def read_peak_mib() -> float:
    """The most resident memory of this process so far, in MiB.

    On Linux `ru_maxrss` also holds what the parent had when it forked; VmHWM starts anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
