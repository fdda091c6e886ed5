"""Image encoder: a timm vision transformer over one grey channel."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from place.compat import patch_torchvision
from place.config import UsageError, VisionConfig
from place.kernels.attention import Routed, is_bf16

if TYPE_CHECKING:
    from timm.models import VisionTransformer


OWN_ARGS = {"in_chans", "num_classes", "img_size", "dynamic_img_size", "global_pool", "fc_norm", "use_fc_norm"}
"""Arguments of timm that are not the architecture's: what is set for grey images of any size and without pooling."""


class VisionTokens(NamedTuple):
    """`image_BD` image summary and `patches_BND` localised tokens, row by row."""

    image_BD: Tensor
    patches_BND: Tensor


class ImageEncoder(nn.Module):
    """A timm ViT that gives a summary of the image and its patch tokens, and can hide patches."""

    attention = "sdpa"
    """Backend of its attention, a key of `place.kernels.attention`'s."""

    def __init__(self, vit: VisionTransformer, patch_px: int, pooling: str):
        super().__init__()
        self.vit = vit
        # Called as a module, not as a method, so that ZeRO-3's hooks see its class token and position embeddings used.
        vit.forward = vit.forward_features
        self.patch_px, self.pooling = patch_px, pooling
        self.width: int = vit.embed_dim
        if isinstance(getattr(vit, "norm_pre", None), nn.Module):
            vit.norm_pre.register_forward_hook(_begin_stream)

    @property
    def head_sizes(self) -> set[int]:
        """Widths of its attention heads; none in an encoder without blocks."""
        return {block.attn.head_dim for block in self.vit.blocks}

    def forward(self, image_BCYX: Tensor, hidden_BN: Tensor | None = None) -> VisionTokens:
        """Encode (B,1,Y,X); patches where `hidden_BN` is true are shown as the mean grey, which is 0."""
        if hidden_BN is not None:
            image_BCYX = image_BCYX * ~_to_pixels(hidden_BN, image_BCYX, self.patch_px)
        with Routed(self.attention):
            tokens = self.vit(image_BCYX)
        patches_BND = tokens[:, self.vit.num_prefix_tokens :]
        return VisionTokens(tokens[:, 0] if self.pooling == "cls" else patches_BND.mean(1), patches_BND)


def _begin_stream(_: nn.Module, __: tuple[Tensor, ...], tokens_BND: Tensor) -> Tensor:
    """Tokens as they enter the first block, in bf16 under bf16 autocast: what blocks add to them is bf16."""
    return tokens_BND.bfloat16() if is_bf16(tokens_BND.device.type) else tokens_BND


def _to_pixels(patch_BN: Tensor, image_BCYX: Tensor, patch_px: int) -> Tensor:
    """A value a patch as a value a pixel, (B,1,Y,X)."""
    rows, columns = image_BCYX.shape[-2] // patch_px, image_BCYX.shape[-1] // patch_px
    grid = patch_BN.view(-1, 1, rows, columns)
    return grid.repeat_interleave(patch_px, -2).repeat_interleave(patch_px, -1)


def patchify(image_BCYX: Tensor, patch_px: int) -> Tensor:
    """Pixels of each patch, (B,N,patch_px squared), row by row."""
    # unfold would start two kernels for each image of a batch.
    grid = image_BCYX.unflatten(-1, (-1, patch_px)).unflatten(-3, (-1, patch_px))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def build_image_encoder(config: VisionConfig, image_size_px: int, with_weights: bool = True) -> ImageEncoder:
    """Build the image encoder from `timm:NAME`, a local folder or from scratch.

    Args:
        with_weights: false builds the architecture alone, because a checkpoint is loaded next.
    Raises:
        UsageError: no weights where asked for, an unknown architecture, no class token where it is to stand for the
            image, or a patch that does not divide the image.
    Source: ours.
    """
    patch_torchvision()
    vit = _build_vit(config, image_size_px, with_weights)
    if config.pooling == "cls" and getattr(vit, "cls_token", None) is None:
        name = config.architecture if config.source == "scratch" else config.source
        raise UsageError(f"model.vision.pooling=cls: {name} has no class token; set model.vision.pooling=mean")
    _leave_pooling_out(vit)
    patch_px = int(vit.patch_embed.feat_ratio(as_scalar=True))
    if image_size_px % patch_px:
        raise UsageError(f"data.image_size_px={image_size_px} is not divisible by the encoder's patch of {patch_px} px")
    return ImageEncoder(vit, patch_px, config.pooling)


