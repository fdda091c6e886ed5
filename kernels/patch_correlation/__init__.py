"""Loss between the patch correlations of two feature sets; dispatches to an implementation."""

from __future__ import annotations

import torch
from place.kernels.patch_correlation import reference
from place.kernels.patch_correlation.autograd import has_triton, patch_corr
from place.kernels.patch_correlation.reference import Options
from place.kernels.precision import leave_autocast
from torch import Tensor

METHODS = ("auto", "tiled", "gram", "reference")
LOSSES = ("mse", "smooth_l1")
REDUCTIONS = ("pairs", "image", "none")
HALVES_AND_FLOAT = (torch.bfloat16, torch.float16, torch.float32)


def patch_corr_loss(
    x_BND: Tensor,
    y_BNT: Tensor,
    *,
    valid_BN: Tensor | None = None,
    focus_BN: Tensor | None = None,
    normalize: bool = True,
    loss: str = "mse",
    beta: float = 0.1,
    exclude_diag: bool = True,
    eps_x: float = 1e-6,
    eps_y: float = 1e-6,
    reduction: str = "image",
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Distance between the patch-by-patch correlation matrices of x and y, a mean per image over pairs i != j.

    Autocast changes nothing in it.

    Args:
        x_BND: patch features, floating point.
        y_BNT: target patch features (floating point) or pixels (also int8 or uint8); its width may differ from x's.
            Gradients flow to both sides.
        valid_BN: bool, true on real patches; None takes all.
        focus_BN: bool; only pairs that touch a marked patch count; None takes all pairs.
        normalize: Pearson correlation; false takes the covariance over the width.
        loss: `mse` or `smooth_l1` with its `beta`.
        exclude_diag: leave out pairs of a patch with itself.
        eps_x, eps_y: a patch counts only if its standard deviation over the width is above eps on both sides.
        reduction: `pairs` (mean over all pairs), `image` (mean per image, summed over images that have pairs) or
            `none` (one mean per image, 0 where there is no pair).
        method: `tiled` (Triton on a GPU, row panels in torch elsewhere), `gram` (mean squares without an N x N
            matrix), `reference` (the definition) or `auto`: see `choose_implementation`.
    Returns:
        (loss, count): count is the number of pairs (`pairs`), of images with pairs (`image`), or pairs per image
        (`none`). For `image` the caller divides, so that ranks can divide by the count of all.
    Raises:
        ValueError: unknown loss, reduction or method, or shapes or types that do not fit.
    Source: inferred (PLACE's abstract: correlations among image patches); the form is ours.
    """
    _check_names(loss, beta, reduction, method)
    _check_tensors(x_BND, y_BNT, valid_BN, focus_BN)
    options = Options(normalize, loss, beta, exclude_diag, eps_x, eps_y)
    implementation = choose_implementation(x_BND, y_BNT, loss, method)
    if implementation == "reference":
        with leave_autocast(x_BND.device.type):
            total_B, pairs_B = reference.sum_distances(x_BND, y_BNT, valid_BN, focus_BN, options)
    else:
        total_B, pairs_B = patch_corr(x_BND, y_BNT, valid_BN, focus_BN, *options, implementation)
    return reference.reduce_images(total_B, pairs_B, reduction)


def choose_implementation(x_BND: Tensor, y_BNT: Tensor, loss: str, method: str) -> str:
    """`triton`, `chunked`, `gram` or `reference`.

    What is tiled runs in Triton on a GPU, and in plain torch on a CPU, in fp64, or without Triton. There `auto` takes
    `gram` for mean squares once N is at least twice D + Dt: it then does at most a third of the products. On a GPU its
    many small calls cost more than the products.

    Raises:
        ValueError: `gram` for another loss than `mse`.
    Source: ours; the arithmetic stands in kernels/README.md.
    """
    if method == "gram" and loss != "mse":
        raise ValueError(f"patch_corr_loss: method 'gram' computes mse only, loss is '{loss}'; use auto or tiled")
    if method in ("gram", "reference"):
        return method
    types = (*HALVES_AND_FLOAT, torch.int8, torch.uint8)
    if x_BND.is_cuda and has_triton() and x_BND.dtype in HALVES_AND_FLOAT and y_BNT.dtype in types:
        return "triton"
    wide = x_BND.shape[1] >= 2 * (x_BND.shape[2] + y_BNT.shape[2])
    return "gram" if method == "auto" and loss == "mse" and wide else "chunked"


def _check_names(loss: str, beta: float, reduction: str, method: str) -> None:
    given = {"loss": (loss, LOSSES), "reduction": (reduction, REDUCTIONS), "method": (method, METHODS)}
    for name, (value, known) in given.items():
        if value not in known:
            raise ValueError(f"patch_corr_loss: {name} '{value}', expected one of {', '.join(known)}")
    if loss == "smooth_l1" and not beta > 0:
        raise ValueError(f"patch_corr_loss: beta {beta}, expected more than 0")


def _check_tensors(x_BND: Tensor, y_BNT: Tensor, valid_BN: Tensor | None, focus_BN: Tensor | None) -> None:
    if x_BND.dim() != 3 or y_BNT.dim() != 3 or x_BND.shape[:2] != y_BNT.shape[:2]:
        raise ValueError(f"patch_corr_loss: x is {tuple(x_BND.shape)}, y is {tuple(y_BNT.shape)}; B and N must agree")
    if not x_BND.is_floating_point():
        raise ValueError(f"patch_corr_loss: x is {x_BND.dtype}, expected floating point")
    for name, mask_BN in (("valid", valid_BN), ("focus", focus_BN)):
        if mask_BN is not None and (mask_BN.dtype != torch.bool or mask_BN.shape != x_BND.shape[:2]):
            raise ValueError(
                f"patch_corr_loss: {name} is {mask_BN.dtype} {tuple(mask_BN.shape)}, "
                f"expected bool {tuple(x_BND.shape[:2])}"
            )
