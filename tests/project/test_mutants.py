"""Planted faults: the list lives, and the tool tells the caught from those that survive."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its processes look it up by its name
tool = importlib.import_module("mutants")


def test_every_fault_can_still_be_planted():
    assert tool.stale(tool.MUTANTS) == []


def test_faults_are_many_of_different_names_and_each_changes_something():
    assert len(tool.MUTANTS) >= 40
    assert len({m.name for m in tool.MUTANTS}) == len(tool.MUTANTS)
    assert len({(m.file, m.new, m.old) for m in tool.MUTANTS}) == len(tool.MUTANTS)
    assert all(m.old != m.new and m.tests for m in tool.MUTANTS)


def test_every_test_that_is_to_catch_one_is_there():
    for mutant in tool.MUTANTS:
        for node in mutant.tests:
            path, _, name = node.partition("[")[0].partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(), f"{mutant.name}: {node}"


# the tool, on a project of two functions

CODE = "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n"
TESTS = """
import time
from code_under_test import add, twice
def test_add():
    assert add(2, 3) == 5
def test_twice():
    assert twice(0) == 0
def test_ends():
    while add(1, 1) != 2:
        time.sleep(0.01)
"""


def mutant(name, old, new, *tests):
    return tool.Mutant(name, "code_under_test.py", old, new, tests or ("test_it.py::test_add",))


CAUGHT = mutant("minus", "a + b", "a - b")
SURVIVES = mutant("thrice", "2 * a", "3 * a", "test_it.py::test_twice")


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "PRELOAD", ["pytest"])  # of this project's packages it needs none
    (tmp_path / "code_under_test.py").write_text(CODE)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "large.bin").write_bytes(b"x" * (tool.LARGE + 1))
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "ignored").write_text("a run's output\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_what_is_caught_and_by_which_test_is_written_down_and_the_tree_stays(project, capsys):
    files = [project / "out.json", project / "out.md"]
    words = ["--json", str(files[0]), "--markdown", str(files[1])]
    assert tool.main(words, (CAUGHT, SURVIVES), project) == 1  # half of them, of 95 %
    assert "1 of 2 caught" in capsys.readouterr().out
    found = json.loads(files[0].read_text())
    assert (found["caught"], found["of"]) == (1, 2)
    assert [(m["name"], m["status"], m["by"]) for m in found["mutants"]] == [
        ("minus", "caught", "test_it.py::test_add"),
        ("thrice", "survived", ""),
    ]
    page = files[1].read_text()
    assert "Caught: 1 of 2." in page
    assert "| minus | `code_under_test.py` | caught | `test_it.py::test_add` |" in page
    assert "| thrice | `code_under_test.py` | survived |  |" in page
    assert (project / "code_under_test.py").read_text() == CODE


def test_one_may_be_tried_alone_and_the_others_results_stay(project, capsys):
    assert tool.main(["--only", "minus", "--jobs", "2"], (CAUGHT, SURVIVES), project) == 0
    assert "thrice" not in capsys.readouterr().out
    file, faults = project / "out.json", (CAUGHT, SURVIVES)
    words = ["--only", "minus", "--json", str(file)]
    assert tool.main(words, faults, project) == 2
    assert "out.json holds no result of 'thrice'; leave out --only once" in capsys.readouterr().err
    rows = [tool.Result(m.name, m.file, "survived", "", 0.0) for m in faults]
    file.write_text(tool.to_json(rows))
    assert tool.main(words, faults, project) == 1
    found = json.loads(file.read_text())["mutants"]
    assert [(m["name"], m["status"]) for m in found] == [
        ("minus", "caught"),
        ("thrice", "survived"),
    ]


def test_a_fault_that_hangs_its_tests_is_caught(project, monkeypatch):
    monkeypatch.setattr(tool, "TIMEOUT", 3)
    hangs = mutant("hangs", "a + b", "a * b", "test_it.py::test_ends")
    assert tool.try_fault(hangs, project)[2:4] == ("caught", "a timeout")


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (mutant("gone", "a % b", "a"), "gone: stale: its old text occurs 0 times"),
        (mutant("unclear", "return", "raise"), "unclear: stale: its old text occurs 2 times"),
        (mutant("no Python", "a + b", "a +"), "no Python: code_under_test.py would be no Python"),
        (SURVIVES._replace(tests=("test_it.py::test_none",)), "without a fault, the tests fail"),
    ],
)
def test_where_nothing_can_be_said_it_says_why(bad, line, project, capsys):
    assert tool.main([], (CAUGHT, bad), project) == 2
    out, err = capsys.readouterr()
    assert line in err and out == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "mnius"], "--only: no fault is named 'mnius'"),
        (["--only", "minus", "--markdown", "x"], "--only: a page is of all faults; name"),
        (["--jobs", "0"], "--jobs: 0; give 1 or more"),
    ],
)
def test_a_mistaken_call_is_refused(words, line, project, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(words, (CAUGHT,), project)
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err


def test_copies_hold_what_git_sees_and_link_what_is_large(project, tmp_path_factory):
    into = tmp_path_factory.mktemp("copy")
    tool.copy(project, into)
    assert {p.name for p in into.iterdir()} == {
        "code_under_test.py", "test_it.py", "large.bin", ".gitignore"
    }  # fmt: skip
    assert (into / "large.bin").samefile(project / "large.bin")
    assert not (into / "code_under_test.py").samefile(project / "code_under_test.py")
