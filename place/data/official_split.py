"""The split of each row: the official one of its patient, else the one that the hash of the patient gives."""

from __future__ import annotations

import pandas as pd

from place.config import PrepareConfig, RunError, UsageError
from place.data.identity import compute_split, describe_hash_split

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def assign_splits(frame: pd.DataFrame, config: PrepareConfig, advice: str) -> tuple[pd.Series, str]:
    """Official split (column `split`, of any usual name) where the patient has one, else by the hash of the patient.

    Args:
        frame: with the columns `number` and `patient`.
        config: seed and shares of the hash.
        advice: what a user can do if a patient is in two splits.
    Returns:
        train, val or test of each row, and the rule in words.
    Raises:
        UsageError: a split of another name.
        RunError: a patient in two official splits; rows are named, patients not.
    Source: ours; style.md 24.
    """
    hashed = describe_hash_split(config.seed, config.split)
    by_hash = {patient: compute_split(patient, config.seed, config.split) for patient in frame["patient"].unique()}
    if "split" not in frame:
        return frame["patient"].map(by_hash), hashed
    official = frame["split"].str.lower().map(lambda name: SPLIT_NAMES.get(name, "?") if name else "")
    if (official == "?").any():
        unknown = sorted(set(frame["split"][official == "?"]))[:5]
        raise UsageError(
            f"split column holds {', '.join(map(repr, unknown))}; expected train, val (valid, validate) or test"
        )
    given = official[official != ""]
    _check_one_split(frame, given, advice)
    by_patient = dict(zip(frame["patient"][given.index], given))
    rule = "as the split column says" + (f", patients without a split {hashed}" if (official == "").any() else "")
    return frame["patient"].map(lambda patient: by_patient.get(patient) or by_hash[patient]), rule


def _check_one_split(frame: pd.DataFrame, given: pd.Series, advice: str) -> None:
    patient = frame["patient"][given.index]
    first = given.groupby(patient).transform("first")
    if (first != given).any():
        row = (first != given).idxmax()
        other = (patient == patient[row]).idxmax()
        raise RunError(
            f"rows {frame['number'][other]} and {frame['number'][row]} are of one patient, but one is in "
            f"{given[other]} and one in {given[row]}: {advice}"
        )
