"""A tiny configuration and random batches, for tests that need a model but no data."""

from __future__ import annotations

import torch

from place.batch import Batch
from place.config import Config, check_config

TINY = {
    "data": {"image_size_px": 32, "num_workers": 0, "max_sentences": 4, "num_canonical_nodes": 2},
    "model": {
        "vision": {
            "source": "scratch",
            "architecture": "vit_tiny_patch16_224",
            "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        },
        "text": {"source": "scratch", "width": 32, "depth": 1, "num_heads": 2, "dropout": 0.0},
        "observations": {"num_queries": 6, "depth": 1, "num_heads": 2},
        "correlation": {"num_heads": 2, "width": 16},
        "joint_width": 24,
    },
    "optim": {"lr": 1e-3, "lr_scaling": "none", "clip_norm": 0.0},
    "train": {"global_batch": 8, "epochs": 1},
    "engine": {"kind": "torch", "precision": "fp32"},
    "cluster": {"launcher": "local"},
    "run": {"log_every_steps": 1, "tensorboard": False},
}
VOCAB = 40


def build_tiny_config(**sections: dict) -> Config:
    """The tiny configuration with sections laid over it."""
    return check_config(merge(TINY, sections))


def merge(base: dict, over: dict) -> dict:
    """Nested dicts laid over each other."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def build_batch(size: int, seed: int = 0, config: Config | None = None) -> Batch:
    """Random pairs; some reports and sentences are identical, and the numbers of sentences differ."""
    data = (config or build_tiny_config()).data
    rng = torch.Generator().manual_seed(seed)
    sentences, words = data.max_sentences, 3
    counts = torch.randint(1, sentences + 1, (size,), generator=rng)
    owner_BT = torch.full((size, sentences * words + 2), -1)
    for row, count in enumerate(counts.tolist()):
        owner_BT[row, 1 : 1 + count * words] = torch.arange(count).repeat_interleave(words)
    ids_BT = torch.randint(5, VOCAB, owner_BT.shape, generator=rng)
    attention_BT = torch.arange(owner_BT.shape[1])[None] < (counts * words + 2)[:, None]
    hash_BS = torch.randint(1, 12, (size, sentences), generator=rng) * (torch.arange(sentences)[None] < counts[:, None])
    side = data.image_size_px
    return Batch(
        torch.randn(size, 1, side, side, generator=rng),
        ids_BT * attention_BT,
        attention_BT,
        owner_BT,
        hash_BS,
        torch.randint(0, max(2, size - 2), (size,), generator=rng),
        torch.arange(size) + 1000 * seed,
        torch.ones(size, (side // 8) ** 2, dtype=torch.bool),
        attention_BT.sum(1),
        counts,
    )
