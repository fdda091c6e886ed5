"""Leaks: what is judged may not be among what was trained on, by patient, by image and by published maps of ids.

Relations that are checked, each by `patient` and by `image`; an overlap is an error unless `evaluation.allow_leaks`
names it as RELATION.KIND:

- splits: the splits of the judged data set, of each other.
- pretraining: the judged splits, and what the run was trained on and chose its checkpoint by.
- selection (`image` alone): the judged splits, and those that chose the checkpoint, or thresholds and steps of heads.
- NAME (a folder of `evaluation.other_tests`): all splits of the judged data set, and that data set's test split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from place.config import Config, DataConfig, EvaluationConfig, RunError, StreamConfig, UsageError
from place.data.frame_rows import MIXED
from place.data.identity import IdHasher, read_salt
from place.data.manifest import read_manifest
from place.data.mixture import read_fingerprint
from place.data.perceptual import (
    MAX_BITS,
    MAX_ERROR,
    ImageHashes,
    find_similar,
    measure_error,
    read_hashes,
    read_thumbnails,
)
from place.data.prepared import read_card
from place.data.table import read_header, read_table
from place.evaluation.metrics import Array

KINDS = ("patient", "image")
SELECTION = "selection.image"
_COLUMNS = ["sample_id", "split", "patient", "source_sha256"]
_CLOSED = {"phantom": ("phantom",), "openi": ("openi", "r2gen-json")}
"""Sources whose patients have names of their own, with the sources that have the same ones: a patient of that name of
any other source is another one."""
RULE = (
    "patient: same keyed hash; image: same source file, or a perceptual hash of 256 bits with at most "
    f"{MAX_BITS} different and then a pixel error at 64 px of at most {MAX_ERROR}, or the same by the map of ids"
)
Report = Callable[[str, int, int], None]


class Rows(NamedTuple):
    """Images of a data set: folder, source, words for the user, then a value an image."""

    data_dir: str
    source: str
    label: str
    sample_id_N: Array
    split_N: Array
    patient_N: Array
    digest_N: Array
    bits_NH: Array

    def take(self, splits: Collection[str]) -> Rows:
        """The images of some splits."""
        own_N = np.isin(self.split_N, list(splits))
        label = f"split '{', '.join(splits)}' of {self.data_dir}"
        return Rows(self.data_dir, self.source, label, *(values[own_N] for values in self[3:]))


class Pretraining(NamedTuple):
    """What a run was trained on: its data section, with the folders to look in, the fingerprint it noted, and whether
    its validation split chose the checkpoint."""

    data: DataConfig
    fingerprint: str
    chooses: bool = True


class Judged(NamedTuple):
    """The data set that is evaluated: folder, card, the splits whose images are judged, and those by which heads choose
    their thresholds and steps."""

    data_dir: Path
    card: dict[str, Any]
    splits: tuple[str, ...]
    choosing: tuple[str, ...] = ()


def read_pretraining(run_dir: Path, config: Config, evaluation: EvaluationConfig) -> Pretraining:
    """What a run was trained on; `evaluation.pretraining` says where that lies now. Raises UsageError."""
    data, folders = config.data, evaluation.pretraining
    if folders:
        streams = data.list_streams()
        if len(folders) != len(streams):
            raise UsageError(f"evaluation.pretraining has {len(folders)} folders; the run has {len(streams)} data sets")
        moved = tuple(stream.model_copy(update={"path": path}) for stream, path in zip(streams, folders, strict=True))
        data = data.model_copy(update={"path": folders[0], "streams": moved if data.streams else ()})
    return Pretraining(data, json.loads((run_dir / "run.json").read_text())["data_fingerprint"])


def trace_pretraining(data: DataConfig, fingerprint: str | None, evaluation: EvaluationConfig) -> Pretraining | None:
    """What an encoder that names no folder was trained on: the user says where it lies, by `evaluation.pretraining`.

    Args:
        data: the splits that it was trained on.
        fingerprint: of the data set, which an export of ours knows; of other encoders none, and the user is believed.
    Returns: none where neither is there.
    Raises:
        UsageError: a folder that is no prepared data set, where the fingerprint is not known.
    """
    folders = evaluation.pretraining
    if not folders and fingerprint is None:
        return None
    streams = tuple(StreamConfig(path=path) for path in folders)
    path = folders[0] if folders else "the pretraining data"
    data = data.model_copy(update={"path": path, "streams": streams if len(folders) > 1 else ()})
    return Pretraining(data, fingerprint or read_fingerprint(data))


def check_leaks(
    judged: Judged, evaluation: EvaluationConfig, pretraining: Pretraining | None, report: Report
) -> dict[str, Any]:
    """Look for every overlap.

    Args:
        pretraining: what the encoder was trained on; None where nobody knows.
        report: told the step, what is done of it and its total.
    Returns:
        For the results: `found` (overlapping rows by RELATION.KIND), `allowed`, `not_checked` (relation to reason),
        `rule`.
    Raises:
        UsageError: a name in `allow_leaks` that no check has, other data sets of one name, an id map that cannot be
            read.
        RunError: an overlap that is not allowed, or an id map that names no image of the data set.
    Source: ours.
    """
    same, others, not_checked = _find_same_data(judged, pretraining)
    names = ["splits", "pretraining", *_name_others(evaluation.other_tests)]
    not_checked |= _list_unchecked(judged, [*others, *evaluation.other_tests])
    known = [SELECTION, *(f"{name}.{kind}" for name in names for kind in KINDS)]
    for name in evaluation.allow_leaks:
        if name not in known:
            raise UsageError(f"evaluation.allow_leaks: no check is called '{name}'; there are {', '.join(known)}")
    own = read_rows(judged.data_dir, report)
    id_map = read_id_map(evaluation, own) if evaluation.id_map else []
    found: dict[str, int] = {}
    faults = []
    for name, left, right in _list_relations(own, judged, evaluation, pretraining, same, others, report):
        for kind, count in (
            ("patient", len(find_patients(left, right))),
            ("image", len(find_images(left, right, id_map))),
        ):
            key = f"{name}.{kind}"
            found[key] = found.get(key, 0) + count
            if count and key not in evaluation.allow_leaks:
                faults.append((key, f"{count} {kind}s of {left.label} are also in {right.label}"))
    chosen = {*judged.choosing, *([pretraining.data.val_split] if same and pretraining and pretraining.chooses else [])}
    selected = own.take(sorted(chosen & {*judged.splits}))
    found[SELECTION] = len(selected.sample_id_N)
    if found[SELECTION] and SELECTION not in evaluation.allow_leaks:
        fault = f"{found[SELECTION]} images of {selected.label} are judged and also chose a checkpoint or choose steps"
        faults.append((SELECTION, fault))
    if faults:
        keys = ",".join(dict.fromkeys(key for key, _ in faults))
        told = "; ".join(fault for _, fault in faults)
        raise RunError(f"leak: {told}; judge other images, or allow it by name: 'evaluation.allow_leaks=[{keys}]'")
    allowed = [name for name in evaluation.allow_leaks if found.get(name)]
    return {"found": found, "allowed": allowed, "not_checked": not_checked, "rule": RULE}


def _find_same_data(judged: Judged, pretraining: Pretraining | None) -> tuple[bool, list[str], dict[str, str]]:
    """Whether the data set was trained on, folders of other data that was, and why that cannot be compared, if so."""
    if pretraining is None:
        return False, [], {"pretraining": "nobody knows what this encoder was trained on"}
    if judged.card["fingerprint"] == pretraining.fingerprint:
        return True, [], {}
    folders = [stream.path for stream in pretraining.data.list_streams()]
    where, advice = " and ".join(folders), "give the folder of the pretraining data with 'evaluation.pretraining=[DIR]'"
    try:
        fingerprint = read_fingerprint(pretraining.data)
    except UsageError:
        return False, [], {"pretraining": f"{where} is not there; {advice}"}
    if fingerprint != pretraining.fingerprint:
        reason = f"{where} is not what the run was trained on (another fingerprint); {advice}"
        return False, [], {"pretraining": reason}
    others = [folder for folder in folders if read_card(folder)["fingerprint"] != judged.card["fingerprint"]]
    return len(others) < len(folders), others, {}


def _name_others(folders: Sequence[str]) -> list[str]:
    """What the relations to other data sets are called: each by its folder. Raises UsageError where two are alike."""
    known = {name: f"the relation '{name}'" for name in ("splits", "pretraining", "selection")}
    for folder in folders:
        name = Path(folder).name
        if name in known:
            raise UsageError(
                f"evaluation.other_tests: {folder} and {known[name]} have one name, so a leak of the one would be "
                "allowed for both; give a folder of another name"
            )
        known[name] = folder
    return [Path(folder).name for folder in folders]


def _list_unchecked(judged: Judged, folders: Sequence[str]) -> dict[str, str]:
    """Why patients are not compared, and which data sets with images of the judged one are in none of the folders."""
    card, cards = judged.card, {folder: read_card(folder) for folder in folders}
    reasons = [note for note in card.get("notes", []) if note.endswith(MIXED)]
    reasons += filter(None, (_compare_salts(judged, folder, other) for folder, other in cards.items()))
    unchecked = {"patients": "; ".join(reasons)} if reasons else {}
    relatives = card.get("protocol", {}).get("shares_images_with", [])
    compared = {_name_data_set(other) for other in cards.values()}
    reason = "it has images of this data set; give the folder it is prepared in with 'evaluation.other_tests=[DIR]'"
    return unchecked | {name: reason for name in relatives if name not in compared}


def _compare_salts(judged: Judged, folder: str, other: dict[str, Any]) -> str:
    """Why patients of the judged data set have other hashes in a folder, or may have; empty where they have the same.

    Args:
        other: the folder's card.
    """
    source, advice = judged.card.get("source", ""), "prepare both with the same salt, into new folders"
    if source == "phantom" or not _share_names(source, other.get("source", "")):
        return ""
    salts = {str(judged.data_dir): judged.card.get("salt_check"), str(folder): other.get("salt_check")}
    if unknown := [name for name, salt in salts.items() if salt is None]:
        return f"{' and '.join(unknown)} was prepared before the salt was noted, which may be another one; {advice}"
    is_same = len({*salts.values()}) == 1
    return "" if is_same else f"{folder} was prepared with another salt than {judged.data_dir}; {advice}"


def _share_names(one: str, other: str) -> bool:
    """Whether a patient's name in two sources is one person's."""
    return other in _CLOSED.get(one, (other,)) and one in _CLOSED.get(other, (one,))


def _name_data_set(card: dict[str, Any]) -> str:
    """The name of its protocol; what was prepared without one is called as that of its source (mimic-cxr-jpg)."""
    return card.get("protocol", {}).get("name") or card.get("source", "").removesuffix("-jpg").replace("-", "_")


def _list_relations(
    own: Rows,
    judged: Judged,
    evaluation: EvaluationConfig,
    pretraining: Pretraining | None,
    same: bool,
    others: Sequence[str],
    report: Report,
) -> Iterator[tuple[str, Rows, Rows]]:
    """Relation and the two sides that may not overlap."""
    for one, other in combinations(sorted(set(own.split_N.tolist())), 2):
        yield "splits", own.take([one]), own.take([other])
    if pretraining:
        trained, chosen = pretraining.data.train_split, pretraining.data.val_split
        if same and trained in judged.splits:
            mine = own.take([trained])
            yield "pretraining", mine, mine._replace(label="the split that the run was trained on")
        for folder in others:
            yield "pretraining", own.take(judged.splits), read_rows(folder, report).take((trained, chosen))
    for folder in evaluation.other_tests:
        yield Path(folder).name, own, read_rows(folder, report).take(["test"])


def read_rows(data_dir: str | Path, report: Report) -> Rows:
    """All images of a prepared data set. Raises UsageError, RunError."""
    card = read_card(data_dir)
    table = read_manifest(data_dir, _COLUMNS)
    hashes = read_hashes(data_dir, partial(report, "hash images"))
    ids, split, patient, digest = (np.array(table[name].to_pylist(), object) for name in _COLUMNS)
    bits = _order_bits(hashes, ids.astype(np.int64), data_dir)
    return Rows(
        str(data_dir), card.get("source", ""), str(data_dir), ids.astype(np.int64), split, patient, digest, bits
    )


def _order_bits(hashes: ImageHashes, ids: Array, data_dir: str | Path) -> Array:
    place = {sample_id: row for row, sample_id in enumerate(hashes.sample_id_N.tolist())}
    missing = [sample_id for sample_id in ids.tolist() if sample_id not in place]
    if missing:
        raise RunError(
            f"{data_dir}: sample {missing[0]} is in the manifest and in no shard; prepare the data set again"
        )
    return hashes.bits_NH[[place[sample_id] for sample_id in ids.tolist()]]


def find_patients(left: Rows, right: Rows) -> set[str]:
    """Patients that both have. Source: ours."""
    if not _share_names(left.source, right.source):
        return set()
    return ({*left.patient_N.tolist()} & {*right.patient_N.tolist()}) - {None, ""}


def find_images(left: Rows, right: Rows, id_map: Sequence[tuple[int, int]] = ()) -> set[int]:
    """sample_id of the images on the left that are also on the right: same file, alike, or the same by the map."""
    there = {*right.digest_N.tolist()}
    found = {int(i) for i, digest in zip(left.sample_id_N, left.digest_N, strict=True) if digest in there}
    own, other = ({*rows.sample_id_N.tolist()} for rows in (left, right))
    found |= {a for pair in id_map for a, b in (pair, pair[::-1]) if a in own and b in other}
    pairs = [
        (int(left.sample_id_N[a]), int(right.sample_id_N[b]))
        for a, b in find_similar(left.bits_NH, right.bits_NH)
        if int(left.sample_id_N[a]) not in found
    ]
    lefts = read_thumbnails(left.data_dir, {a for a, _ in pairs})
    rights = read_thumbnails(right.data_dir, {b for _, b in pairs})
    return found | {a for a, b in pairs if measure_error(lefts[a], rights[b]) <= MAX_ERROR}


def read_id_map(evaluation: EvaluationConfig, own: Rows) -> list[tuple[int, int]]:
    """Pairs of sample ids out of a csv of names, or out of the JSON by which RSNA maps its challenge to NIH's images.

    Raises:
        UsageError: neither of the two.
        RunError: no name of an image of the data set.
    Source: quoted (RSNA, pneumonia-challenge-dataset-mappings_2018.json; keys subset_img_id and img_id).
    """
    path = Path(str(evaluation.id_map))
    names = _read_rsna_names(path) if path.suffix == ".json" else _read_names(path)
    ids = IdHasher(read_salt(evaluation.salt_file))
    pairs = [(ids.number("image", a), ids.number("image", b)) for a, b in names]
    if not {number for pair in pairs for number in pair} & {*own.sample_id_N.tolist()}:
        raise RunError(
            f"evaluation.id_map={path}: none of its {len(pairs)} rows names an image of {own.data_dir}; write them as "
            "the table of the data set does, and give the salt file it was prepared with (evaluation.salt_file)"
        )
    return pairs


def _read_names(path: Path) -> list[tuple[str, str]]:
    header = read_header(path) if path.is_file() else []
    if len(header) != 2:
        raise UsageError(f"evaluation.id_map={path}: expected a csv of two columns, got {header or 'no such file'}")
    table = read_table(path, dict(zip(("left", "right"), header, strict=True)), ())
    return list(zip(table["left"], table["right"]))


def _read_rsna_names(path: Path) -> list[tuple[str, str]]:
    """Names of an image as configs/eval/rsna.yaml and nih.yaml have them."""
    try:
        records = json.loads(path.read_text())
        return [(f"stage_2_train_images/{record['subset_img_id']}.dcm", record["img_id"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"evaluation.id_map={path}: expected a list of records with subset_img_id and img_id, as RSNA publishes it "
            f"({type(error).__name__} {error}); or give a csv of two columns"
        ) from None


def list_leak_notes(leaks: dict[str, Any]) -> list[str]:
    """Lines for the screen: what was found and allowed, and what could not be checked."""
    notes = [f"leak allowed: {name}, {leaks['found'][name]} of them" for name in leaks["allowed"]]
    notes += [f"no check against {name}: {reason}" for name, reason in leaks["not_checked"].items()]
    return notes
