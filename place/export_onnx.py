"""The vision encoder as ONNX, for runtimes without torch; it is kept only if it gives what torch gives."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from place.config import RunError, UsageError
from place.model.vision import ImageEncoder

OPSET = 18
MAX_ERROR = 1e-4
INPUT, OUTPUTS = "pixel_values", ("image", "patches")
CHECKED_BATCHES, CHECKED_INPUTS = (1, 3), 3


class _Traced(nn.Module):
    """The encoder with plain outputs."""

    def __init__(self, vision: ImageEncoder):
        super().__init__()
        self.vision = copy.deepcopy(vision).cpu().float().eval()
        self.vision.attention = "sdpa"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vision(pixel_values)
        return tokens.image_BD, tokens.patches_BND


def require_onnx() -> None:
    """Raise UsageError where a package of the extra is missing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UsageError(f"--onnx needs {', '.join(missing)}; run `pip install -c constraints.txt -e .[onnx]`")


def write_onnx(vision: ImageEncoder, size_px: int, path: Path) -> str:
    """Write the encoder: `pixel_values` (B,1,size,size), standardised, to `image` (B,D) and `patches` (B,N,D).

    The batch is free, the size is fixed. Returns a note.
    Raises:
        RunError: onnxruntime differs from torch by more than `MAX_ERROR`.
    Source: ours.
    """
    traced = _Traced(vision).eval()
    program = torch.onnx.export(
        traced,
        (torch.zeros(2, 1, size_px, size_px),),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
        verbose=False,
    )
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=False)
    error = compute_error(traced, size_px, path)
    if not error <= MAX_ERROR:
        raise RunError(f"{path.name}: onnxruntime differs from torch by {error:.1e}, more than {MAX_ERROR:.0e}")
    return f"{path.parent.name}/{path.name}: opset {OPSET}, any batch; at most {error:.1e} from torch in onnxruntime"


@torch.inference_mode()
def compute_error(traced: nn.Module, size_px: int, path: Path) -> float:
    """Largest difference of any output from torch, over several standardised inputs and batch sizes."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng, errors = torch.Generator().manual_seed(0), []
    for batch in CHECKED_BATCHES:
        for _ in range(CHECKED_INPUTS):
            image_BCYX = torch.randn(batch, 1, size_px, size_px, generator=rng)
            found = session.run(list(OUTPUTS), {INPUT: image_BCYX.numpy()})
            for ours, theirs in zip(found, traced(image_BCYX), strict=True):
                errors.append(float((torch.from_numpy(ours) - theirs).abs().max()))
    return max(errors)
