"""One known misfit of our pinned stack, put right before the libraries that trip over it are imported."""

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
