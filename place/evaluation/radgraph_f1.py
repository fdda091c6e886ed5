"""RadGraph F1: entities and relations that a generated report shares with its reference, by a model the user has."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from place.config import UsageError
from place.evaluation.metrics import Array

KINDS = ("radgraph", "radgraph-xl", "modern-radgraph-xl")
LEVELS = ("simple", "partial", "complete")
"""Entities; entities and whether they have a relation, which most papers report; entities with their relations."""


class RadGraphF1:
    """The package `radgraph` with the model of a folder; a report is read once. Source: quoted (radgraph 0.1.18)."""

    def __init__(self, folder: str):
        """Load a folder that the package unpacked: config.json, vocabulary, weights.th. Raises UsageError."""
        path = Path(folder)
        if path.name not in KINDS or not (path / "weights.th").is_file():
            raise UsageError(
                f"evaluation.generation.radgraph={folder}: expected a folder called {', '.join(KINDS[:-1])} or "
                f"{KINDS[-1]} with config.json, vocabulary and weights.th"
            )
        try:
            from radgraph import RadGraph
        except ImportError:
            raise UsageError(
                "evaluation.generation.radgraph: the package is not installed; "
                "pip install -c constraints.txt -e .[clinical]"
            ) from None
        try:
            # On a CPU the package reads weights without pickle's code; it tells its device with print.
            with contextlib.redirect_stdout(io.StringIO()):
                self._model = RadGraph(model_type=path.name, model_cache_dir=str(path.parent), cuda=-1)
        except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"evaluation.generation.radgraph={folder}: {' '.join(str(error).split())[:200]}; model_name in its "
                "config.json may be the folder of the BERT that it names"
            ) from None
        self._known: dict[str, dict[str, Any]] = {}

    def score(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, Array]:
        """F1 (B,) of each of `LEVELS`; an empty report scores 0."""
        from radgraph.rewards import compute_reward

        self._read([text for text in (*generated, *references) if text])
        rows = [
            compute_reward(self._known[said], self._known[true], "all") if said and true else (0.0,) * len(LEVELS)
            for said, true in zip(generated, references, strict=True)
        ]
        return dict(zip(LEVELS, np.array(rows, np.float64).T, strict=True))

    def _read(self, texts: Sequence[str]) -> None:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            read = self._model(new)
            # What the package could not read it leaves out, with a traceback.
            self._known |= {text: read.get(str(row), {"entities": {}}) for row, text in enumerate(new)}
