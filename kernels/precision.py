"""Precision that does not depend on the caller's autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def leave_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, products are in the precision of their factors; a device without autocast, such as meta, has none."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
