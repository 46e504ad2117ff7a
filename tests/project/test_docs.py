"""What the docs say is what was measured."""

import ast
import importlib
import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from distill.benchmark.spec import Bench
from distill.config.recipe import Recipe
from distill.training.build import build

ROOT = Path(__file__).parent.parent.parent


def test_the_tables_are_those_of_the_committed_results():
    result = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], cwd=ROOT)
    assert result.returncode == 0, "run python benchmarks/tables.py"


def test_every_file_that_the_docs_point_to_exists():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link, anchor in re.findall(r"\]\(((?!http)[^)#]*)(?:#([^)]+))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in headings(target), f"{page.name}: {link}#{anchor}"


OURS = ("distill", "eval", "students", "teachers")
WHERE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


def where_is():
    """The rows of design.md's "Where is …?" table, each as its three cells."""
    section = (ROOT / "docs/design.md").read_text().split("## Where is …?")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names_in(path):
    """Functions, classes, constants and methods of a file; methods also as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            found |= methods | {f"{node.name}.{m}" for m in methods}
    return found


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_design_says_where_things_are():
    rows = where_is()
    assert len(rows) >= 25
    for question, code, page in rows:
        where = f"docs/design.md: {question}"
        places = WHERE.findall(code)
        assert places and "](" in page, where
        assert len(places) == code.count(".py"), f"{where}: write `PATH.py: NAME`"
        for path, name in places:
            assert (ROOT / path).is_file(), f"{where}: {path} does not exist"
            assert name in names_in(ROOT / path), f"{where}: {path} has no {name}"


def test_the_tests_that_reliability_names_exist():
    page = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"\b(\w+(?:/\w+)*/test_\w+)(?:::(\w+))?", page)
    assert len(named) > 60
    for file, test in named:
        path = ROOT / f"tests/{file}.py"
        assert path.is_file(), file
        assert not test or test in names_in(path), f"{file}::{test}"


@pytest.mark.parametrize("page", ["docs/metrics.md", "docs/objectives.md", "docs/teachers.md"])
def test_imports_in_the_pages_work(page):
    """Those of our own packages, in every block of Python."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    nodes = [node for block in blocks for node in ast.parse(block).body]
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    ours = [n for n in imports if str(n.module).split(".")[0] in OURS]
    for node in ours:
        module = importlib.import_module(str(node.module))
        assert not [a.name for a in node.names if not hasattr(module, a.name)], node.module


@pytest.mark.slow
def test_the_readmes_own_objective_learns(tmp_path, monkeypatch):
    """Its very lines: the file, the recipe and, in docs/objectives.md, the race."""
    monkeypatch.chdir(tmp_path)
    pages = [ROOT / "README.md", ROOT / "docs/objectives.md"]
    block = re.compile(r"```\w+\n(# (\w+\.\w+).*?)```", re.DOTALL)
    for text, name in (found for page in pages for found in block.findall(page.read_text())):
        (tmp_path / name).write_text(text)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.py", "mine.yaml", "race.yaml"}
    assert [row.name for row in Bench.load("race.yaml").rows] == ["mine", "DMD2"]
    recipe = Recipe.load("mine.yaml", ["train.steps=30", "train.log_every=1", "train.batch=16"])
    build(recipe, tmp_path / "run").engine.train()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(v)["student/loss"] for v in lines]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


FAMILIES = [("DMD2", "DMD2, 4 steps"), ("Jensen-Shannon", "Jensen-Shannon, 4 steps"),
            ("progressive, 1 step", "progressive, 2 steps", "progressive, 4 steps")]  # fmt: skip


def test_more_steps_are_never_worse_on_the_digits_beyond_the_spread():
    board = json.loads((ROOT / "docs/results/bench-digits/leaderboard.json").read_text())
    students = [v for v in board if v["kind"] == "student" and len(v["seeds"]) > 1]
    # docs/benchmark.md names these: the 2023 paper's own form, and students that renoise.
    worse = {"consistency on a grid", "iCT, immiscible noise", "improved MeanFlow", "shortcut"}
    names = {line["name"] for line in students} - worse
    assert {name for family in FAMILIES for name in family} <= names
    compared = 0
    for family in [*((name,) for name in names), *FAMILIES]:
        lines = sorted((v for v in students if v["name"] in family), key=lambda v: v["steps"])
        for few, more in combinations([line["metrics"]["fd"] for line in lines], 2):
            assert more["mean"] <= few["mean"] + few["spread"] + more["spread"], family
            compared += 1
    assert compared >= 10
