"""The table in docs/slow-tests.md: a row for each slow test, with its last result.

`pytest -m slow --write-slow` writes the rows of the tests that ran, and keeps the others.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
TESTS = ROOT / "tests"
PAGE = ROOT / "docs/slow-tests.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"
HEAD = "| test | minutes | last result | when | what it shows |\n|---|---|---|---|---|\n"
LINE = re.compile(r"\| `(.+?)` \| (.*?) \| (.*?) \| (.*?) \| (.*) \|")


class Row(NamedTuple):
    """What is known of a slow test, by the columns of the table."""

    minutes: str = "?"
    result: str = "not run"
    when: str = ""


def uses_slow(node: ast.AST, defined: dict[str, ast.AST]) -> bool:
    """Whether `pytest.mark.slow` is in a node, or in a name of the module that it uses."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr == "slow":
            return True
        if isinstance(part, ast.Name) and part.id in defined:
            rest = {k: v for k, v in defined.items() if k != part.id}
            if uses_slow(defined[part.id], rest):
                return True
    return False


def slow_in(source: str) -> Iterator[tuple[str, str]]:
    """The test functions of a module that are slow, with the first lines of their docstrings."""
    tree, defined = ast.parse(source), {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            names = [n for target in node.targets for n in ast.walk(target)]
            defined |= {n.id: node.value for n in names if isinstance(n, ast.Name)}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in functions:
        slow = any(uses_slow(mark, defined) for mark in node.decorator_list)
        if slow and node.name.startswith("test_"):
            yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]


def slow_tests() -> dict[str, str]:
    """Every slow test, as "folder/test_file.py::test_name", with what it shows."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if "mark.slow" in source:
            place = path.relative_to(TESTS)
            found |= {f"{place}::{name}": about for name, about in slow_in(source)}
    return found


def read(page: str) -> dict[str, Row]:
    """The rows of the page's table, by test."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    return {m[1]: Row(m[2], m[3], m[4]) for m in map(LINE.fullmatch, lines) if m}


def written(page: str, rows: dict[str, Row]) -> str:
    """The page with a row for each slow test: those given, those it has, or "not run"."""
    before, rest = page.split(BEGIN)
    rows = read(page) | rows
    table = "".join(
        f"| `{name}` | {' | '.join(rows.get(name, Row()))} | {about} |\n"
        for name, about in slow_tests().items()
    )
    return f"{before}{BEGIN}\n{HEAD}{table}{END}{rest.partition(END)[2]}"


def result_of(outcomes: dict[str, str]) -> str:
    """What a row says of a test's cases: how many passed, and the names of those that did not."""
    passed = [case for case, outcome in outcomes.items() if outcome == "passed"]
    others = [f"{outcome}: {case}" for case, outcome in outcomes.items() if outcome != "passed"]
    said = "passed" if len(outcomes) == 1 else f"{len(passed)} of {len(outcomes)} cases passed"
    return "; ".join([said] * bool(passed or not others) + others)


class Recorder:
    """A plugin that keeps the results of slow tests and writes them to the page at the end."""

    def __init__(self, page: Path = PAGE) -> None:
        self.page = page
        self.outcomes: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "slow" not in report.keywords:
            return
        name, _, case = report.nodeid.removeprefix("tests/").partition("[")
        outcomes = self.outcomes.setdefault(name, {})
        self.seconds[name] = self.seconds.get(name, 0) + report.duration
        case = case.removesuffix("]").replace("|", "/") or "the test"
        if report.when == "call" or report.outcome != "passed":
            outcomes[case] = report.outcome

    def pytest_sessionfinish(self) -> None:
        when = f"{date.today()}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores"
        rows = {
            name: Row(f"{self.seconds[name] / 60:.1f}", result_of(outcomes), when)
            for name, outcomes in self.outcomes.items()
            if outcomes
        }
        page = self.page.read_text(encoding="utf-8")
        self.page.write_text(written(page, rows), encoding="utf-8")
