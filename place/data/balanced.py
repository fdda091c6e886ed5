"""Balanced test sets such as CheXpert 5x200: as many images of each of some labels, with none of the others."""

from __future__ import annotations

import hashlib

import pandas as pd

from place.config import RunError
from place.data.layout import SampleRule

_ABSENT = ("0", "")
"""Signs of what is neither positive nor uncertain; an empty cell of CheXpert is a finding that nobody mentioned."""


def take_sample(rule: SampleRule, frame: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, dict[str, int]]:
    """The images of a balanced test set.

    Args:
        frame: a row an image, with `identity` and `label:NAME` as text signs.
        seed: with the identity, orders the images of a label.
    Returns:
        Their rows, in the order of the frame, and how many images there were to take from, by label.
    Raises:
        RunError: fewer images of a label than wanted.
    Source: inferred (GLoRIA, `preprocess_datasets.py`: exactly one positive, all others 0); its draw has no seed, so
        the choice by hash is ours.
    """
    clean = frame[[f"label:{name}" for name in rule.none_of]].isin(_ABSENT).all(axis=1)
    chosen: list[int] = []
    pool = {}
    for name in rule.one_of:
        others = [f"label:{other}" for other in rule.one_of if other != name]
        own = frame[clean & (frame[f"label:{name}"] == "1") & frame[others].isin(_ABSENT).all(axis=1)]
        pool[name] = len(own)
        if len(own) < rule.per_label:
            raise RunError(f"{len(own)} images have {name} alone, {rule.per_label} are wanted; is the table whole?")
        ordered = own["identity"].map(lambda identity: hashlib.sha256(f"{seed}:{identity}".encode()).digest())
        chosen += ordered.sort_values().index[: rule.per_label].tolist()
    return frame.loc[sorted(chosen)].reset_index(drop=True), pool
