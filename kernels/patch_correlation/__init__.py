"""Loss between the patch correlations of two feature sets; dispatches to an implementation."""

from __future__ import annotations

from place.kernels.patch_correlation import reference
from torch import Tensor

METHODS = {"reference": reference.patch_corr_loss}


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

    Args:
        x_BND: trained patch features, floating point.
        y_BNT: target patch features or pixels, floating point; its width may differ from x's.
        valid_BN: bool, true on real patches; None takes all.
        focus_BN: bool; only pairs that touch a marked patch count; None takes all pairs.
        normalize: Pearson correlation; false takes the covariance over the width.
        loss: `mse` or `smooth_l1` with its `beta`.
        exclude_diag: leave out pairs of a patch with itself.
        eps_x, eps_y: a patch counts only if its standard deviation over the width is above eps on both sides.
        reduction: `pairs` (mean over all pairs), `image` (mean per image, summed over images that have pairs) or
            `none` (one mean per image, 0 where there is no pair).
        method: `auto` or a key of `METHODS`.
    Returns:
        (loss, count): count is the number of pairs (`pairs`), of images with pairs (`image`), or pairs per image
        (`none`). For `image` the caller divides, so that ranks can divide by the count of all.
    Raises:
        ValueError: unknown loss, reduction or method, or shapes that do not fit.
    Source: inferred (PLACE's abstract: correlations among image patches); the form is ours.
    """
    if method == "auto":
        method = "reference"
    if method not in METHODS:
        raise ValueError(f"patch_corr_loss: method '{method}', expected auto or one of {sorted(METHODS)}")
    if x_BND.shape[:2] != y_BNT.shape[:2]:
        raise ValueError(f"patch_corr_loss: x is {tuple(x_BND.shape)}, y is {tuple(y_BNT.shape)}; B and N must agree")
    return METHODS[method](
        x_BND, y_BNT, valid_BN, focus_BN, normalize, loss, beta, exclude_diag, eps_x, eps_y, reduction
    )
