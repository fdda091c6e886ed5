"""What a forward pass holds for its backward pass and what it computes: found on fake tensors, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from place.batch import Batch
from place.config import Config
from place.model.place import PlaceModel
from place.model.text import build_report_encoder
from place.model.vision import build_image_encoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PARTS = ("vision", "text", "heads")
# Published encoders of BERT base's shape; only the vocabulary differs.
VOCABULARIES = {"emilyalsentzer/Bio_ClinicalBERT": 28996, "microsoft/BiomedVLP-CXR-BERT-specialized": 30522}


class Part(NamedTuple):
    """Parameters of a part; bytes it holds whatever the batch, bytes and forward FLOPs of each pair."""

    parameters: int
    fixed_bytes: int
    pair_bytes: int
    pair_flops: int

    def count_held(self, pairs: int) -> int:
        """Bytes held for the backward pass of so many pairs."""
        return self.fixed_bytes + pairs * self.pair_bytes


class Footprint(NamedTuple):
    """`parts` by name of PARTS; bytes of one pair: of inputs, of outputs, of the largest tensor held.

    `sizes` holds the elements of each parameter, `patches` counts those of an image, `target_width` is what the
    correlation loss compares of each: pixels or features.
    """

    parts: dict[str, Part]
    input_bytes: int
    output_bytes: int
    largest_bytes: int
    sizes: list[int]
    patches: int
    target_width: int
    assumed: list[str]

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(self.sizes)

    def count_small(self, limit: int) -> int:
        """Elements of all parameters of at most `limit` elements."""
        return sum(size for size in self.sizes if size <= limit)


def measure_footprint(config: Config) -> Footprint:
    """Build the model without weights and follow two forward passes of it, of one pair and of two.

    Every tensor that autograd saves is counted once, by storage; attention counts as a fused kernel, which saves its
    inputs, its output and a log-sum-exp. Reports are as long as data.max_tokens. Activation checkpointing is left out:
    `place.cluster.budget` accounts for it.

    Raises:
        UsageError: the model cannot be built as configured.
    Source: ours; FLOPs are those of torch.utils.flop_counter.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    engine = config.engine.model_copy(update={"activation_checkpointing": False})
    definition, vocab_size, assumed = find_report_encoder(config)
    model = build_without_weights(config.model_copy(update={"engine": engine}), definition, vocab_size)
    # Full reports are as long packed as padded; how long others are, fake tensors do not know.
    model.text.first_position = None
    with FakeTensorMode():
        # Moved by shape: fake tensors know no values, and timm and transformers ask for some while they build.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        one, two = (_follow(model, config, pairs) for pairs in (1, 2))
    parts = {}
    for name in PARTS:
        per_pair = two.held[name] - one.held[name]
        numbers = (
            _count_parameters(model, name),
            one.held[name] - per_pair,
            per_pair,
            two.flops[name] - one.flops[name],
        )
        parts[name] = Part(*numbers)
    sizes = [parameter.numel() for parameter in model.parameters()]
    patches = (config.data.image_size_px // model.vision.patch_px) ** 2
    given = one.input_bytes, one.output_bytes, one.largest_bytes
    return Footprint(parts, *given, sizes, patches, one.target_width, assumed)


class _Pass(NamedTuple):
    held: dict[str, int]
    flops: dict[str, int]
    input_bytes: int
    output_bytes: int
    largest_bytes: int
    target_width: int


def _follow(model: PlaceModel, config: Config, pairs: int) -> _Pass:
    """One forward pass on fake tensors."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = _build_batch(config, pairs, model.vision.patch_px)
    own = {_key(tensor) for tensor in (*batch, *model.parameters(), *model.buffers())}
    held: dict[str, dict[int, Tensor]] = {name: {} for name in PARTS}
    flops = dict.fromkeys(PARTS, 0)
    attention = _FusedAttention()
    seen: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own | seen:
            seen.add(_key(tensor))
            held[where[0]][_key(tensor)] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, attention, _mark_parts(model) as where:
        where[1] = lambda: counter.get_total_flops() + attention.flops
        where[2] = flops
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision != "fp32"),
        ):
            outputs = model.train()(batch)
        flops["heads"] = where[1]() - flops["vision"] - flops["text"]
    sizes = {name: [_count_bytes(tensor) for tensor in tensors.values()] for name, tensors in held.items()}
    return _Pass(
        {name: sum(found) for name, found in sizes.items()},
        flops,
        sum(_count_bytes(tensor) for tensor in batch),
        sum(_count_bytes(tensor) for tensor in outputs[:-1]),
        max(max(found, default=0) for found in sizes.values()),
        outputs.target_BND.shape[-1],
    )


@contextmanager
def _mark_parts(model: PlaceModel) -> Iterator[list[Any]]:
    """A list whose first entry names the part that runs; FLOPs of the encoders go into its third."""
    where: list[Any] = ["heads", None, None]
    began = [0]

    def enter(name: str) -> None:
        where[0], began[0] = name, where[1]()

    def leave(name: str) -> None:
        where[0] = "heads"
        where[2][name] += where[1]() - began[0]

    hooks = []
    for name in ("vision", "text"):
        encoder = getattr(model, name)
        hooks.append(encoder.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(encoder.register_forward_hook(lambda *_, name=name: leave(name)))
    try:
        yield where
    finally:
        for hook in hooks:
            hook.remove()


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel saves and computes it; a fake mask, whose values nobody knows, is not all true."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return False
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
        q_BHQD, k_BHKD, v_BHKD = given["query"], given["key"], given["value"]
        self.flops += 4 * q_BHQD.numel() * k_BHKD.shape[-2]
        return _SavesLikeFlash.apply(q_BHQD, k_BHKD, v_BHKD)


class _SavesLikeFlash(torch.autograd.Function):
    """An attention that computes nothing and saves what FlashAttention saves."""

    @staticmethod
    def forward(ctx: Any, q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor) -> Tensor:
        out_BHQD = torch.empty_like(q_BHQD)
        lse_BHQ = q_BHQD.new_empty(q_BHQD.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q_BHQD, k_BHKD, v_BHKD, out_BHQD, lse_BHQ)
        return out_BHQD


def build_without_weights(config: Config, definition: PretrainedConfig | None, vocab_size: int) -> PlaceModel:
    """The model on the meta device.

    Args:
        definition, vocab_size: see `build_report_encoder`.
    Raises:
        UsageError: the model cannot be built as configured.
    Source: ours.
    """
    with torch.device("meta"):
        vision = build_image_encoder(config.model.vision, config.data.image_size_px, with_weights=False)
        text = build_report_encoder(config.model.text, vocab_size, config.data.max_tokens, "sdpa", definition)
        return PlaceModel(config, vision, text, "sdpa")


def find_report_encoder(config: Config) -> tuple[PretrainedConfig | None, int, list[str]]:
    """The report encoder's definition: its folder's, or that of BERT base where it is not on this machine."""
    from transformers import AutoConfig, BertConfig

    source, tokens = config.model.text.source, f"data.max_tokens={config.data.max_tokens} tokens"
    said = f"reports of {tokens} (shorter ones cost less where they are packed)"
    if source == "scratch":
        vocab_size = config.model.text.vocab_size
        return None, vocab_size, [said, f"a vocabulary of model.text.vocab_size={vocab_size}"]
    if (Path(source) / "config.json").is_file():
        return AutoConfig.from_pretrained(source), 0, [said]
    vocab_size = VOCABULARIES.get(source, 30522)
    assumed = f"{source} has BERT base's shape and {vocab_size} entries (no such folder here)"
    return BertConfig(vocab_size=vocab_size), 0, [said, assumed]


def _build_batch(config: Config, pairs: int, patch_px: int) -> Batch:
    data = config.data
    tokens, patches = (pairs, data.max_tokens), (pairs, (data.image_size_px // patch_px) ** 2)
    return Batch(
        torch.empty(pairs, 1, data.image_size_px, data.image_size_px),
        torch.zeros(tokens, dtype=torch.long),
        torch.ones(tokens, dtype=torch.bool),
        torch.zeros(tokens, dtype=torch.long),
        torch.zeros(pairs, data.max_sentences, dtype=torch.long),
        torch.zeros(pairs, dtype=torch.long),
        torch.zeros(pairs, dtype=torch.long),
        torch.ones(patches, dtype=torch.bool),
        torch.full((pairs,), data.max_tokens),
        torch.full((pairs,), data.max_sentences),
    )


def _count_parameters(model: PlaceModel, name: str) -> int:
    encoders = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision", "text")}
    if name in encoders:
        return encoders[name]
    return sum(p.numel() for p in model.parameters()) - sum(encoders.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _count_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
