"""Vision encoders of timm and Hugging Face, from a folder or by name: no pickle, no remote code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from place.compat import patch_torchvision
from place.config import UsageError
from place.evaluation.frozen import FrozenEncoder
from place.model.vision import VisionTokens
from place.pretrained.load import is_export

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MAX_PREFIX = 16
"""Most class, distillation and register tokens before the patches."""
FORMS = "timm:NAME, timm:FOLDER, hf:NAME, hf:FOLDER or a folder of `place export`, timm or transformers"


class TimmVision(nn.Module):
    """A timm model: its own pooled features, and its last feature map or tokens as patches."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image_BCYX: Tensor) -> VisionTokens:
        model: Any = self.model
        features = model.forward_features(image_BCYX)
        image_BD = model.forward_head(features, pre_logits=True)
        if features.ndim == 4:  # convolutional (B,D,Y,X), or windowed (B,Y,X,D)
            is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
            return VisionTokens(image_BD, features.flatten(1, 2) if is_last else _to_tokens(features))
        return VisionTokens(image_BD, features[:, model.num_prefix_tokens :])


class HfVision(nn.Module):
    """A transformers vision model; its pooler counts only if its weights were trained, else the class token does.

    Args:
        has_pooler: whether `pooler_output` is made of loaded weights.
        num_prefix: tokens before the patches; none where the output is a feature map.
    """

    def __init__(self, model: PreTrainedModel, has_pooler: bool, num_prefix: int | None):
        super().__init__()
        self.model, self.has_pooler, self.num_prefix = model, has_pooler, num_prefix

    def forward(self, image_BCYX: Tensor) -> VisionTokens:
        output = self.model(pixel_values=image_BCYX)
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        patches_BND = _to_tokens(hidden) if hidden.ndim == 4 else hidden[:, self.num_prefix :]
        if self.has_pooler and pooled is not None:
            return VisionTokens(pooled.flatten(1), patches_BND)
        return VisionTokens(hidden[:, 0] if self.num_prefix else patches_BND.mean(1), patches_BND)


def find_kind(source: str) -> tuple[str, str]:
    """`timm`, `hf` or `place`, and the name or folder. Raises UsageError where it is none of them."""
    kind, colon, rest = source.partition(":")
    if colon and kind in ("timm", "hf") and rest:
        return kind, rest
    if is_export(source):
        return "place", source
    tree = _read_json(Path(source) / "config.json") if Path(source).is_dir() else {}
    if "architecture" in tree:
        return "timm", source
    if "model_type" in tree:
        return "hf", source
    raise UsageError(f"--encoder {source}: no encoder was found there; give {FORMS}")


def load_foreign(source: str, random_weights: bool = False) -> FrozenEncoder:
    """Load an encoder that is not ours.

    Args:
        source: one of `FORMS`, ours apart.
        random_weights: draw the weights with seed 0 instead of loading them; the name says so.
    Raises:
        UsageError: nothing there, no safetensors, weights that do not fit, or an output without a square of patches.
    Source: ours.
    """
    patch_torchvision()
    kind, place = find_kind(source)
    if Path(place).is_dir() and not random_weights and not list(Path(place).glob("model*.safetensors*")):
        raise UsageError(f"--encoder {source}: the folder has no model.safetensors; other formats are not read")
    shown = f"{kind}:{Path(place).name if Path(place).is_dir() else place}"
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            load = _load_timm if kind == "timm" else _load_hf
            return load(shown + (" (random weights)" if random_weights else ""), place, random_weights)
    except UsageError as error:
        raise UsageError(f"--encoder {source}: {error}") from None
    except Exception as error:  # noqa: BLE001 both libraries raise anything from KeyError to their own for what a user got wrong
        why = " ".join(str(error).split())[:240] or type(error).__name__
        raise UsageError(
            f"--encoder {source}: {why}; give a local folder, or --random-weights for a baseline"
        ) from None


