"""A choice as text: the recipe's file with its reasons as comments, and what the terminal shows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

from distill.auto.choose import Choice, hours_text
from distill.auto.machine import Machine
from teachers.errors import plural

WIDTH = 100  # of a comment
ORDER = (
    "teacher", "student", "objective", "critic", "adapters", "players", "data", "train", "eval",
)  # fmt: skip


def recipe_text(choice: Choice, command: str, machine: Machine) -> str:
    """The recipe as YAML; above each section are the reasons for what it holds."""
    lines = [*comment(f"{command}"), *comment(expected(choice, machine))]
    for line in choice.unknown:
        lines += comment(f"Not known: {line}")
    keys = [k for k in ORDER if k in choice.tree]
    for key in [*keys, *(k for k in choice.tree if k not in ORDER)]:
        lines.append("")
        for reason in choice.reasons:
            if reason.section == key:
                lines += comment(f"{reason.what} {reason.value}: {reason.why}")
        lines.append(section_text(key, choice.tree[key]))
    return "\n".join(lines) + "\n"


def comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="#   ",
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def section_text(key: str, value: object) -> str:
    """A section in YAML, with inner mappings on one line."""
    return yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=None, width=WIDTH,
                          allow_unicode=True).rstrip()  # fmt: skip


def expected(choice: Choice, machine: Machine) -> str:
    """One line: time, memory, cost, and the figure of the evidence."""
    parts = [time_text(choice.hours), f"{choice.gb:.1f} of {machine.memory:.3g} GB"]
    if choice.dollars >= 0.01:
        parts.append(f"${choice.dollars:.2f}")
    if choice.figure:
        parts.append(choice.figure)
    return f"Expected on {machine.name}: {', '.join(parts)}."


def time_text(hours: float) -> str:
    """A time in hours, or in minutes below two hours."""
    return f"{hours:.1f} h" if hours >= 2 else f"{max(1, round(60 * hours))} min"


def title(model: str, machine: Machine, hours: float) -> str:
    """What was asked for, in one line."""
    return f"{model} on {machine.name} ({machine.memory:.3g} GB), at most {hours_text(hours)}"


def shown(choice: Choice, head: str, machine: Machine) -> Group:
    """What the terminal shows: the choices with their reasons, the cost, and what was not known."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("choice", no_wrap=True)
    table.add_column("value", ratio=2)
    table.add_column("why", ratio=3)
    for reason in choice.reasons:
        table.add_row(reason.what, Text(reason.value, "green"), reason.why)
    table.expand = True
    return Group(Text(head, "bold"), "", table, "", Text(expected(choice, machine)),
                 *unknown_lines(choice))  # fmt: skip


def unknown_lines(choice: Choice) -> Iterator[Text | Table]:
    """What was not known, as a list."""
    if not choice.unknown:
        return
    count = len(choice.unknown)
    yield Text(f"Not known ({count} {plural(count, 'thing')}):", "yellow")
    rows = Table.grid(padding=(0, 1, 0, 0))
    for line in choice.unknown:
        rows.add_row("-", line)
    yield rows
