"""Tile sizes of the Triton kernels: a committed table by architecture, type and N. Nothing tunes at run time.

`python -m place.kernels.tune` measures alternatives on a GPU and prints lines for this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Blocks of rows, columns (0 where the kernel has square tiles) and the reduced dimension; warps and stages."""

    rows: int
    cols: int
    reduced: int
    num_warps: int
    num_stages: int


# Kernel -> type -> tiles in ascending order of the largest N they are for; None is for all others. `half` stands for
# bf16 and fp16, `float` for a call with fp32 on either side.
Table = dict[str, dict[str, list[tuple[int | None, Tile]]]]

HOPPER: Table = {
    "distance": {
        "half": [(64, Tile(64, 0, 64, 4, 3)), (None, Tile(128, 0, 64, 8, 3))],
        "float": [(None, Tile(64, 0, 32, 4, 2))],
    },
    # A reduced block of 32 halves what these two spill before and after their loops.
    "slope": {
        "half": [(64, Tile(64, 0, 64, 4, 3)), (None, Tile(128, 0, 32, 8, 4))],
        "float": [(None, Tile(64, 0, 32, 4, 2))],
    },
    # Which rows of x to load is loaded first: five stages hold as many tiles as three would without.
    "apply": {
        "half": [(64, Tile(64, 64, 64, 4, 5)), (None, Tile(128, 128, 64, 8, 5))],
        "float": [(None, Tile(64, 64, 32, 4, 3))],
    },
    "panel": {
        "half": [
            (64, Tile(64, 64, 64, 4, 3)),
            (128, Tile(64, 128, 64, 8, 3)),
            (256, Tile(64, 256, 32, 8, 3)),
        ],
        "float": [],
    },
}
# A block has 101,376 bytes of shared memory there, and the widest panel takes 106,496.
SMALL: Table = {**HOPPER, "panel": {"half": HOPPER["panel"]["half"][:-1], "float": []}}
TABLE: dict[int, Table] = {86: SMALL, 89: SMALL, 90: HOPPER, 120: SMALL, 121: SMALL}
PANEL_WIDTH = 256
"""Largest D for which the panel kernel is taken: wider, it multiplies a third more than slope and apply do together."""


def choose_tile(kernel: str, architecture: int, kind: str, patches: int, width: int) -> Tile | None:
    """The tile for a kernel, or None where it does not serve this type or shape.

    Args:
        kernel: a key of the table.
        architecture: compute capability as major * 10 + minor; one without an entry takes Hopper's.
        kind: `half` or `float`.
        patches, width: N and D.
    """
    if kernel == "panel" and width > PANEL_WIDTH:
        return None
    rows = TABLE.get(architecture, HOPPER)[kernel][kind]
    return next((tile for limit, tile in rows if limit is None or patches <= limit), None)