def _load_timm(name: str, place: str, random_weights: bool) -> FrozenEncoder:
    import timm
    from timm.data import resolve_model_data_config

    where = f"local-dir:{place}" if Path(place).is_dir() else place
    model = timm.create_model(where, pretrained=not random_weights, num_classes=0).eval()
    data = resolve_model_data_config(model)
    channels, size_px, _ = data["input_size"]
    return _finish(name, TimmVision(model), size_px, channels, data["mean"], data["std"])


def _load_hf(name: str, place: str, random_weights: bool) -> FrozenEncoder:
    from transformers import AutoConfig, AutoModel
    from transformers.image_processing_utils import BaseImageProcessor

    local = Path(place).is_dir()
    config = AutoConfig.from_pretrained(place, local_files_only=local, trust_remote_code=False)
    processor, _ = BaseImageProcessor.get_image_processor_dict(place, local_files_only=local)
    missing: list[str] = []
    if random_weights:
        whole = AutoModel.from_config(config, trust_remote_code=False)
    else:
        whole, told = AutoModel.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False, local_files_only=local, output_loading_info=True
        )
        missing = list(told["missing_keys"])
    model = getattr(whole, "vision_model", whole).eval()  # of CLIP and its like only the image's half
    config = model.config
    lost = [key for key in missing if "pooler" not in key and "text_model" not in key]
    if lost:
        raise UsageError(f"the weights lack {len(lost)} tensors of the model, such as {lost[0]}")
    size_px = read_size(processor, config)
    channels = int(getattr(config, "num_channels", 3))
    mean, std = ([0.0], [1.0])
    if processor.get("do_normalize", True):
        mean, std = (_fit_channels(processor[key], channels) for key in ("image_mean", "image_std"))
    has_pooler = not any("pooler" in key for key in missing)
    prefix = _count_prefix(model, config, size_px, channels)
    return _finish(name, HfVision(model, has_pooler, prefix), size_px, channels, mean, std)


def read_size(processor: dict[str, Any], config: PretrainedConfig) -> int:
    """Side of the square that a transformers image processor makes, in pixels; else the model's own."""
    for size in (processor.get("crop_size"), processor.get("size")):
        if isinstance(size, int):
            return size
        if isinstance(size, dict):
            return int(size.get("height") or size["shortest_edge"])
    return int(config.image_size)


def _count_prefix(model: nn.Module, config: PretrainedConfig, size_px: int, channels: int) -> int | None:
    """Tokens before the patches of a token sequence; none of a feature map."""
    with torch.inference_mode():
        hidden = model(pixel_values=torch.zeros(1, channels, size_px, size_px)).last_hidden_state
    if hidden.ndim == 4:
        return None
    patch_px = getattr(config, "patch_size", None)
    if isinstance(patch_px, int) and 0 <= (prefix := hidden.shape[1] - (size_px // patch_px) ** 2) <= MAX_PREFIX:
        return prefix
    return 0


def _finish(name: str, vision: nn.Module, size_px: int, channels: int, mean: Any, std: Any) -> FrozenEncoder:
    """Try the encoder on an empty image: what it gives decides the patch."""
    with torch.inference_mode():
        tokens = vision.eval()(torch.zeros(1, channels, size_px, size_px))
    side = math.isqrt(tokens.patches_BND.shape[1])
    if tokens.patches_BND.ndim != 3 or side**2 != tokens.patches_BND.shape[1] or tokens.image_BD.ndim != 2:
        raise UsageError(f"its {tokens.patches_BND.shape[1]} patches are no square; take another encoder")
    mean, std = (tuple(map(float, _fit_channels(values, channels))) for values in (mean, std))
    return FrozenEncoder(name, vision, size_px, channels, mean, std, round(size_px / side))


def _fit_channels(values: Any, channels: int) -> list[float]:
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    if len(values) not in (1, channels):
        raise UsageError(f"{len(values)} means for {channels} channels; mend the folder's own configuration")
    return values * (channels // len(values))


def _to_tokens(map_BDYX: Tensor) -> Tensor:
    return map_BDYX.flatten(2).transpose(1, 2)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