def _leave_pooling_out(vit: VisionTransformer) -> None:
    """Drop what timm does from its pooling on, but keep a norm from there for all tokens where they have no other."""
    if isinstance(vit.norm, nn.Identity):
        vit.norm = vit.fc_norm
    vit.fc_norm, vit.attn_pool = nn.Identity(), None


def _build_vit(config: VisionConfig, image_size_px: int, with_weights: bool) -> VisionTransformer:
    import timm
    from safetensors import SafetensorError

    size = {"in_chans": 1, "num_classes": 0, "img_size": image_size_px, **config.overrides, "dynamic_img_size": True}
    if config.stem == "conv" and config.source != "scratch":
        raise UsageError(
            "model.vision.stem=conv needs model.vision.source=scratch: pretrained weights have no such stem"
        )
    try:
        if config.source == "scratch":
            return _build_from_scratch(config, size)
        if Path(config.source).is_dir():
            return timm.create_model(f"local-dir:{config.source}", pretrained=with_weights, **size)
        if config.source.startswith("timm:"):
            name = config.source.removeprefix("timm:")
            return timm.create_model(name, pretrained=with_weights, **size)
    except UsageError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AssertionError, SafetensorError) as error:
        raise UsageError(f"model.vision.source={config.source}: {_one_line(error)}") from None
    raise UsageError(
        f"model.vision.source={config.source} is neither a folder, nor timm:NAME, nor scratch; "
        "give a folder with config.json and model.safetensors"
    )


def read_model_args(source: str) -> dict[str, Any]:
    """What a local folder says of its architecture beyond the name, such as its width; empty for other sources."""
    path = Path(source) / "config.json"
    args = json.loads(path.read_text()).get("model_args", {}) if path.is_file() else {}
    return {name: value for name, value in args.items() if name not in OWN_ARGS}


def _build_from_scratch(config: VisionConfig, size: dict[str, int | float]) -> VisionTransformer:
    import timm
    from timm.layers import HybridEmbed

    if config.stem == "patch":
        return timm.create_model(config.architecture, **size)
    patch_px, width = int(size.get("patch_size", 16)), int(size.get("embed_dim", 768))
    embed = functools.partial(HybridEmbed, backbone=ConvStem(patch_px, width), proj=False)
    return timm.create_model(config.architecture, embed_layer=embed, **{**size, "patch_size": 1})


class ConvStem(nn.Sequential):
    """Strided convolutions, a residual one after each but the first: (B,1,Y,X) to (B,D,Y/patch,X/patch).

    Source: inferred (Xiao et al. 2021, 'Early convolutions help transformers see better'); residuals are ours.
    """

    def __init__(self, patch_px: int, width: int):
        steps = int(math.log2(patch_px))
        if 2**steps != patch_px:
            raise UsageError(f"model.vision.overrides.patch_size={patch_px}: the conv stem needs a power of two")
        layers: list[nn.Module] = []
        channels = 1
        for step in range(steps):
            out = max(8, width >> (steps - 1 - step))
            kernel = 3 if step else 5
            layers += [nn.Conv2d(channels, out, kernel, 2, kernel // 2), nn.GroupNorm(1, out), nn.GELU()]
            if step:  # at the first step's size a residual would cost as much as all others
                layers.append(ConvResidual(out))
            channels = out
        super().__init__(*layers)


class ConvResidual(nn.Module):
    """x + conv(gelu(norm(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(nn.functional.gelu(self.norm(x)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
