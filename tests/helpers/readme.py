"""The README's fenced blocks and commands, as tests read them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    """A fenced block: its language and its text."""

    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, by the comment at its start."""
        first = re.match(r"# (\w+\.\w+)\b", self.text)
        return first[1] if first else None


def blocks_of(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]


def commands_of(blocks: list[Block]) -> list[str]:
    """The lines of shell blocks, without their comments."""
    return [
        shlex.join(words)
        for block in blocks
        if block.kind == "bash"
        for line in block.text.splitlines()
        if (words := shlex.split(line, comments=True))
    ]


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


BLOCKS = blocks_of(README)
SHELL = commands_of(BLOCKS)
INLINE = re.findall(r"`(distill\s[^`…]*)`", README)


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]
