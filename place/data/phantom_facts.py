"""What is to be seen in a phantom study: findings with place, side and severity, and devices."""

from typing import NamedTuple

from numpy.random import Generator

from place.data.phantom_anatomy import Anatomy

FINDINGS: tuple[str, ...] = (
    "cardiomegaly", "effusion", "pneumothorax", "consolidation", "nodule", "edema", "atelectasis", "fracture",
)  # fmt: skip

COUNT_SHARES = (0.25, 0.25, 0.25, 0.15, 0.10)
"""Shares of studies with 0, 1, 2, 3 and 4 findings."""


class Fact(NamedTuple):
    """One finding: `size_mm` is height, rim, diameter, extent or band length; `ctr` for the heart alone."""

    finding: str
    side: str
    zone: str = ""
    severity: str = ""
    size_mm: float = 0.0
    kind: str = ""
    rib: int = 0
    place: float = 0.5


class Devices(NamedTuple):
    """Things that are not the patient; `tube_mm` is the tip's height above the carina, 0 without a tube."""

    leads: bool
    tube_mm: float
    line_side: str
    pacemaker: str
    sternotomy: bool


def draw_devices(rng: Generator, anatomy: Anatomy, view: str) -> Devices:
    """Random devices; bedside (AP) films carry more."""
    bedside = view == "AP"
    rolls = rng.random(4)
    return Devices(
        leads=bool(rolls[0] < (0.45 if bedside else 0.08)),
        tube_mm=float(rng.uniform(20, 65)) if bedside and rolls[1] < 0.3 else 0.0,
        line_side=str(rng.choice(["right", "right", "left"])) if rolls[2] < (0.3 if bedside else 0.06) else "",
        pacemaker="left" if anatomy.has_pacemaker else "",
        sternotomy=anatomy.has_sternotomy,
    )


