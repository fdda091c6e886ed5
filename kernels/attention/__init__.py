"""One attention call for image and text, padded or packed, with three backends chosen by what the device can run."""

from place.kernels.attention.backends import Blocks, has_flash_varlen
from place.kernels.attention.call import attend, attention_weights, choose_backend
from place.kernels.attention.packing import Packing, build_full_packing, build_packing, pack, unpack
from place.kernels.attention.routing import Routed, is_bf16

__all__ = [
    "Blocks",
    "Packing",
    "Routed",
    "attend",
    "attention_weights",
    "build_full_packing",
    "build_packing",
    "choose_backend",
    "has_flash_varlen",
    "is_bf16",
    "pack",
    "unpack",
]
