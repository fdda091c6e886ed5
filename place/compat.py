"""Misfits of our stack and of the systems it runs on, put right in one place."""

import contextlib
import importlib.util
import resource
from pathlib import Path

import torch
from torch import Tensor

_library: torch.library.Library | None = None


def patch_torchvision() -> None:
    """Stand in for torchvision's compiled operators where its CUDA wheel stands beside a CPU build of torch.

    The wheel's Python part asks for two schemas at import and dies without; `nms` gets a form in plain torch, the
    decoders stay unusable. Where the wheel fits, nothing is done. Call it before timm, streaming or torchvision are
    imported. Source: ours.
    """
    global _library
    if torch.version.cuda is not None or _library is not None:
        return
    found = importlib.util.find_spec("torchvision")
    for folder in found.submodule_search_locations or () if found else ():
        for compiled in Path(folder).glob("_C.*"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(compiled))
                return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", _suppress_overlaps, "CPU")


def permit_nms() -> None:
    """Let torchvision's nms be called where `patch_torchvision` stands in for it; imports torchvision, hence Triton."""
    patch_torchvision()
    import torchvision.extension

    if _library is not None:
        # nms asks this first; of the operators behind it, it is the only one that we call.
        torchvision.extension._has_ops = lambda: True


def _suppress_overlaps(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Boxes (P,4) that are kept, the surest first: none overlaps a kept, surer one by more than the threshold."""
    from torchvision.ops import box_iou

    order_P = scores.argsort(descending=True, stable=True)
    overlap_PP = box_iou(dets[order_P], dets[order_P]) > iou_threshold
    kept_P = torch.ones(len(order_P), dtype=torch.bool)
    for row in range(len(order_P)):
        if kept_P[row]:
            kept_P[row + 1 :] &= ~overlap_PP[row, row + 1 :]
    return order_P[kept_P]


def read_peak_mib() -> float:
    """The most resident memory of this process so far, in MiB.

    On Linux `ru_maxrss` also holds what the parent had when it forked; VmHWM starts anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
