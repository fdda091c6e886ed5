"""Compiles the kernels for a GPU that is not there and reads the machine code: registers, spills, tensor-core use.

`python -m place.kernels.patch_correlation.offline` prints a line for every committed configuration.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from place.kernels.patch_correlation.launch import Launch, plan_distances, plan_gradient
from place.kernels.patch_correlation.reference import Options
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT_BYTES = 232_448
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


class Code(NamedTuple):
    """What the machine code of a kernel says about itself."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    hgmma: int
    hmma: int
    local_in_loops: int
    """Accesses to local memory inside loops that hold HGMMA."""
    stores: dict[str, int]
    """Global stores by width in bits."""


def list_launches(
    patches: int, width: int, x_dtype: torch.dtype, y_dtype: torch.dtype, options: Options, focus: bool
) -> list[Launch]:
    """Every launch of a call forward and backward, on the meta device."""
    x_BND = torch.empty(2, patches, width, dtype=x_dtype, device="meta")
    y_BNT = torch.empty(2, patches, 256, dtype=y_dtype, device="meta")
    mask_BN = torch.empty(2, patches, dtype=torch.bool, device="meta")
    masks = (mask_BN, mask_BN if focus else None)
    gradient_B = torch.empty(2, device="meta")
    _, forward = plan_distances(x_BND, y_BNT, *masks, options)
    _, backward = plan_gradient(gradient_B, x_BND, y_BNT, *masks, options)
    return [*forward, *backward]


def compile_launch(launch: Launch, architecture: int = 90) -> Code:
    """Compile a launch as Triton would at run time on an architecture, and read the result."""
    constants = {**launch.constants, **({"INTERPRETED": False} if "INTERPRETED" in launch.kernel.arg_names else {})}
    signature, attributes = {}, {}
    for index, (name, arg) in enumerate(zip(launch.kernel.arg_names, launch.args)):
        special = not launch.kernel.params[index].do_not_specialize
        if isinstance(arg, int) and arg == 1 and special:
            constants[name] = 1
            continue
        signature[name] = _type(arg)
        if isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg % 16 == 0 and special):
            attributes[(index,)] = [["tt.divisibility", 16]]
    ordered = {name: signature.get(name, "constexpr") for name in launch.kernel.arg_names}
    compiled = triton.compile(
        ASTSource(launch.kernel, ordered, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages},
    )
    return _read_code(launch.kernel.fn.__name__, compiled.asm["cubin"], compiled.metadata.shared)


def _type(arg: Any) -> str:
    if isinstance(arg, torch.Tensor):
        return POINTERS[arg.dtype]
    return "i32" if isinstance(arg, int) else "fp32"


def _read_code(name: str, cubin: bytes, shared_bytes: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, listing = (_call_tool("cuobjdump", flag, str(path)) for flag in ("-res-usage", "-sass"))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    lines = [
        (int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?);", listing, re.MULTILINE)
    ]
    return Code(
        name,
        numbers["REG"],
        numbers["STACK"],
        shared_bytes,
        sum("HGMMA" in text for _, text in lines),
        sum(bool(re.search(r"\bHMMA", text)) for _, text in lines),
        sum(bool(re.search(r"\b(LDL|STL)", text)) for loop in find_loops(lines) for text in loop),
        dict(Counter(_width(text) for _, text in lines if re.search(r"\bSTG", text))),
    )


def find_loops(lines: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Instructions between a backward branch and its target, for loops that hold HGMMA."""
    for at, text in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            loop = [inside for where, inside in lines if int(target[1], 16) <= where <= at]
            if any("HGMMA" in inside for inside in loop):
                yield loop


def _width(store: str) -> str:
    found = re.search(r"STG\.E(?:\.\w+)*?\.(U8|S8|U16|S16|64|128)\b", store)
    return found[1].lstrip("US") if found else "32"


def _call_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def list_committed() -> Iterator[tuple[str, Launch]]:
    """Launches that between them use every line of the table, with the types each is for."""
    seen = set()
    halves = [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.uint8),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ]
    for patches, width in itertools.product((49, 128, 196, 1024), (128, 768)):
        for x_dtype, y_dtype in halves:
            for options, focus in ((Options(), False), (Options(False, "smooth_l1", exclude_diag=False), True)):
                for launch in list_launches(patches, width, x_dtype, y_dtype, options, focus):
                    types = " ".join(str(dtype).removeprefix("torch.") for dtype in (x_dtype, y_dtype))
                    label = f"{launch.kernel.fn.__name__} {types} {options.loss} {tuple(launch.tile)}"
                    if label not in seen:
                        seen.add(label)
                        yield label, launch


def main(pattern: str = "") -> None:
    """Print each committed configuration whose label matches a pattern, as JSON lines."""
    for label, launch in list_committed():
        if re.search(pattern, label):
            sys.stdout.write(
                json.dumps({"triton": triton.__version__, "label": label, **compile_launch(launch)._asdict()}) + "\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