def draw_facts(rng: Generator) -> tuple[Fact, ...]:
    """Draw 0 to 4 findings that do not hide one another, in the order of `FINDINGS`."""
    count = int(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
    chosen = [FINDINGS[i] for i in rng.choice(len(FINDINGS), count, replace=False)]
    taken: set[tuple[str, str]] = set()
    facts: list[Fact] = []
    for finding in sorted(chosen, key=_PLACING.index):
        facts += _DRAW[finding](rng, taken, facts)
    return tuple(sorted(facts, key=lambda fact: FINDINGS.index(fact.finding)))


_PLACING = ("pneumothorax", "effusion", "consolidation", "atelectasis", "nodule", "edema", "cardiomegaly", "fracture")


def _pick(rng: Generator, items: list) -> tuple[str, str]:
    return items[int(rng.integers(len(items)))]


def _free(taken: set[tuple[str, str]], zones: tuple[str, ...]) -> list[tuple[str, str]]:
    spots = [(side, zone) for side in ("right", "left") for zone in zones]
    return [spot for spot in spots if spot not in taken] or spots


def _grade(rng: Generator, names: tuple[str, str, str], ranges: list[tuple[float, float]]) -> tuple[str, float]:
    level = int(rng.choice(3, p=(0.35, 0.4, 0.25)))
    return names[level], float(rng.uniform(*ranges[level]))


def _draw_pneumothorax(rng: Generator, taken: set, _: list[Fact]) -> list[Fact]:
    side = str(rng.choice(["right", "left"]))
    severity, size = _grade(rng, ("small", "moderate", "large"), [(14, 22), (25, 42), (46, 75)])
    taken |= {(side, "upper")} | ({(side, "mid")} if severity == "large" else set())
    return [Fact("pneumothorax", side, "upper", severity, size)]


def _draw_effusion(rng: Generator, taken: set, facts: list[Fact]) -> list[Fact]:
    side = str(rng.choice(["right", "left", "both"], p=(0.36, 0.36, 0.28)))
    if facts:  # air and fluid on one side would be a hydropneumothorax, which we do not draw
        side = "left" if facts[0].side == "right" else "right"
    severity, size = _grade(rng, ("small", "moderate", "large"), [(28, 42), (50, 78), (88, 125)])
    sides = ("right", "left") if side == "both" else (side,)
    zones = ("lower", "mid") if severity == "large" else ("lower",)
    taken |= {(one, zone) for one in sides for zone in zones}
    return [Fact("effusion", side, "lower", severity, size)]


def _draw_consolidation(rng: Generator, taken: set, _: list[Fact]) -> list[Fact]:
    side, zone = _pick(rng, _free(taken, ("upper", "mid", "lower")))
    severity, size = _grade(rng, ("mild", "moderate", "severe"), [(45, 60), (60, 80), (75, 100)])
    taken.add((side, zone))
    return [Fact("consolidation", side, zone, severity, size, place=float(rng.uniform(0.3, 0.75)))]


def _draw_atelectasis(rng: Generator, taken: set, facts: list[Fact]) -> list[Fact]:
    place = float(rng.uniform(0.3, 0.7))
    airy = {fact.side for fact in facts if fact.finding == "pneumothorax"}
    low = [spot for spot in _free(taken, ("lower",)) if spot not in taken and spot[0] not in airy]
    if low and rng.random() < 0.5:
        side, zone = _pick(rng, low)
        severity, size = _grade(rng, ("mild", "moderate", "severe"), [(22, 28), (28, 36), (36, 46)])
        taken.add((side, zone))
        return [Fact("atelectasis", side, zone, severity, size, "lobar", place=place)]
    side, zone = _pick(rng, _free(taken, ("mid", "lower")))
    severity, size = _grade(rng, ("mild", "moderate", "severe"), [(45, 60), (60, 75), (75, 90)])
    taken.add((side, zone))
    return [Fact("atelectasis", side, zone, severity, size, "band", place=place)]


def _draw_nodule(rng: Generator, taken: set, _: list[Fact]) -> list[Fact]:
    nodules = []
    for _i in range(2 if rng.random() < 0.2 else 1):
        side, zone = _pick(rng, _free(taken, ("upper", "mid", "lower")))
        severity, size = _grade(rng, ("small", "moderate", "large"), [(7, 11), (12, 19), (20, 29)])
        taken.add((side, zone))
        nodules.append(Fact("nodule", side, zone, severity, size, place=float(rng.uniform(0.3, 0.8))))
    return nodules


def _draw_edema(rng: Generator, _: set, __: list[Fact]) -> list[Fact]:
    severity, size = _grade(rng, ("mild", "moderate", "severe"), [(0.45, 0.6), (0.65, 0.85), (0.95, 1.2)])
    return [Fact("edema", "both", "", severity, size)]


def _draw_cardiomegaly(rng: Generator, _: set, __: list[Fact]) -> list[Fact]:
    severity, size = _grade(rng, ("mild", "moderate", "severe"), [(0.55, 0.575), (0.58, 0.63), (0.64, 0.70)])
    return [Fact("cardiomegaly", "", "", severity, size)]


def _draw_fracture(rng: Generator, _: set, __: list[Fact]) -> list[Fact]:
    side = str(rng.choice(["right", "left"]))
    severity = str(rng.choice(["nondisplaced", "displaced"]))
    size = float(rng.uniform(5, 9)) if severity == "displaced" else float(rng.uniform(2.5, 3.5))
    rib, place = int(rng.integers(4, 9)), float(rng.uniform(0.36, 0.68))
    return [Fact("fracture", side, "", severity, size, rib=rib, place=place)]


_DRAW = {
    "pneumothorax": _draw_pneumothorax, "effusion": _draw_effusion, "consolidation": _draw_consolidation,
    "atelectasis": _draw_atelectasis, "nodule": _draw_nodule, "edema": _draw_edema,
    "cardiomegaly": _draw_cardiomegaly, "fracture": _draw_fracture,
}  # fmt: skip
