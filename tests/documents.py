"""What a Markdown text holds for machines: code blocks and the `place` commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap


def read_blocks(text: str, language: str) -> list[str]:
    """Code of each fenced block of one language; "" for blocks that name none."""
    fence = rf"^(?P<indent> *)```{language}(?: [^\n]*)?\n(?P<code>.*?)^(?P=indent)```"
    return [textwrap.dedent(found["code"]) for found in re.finditer(fence, text, re.DOTALL | re.MULTILINE)]


def read_commands(blocks: list[str], anywhere: bool = False) -> list[list[str]]:
    """Arguments of each `place` command, as a shell would split them.

    Args:
        anywhere: also those behind other words of a line, such as `srun` or `python -m`.
    """
    begin = r"(?:^|.*?[ /])place " if anywhere else r"place "
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.match(rf"{begin}(?=[a-z-])(.*)", line.split("#")[0].split(" > ")[0]) for line in lines)
    return [shlex.split(match[1]) for match in found if match]
