"""The design, enforced: who may import whom, how long an objective may be, what never appears."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("teachers", "students", "distill", "eval")
FILES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
SHARED = (
    "__init__",
    "base",
    "losses",
    "noise_levels",
    "validate",
    "pairwise",
    "balance",
    "rectified",
    "regression",
    "branches",
    "first_step",
    "games",
    "taps",
)  # no objective of its own
OBJECTIVES = [
    p for p in sorted((ROOT / "distill/objectives").rglob("*.py")) if p.stem not in SHARED
]

# The folders, lowest first, and what each may import beside itself: only what stands above it here.
MAY: dict[str, set[str]] = {
    "teachers": set(),
    "teachers.reduced": {"teachers"},
    "teachers.storage": {"teachers", "teachers.reduced"},
    "teachers.adapters": {"teachers", "teachers.storage"},
    "teachers.families": {
        "teachers", "teachers.reduced", "teachers.storage", "teachers.adapters",
    },
    "teachers.pipelines": {"teachers", "teachers.storage", "teachers.families"},
    "teachers.pictured": {"teachers", "teachers.families"},
    "teachers.edm": {"teachers", "teachers.storage", "teachers.families"},
    "teachers.imagenet": {"teachers", "teachers.storage", "teachers.families", "teachers.edm"},
    "teachers.catalogue": {
        "teachers", "teachers.storage", "teachers.adapters", "teachers.families",
        "teachers.pipelines", "teachers.pictured", "teachers.edm", "teachers.imagenet",
    },
    "teachers.diagnosis": {"teachers"},
    "students": {"teachers", "teachers.storage", "teachers.families", "teachers.edm"},
    "students.architecture": {
        "students", "teachers", "teachers.catalogue", "teachers.families", "teachers.reduced",
    },
    "students.metadata": {"students", "teachers", "teachers.storage", "teachers.families"},
    "students.export.sources": {
        "students", "teachers", "teachers.edm", "teachers.imagenet", "teachers.storage",
    },
    "students.export": {
        "students", "students.architecture", "students.export.sources", "students.metadata",
        "teachers", "teachers.reduced",
        "teachers.storage", "teachers.adapters", "teachers.families", "teachers.edm",
        "teachers.imagenet", "teachers.catalogue",
    },
    "eval": set(),
    "eval.digits": {"eval"},
    "eval.shapes": {"eval"},
    "eval.emoji": {"eval"},
    "eval.metrics": {"eval", "eval.digits", "eval.shapes"},
    "eval.protocols": {"eval", "eval.digits", "eval.shapes", "eval.metrics"},
    "distill": {"teachers", "teachers.storage", "eval"},
    "distill.objectives": {"distill", "students", "teachers"},
    "distill.objectives.consistency": {"distill", "distill.objectives", "teachers"},
    "distill.objectives.flow_maps": {
        "distill", "distill.objectives", "distill.objectives.consistency", "students", "teachers",
    },
    "distill.objectives.pairs": {
        "distill", "distill.objectives", "teachers", "eval.metrics",
    },
    "distill.objectives.trajectory": {
        "distill", "distill.objectives", "distill.objectives.consistency", "students", "teachers",
    },
    "distill.objectives.dmd2_options": {"distill", "distill.objectives", "students", "teachers"},
    "distill.objectives.distribution": {
        "distill", "distill.objectives", "distill.objectives.dmd2_options",
        "distill.objectives.pairs", "students", "teachers",
    },
    "distill.objectives.features": {"distill", "distill.objectives", "students", "teachers"},
    "distill.objectives.adversarial": {"distill", "distill.objectives", "students", "teachers"},
    "distill.objectives.smaller": {
        "distill", "distill.objectives", "students", "students.architecture", "teachers",
        "teachers.reduced",
    },
    "distill.config": {
        "distill", "distill.objectives", "distill.objectives.consistency",
        "distill.objectives.flow_maps", "distill.objectives.pairs",
        "distill.objectives.trajectory",
        "distill.objectives.distribution", "distill.objectives.features",
        "distill.objectives.adversarial", "distill.objectives.smaller", "students", "teachers",
        "teachers.storage",
    },
    "distill.data.expansion": {"distill", "teachers", "teachers.storage", "eval"},
    "distill.data.conditions": {"distill", "teachers", "teachers.storage", "eval"},
    "distill.data": {
        "distill", "distill.data.expansion", "distill.data.conditions", "distill.objectives",
        "distill.config", "teachers", "teachers.storage", "teachers.families", "eval",
        "eval.digits", "eval.shapes",
    },
    "distill.sampling": {
        "distill", "distill.config", "distill.data", "students", "students.export", "teachers",
        "teachers.reduced", "teachers.storage", "teachers.families", "teachers.catalogue", "eval",
        "eval.protocols",
    },
    "distill.early_stop": {
        "distill", "distill.config", "distill.data", "distill.sampling", "students",
        "students.export", "teachers", "teachers.storage",
    },
    "distill.pairs": {
        "distill", "distill.config", "distill.data", "distill.sampling", "eval.shapes", "teachers",
        "teachers.storage",
    },
    "distill.publish": {"distill", "students.export", "teachers", "teachers.storage", "eval"},
    "distill.report": {"distill", "distill.config", "distill.publish", "teachers", "eval"},
    "distill.rewards": {
        "distill.objectives", "distill.objectives.trajectory", "distill.config", "distill.data",
        "teachers", "teachers.storage", "eval", "eval.shapes", "eval.metrics",
    },
    "distill.training": {
        "distill", "distill.rewards", "distill.objectives", "distill.objectives.distribution",
        "distill.config", "distill.data", "distill.data.expansion", "distill.sampling",
        "distill.early_stop", "distill.pairs", "distill.publish", "distill.report", "students",
        "students.architecture", "students.export",
        "teachers", "teachers.storage", "teachers.families", "eval", "eval.shapes",
        "eval.protocols",
    },
    "distill.planning": {
        "distill", "distill.objectives", "distill.config", "distill.data", "distill.sampling",
        "distill.training", "students", "students.architecture", "students.export", "teachers",
        "teachers.storage", "teachers.families", "teachers.catalogue", "teachers.diagnosis", "eval",
    },
    "distill.evaluation": {
        "distill", "distill.config", "distill.data", "distill.sampling", "distill.publish",
        "distill.report", "distill.training", "students", "students.export", "teachers",
        "teachers.storage", "teachers.adapters", "teachers.catalogue", "eval", "eval.shapes",
        "eval.metrics", "eval.protocols",
    },
    "distill.averaging": {
        "distill", "distill.config", "distill.data", "distill.sampling", "distill.publish",
        "distill.training", "students", "students.export", "teachers", "teachers.storage", "eval",
        "eval.protocols",
    },
    "distill.pretrain": {
        "distill", "distill.objectives.adversarial", "distill.objectives.smaller",
        "distill.config", "distill.data",
        "distill.sampling", "distill.publish", "distill.training", "distill.evaluation",
        "students", "students.export", "teachers", "teachers.reduced", "teachers.storage",
        "teachers.families", "teachers.catalogue", "eval", "eval.shapes", "eval.protocols",
    },
    "distill.tuning": {
        "distill", "distill.config", "distill.data", "distill.data.expansion", "distill.sampling",
        "distill.publish", "distill.report", "distill.training", "distill.evaluation", "students",
        "students.export", "teachers", "teachers.storage", "eval", "eval.shapes", "eval.metrics",
        "eval.protocols",
    },
    "distill.benchmark": {
        "distill", "distill.objectives", "distill.objectives.features", "distill.config",
        "distill.data", "distill.rewards", "distill.sampling", "distill.pairs", "distill.training",
        "distill.evaluation", "students", "students.export", "teachers", "eval", "eval.protocols",
    },
    "distill.auto": {
        "distill", "distill.config", "distill.data", "distill.planning", "distill.benchmark",
        "students", "teachers", "teachers.storage", "teachers.adapters", "teachers.catalogue",
        "eval",
    },
    "distill.cli": {
        "distill", "distill.objectives", "distill.config", "distill.data", "distill.sampling",
        "distill.pairs", "distill.publish", "distill.report", "distill.training",
        "distill.planning", "distill.auto", "distill.evaluation", "distill.averaging",
        "distill.pretrain", "distill.tuning", "distill.benchmark", "students", "students.metadata",
        "students.export", "teachers", "teachers.storage", "teachers.edm", "teachers.catalogue",
        "eval", "eval.protocols",
    },
}  # fmt: skip
# What others call: names gathered for them, and the command. Nothing of ours imports these.
ENTRIES = {
    "teachers": {"teachers", "teachers.catalogue"},
    "students": {"students"},
    "students.export": {"students.export"},
    "distill.objective": {"distill", "distill.objectives"},
    "distill.__main__": {"distill", "distill.cli"},
}
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@cache
def imported(path: Path) -> set[str]:
    """The modules of this project that a file imports; of `from folder import file`, the file."""
    found = imports(path) & MODULES.keys()
    parents = {name.rpartition(".")[0] for name in found}
    return {name for name in found if name not in parents or MODULES[name].stem != "__init__"}


def folder_of(module: str) -> str:
    """The folder that a module is in, or is."""
    return module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]


def arrows(name: str) -> set[str]:
    """The other folders that a module imports from."""
    return {folder_of(other) for other in imported(MODULES[name])} - {folder_of(name)}


@pytest.mark.parametrize("folder", MAY)
def test_files_import_what_their_folder_may(folder):
    files = [n for n in MODULES if folder_of(n) == folder and n not in ENTRIES]
    beyond = {name: more for name in files if (more := arrows(name) - MAY[folder])}
    assert not beyond


def test_the_table_has_every_folder_and_only_arrows_that_are_used_and_point_one_way():
    assert {folder_of(name) for name in MODULES} == MAY.keys()
    order = list(MAY)
    for folder, may in MAY.items():
        assert all(order.index(other) < order.index(folder) for other in may), folder
        files = [n for n in MODULES if folder_of(n) == folder and n not in ENTRIES]
        assert set().union(*map(arrows, files)) == may, folder


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_gather_names_and_nothing_of_ours_imports_them(name):
    assert {folder_of(other) for other in imported(MODULES[name])} <= ENTRIES[name]
    assert not [other for other, path in MODULES.items() if name in imported(path)]


@pytest.mark.parametrize("folder", MAY)
def test_a_folder_holds_at_most_a_dozen_files_and_says_what_belongs_in_it(folder):
    place = ROOT / folder.replace(".", "/")
    files = [p for p in place.glob("*.py") if p.stem not in ("__init__", "__main__")]
    assert len(files) <= 12
    assert ast.get_docstring(ast.parse((place / "__init__.py").read_text()))


LINES, BRANCHES = 60, 12  # of one function
CHOICES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.match_case)


def branches(node: ast.AST) -> int:
    """Conditions, loops and handlers in a function, without those of functions inside it."""
    count = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        count += isinstance(child, CHOICES) + branches(child)
        if isinstance(child, ast.BoolOp):
            count += len(child.values) - 1
        if isinstance(child, ast.comprehension):
            count += len(child.ifs)
    return count


def functions(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}: {node.name}", node


def test_no_function_of_the_product_is_longer_than_a_screen():
    """60 lines, with signature and docstring."""
    assert [n for n, f in functions("distill") if f.end_lineno - f.lineno >= LINES] == []


def test_no_function_of_the_product_has_more_than_twelve_branches():
    assert [n for n, f in functions("distill") if branches(f) > BRANCHES] == []


def test_branches_are_counted():
    text = "def f(a):\n    for x in a:\n        if x and a or x:\n            pass\n"
    assert branches(ast.parse(text).body[0]) == 4


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda p: p.stem)
def test_objectives_know_nothing_of_the_engine(path):
    ours = {m for m in imports(path) if m.startswith("distill.")}
    allowed = ("distill.objectives", "distill.field_types")
    assert all(m.startswith(allowed) for m in ours), ours
    assert not any(m.split(".")[0] == "accelerate" for m in imports(path))


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda p: p.stem)
def test_an_objective_is_at_most_150_lines_and_cites_its_paper(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_prints_and_nothing_unpickles(path):
    tree = ast.parse(path.read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [c.func.id for c in calls if isinstance(c.func, ast.Name)]
    assert not {"print", "exec"} & set(names)
    loads = [c for c in calls if ast.unparse(c.func) == "torch.load"]
    assert all("weights_only=True" in map(ast.unparse, c.keywords) for c in loads)
    assert unpicklers(tree) == set()


def unpicklers(tree: ast.AST) -> set[str]:
    """What a file imports that could unpickle. The error that torch's safe reader raises cannot."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {name for name in found if name.split(".")[0] in ("pickle", "dill", "joblib")}
    return found - {"pickle.UnpicklingError"}


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("from pickle import UnpicklingError", True),
        ("import pickle", False),
        ("import pickle as p", False),
        ("from pickle import loads", False),
        ("from pickle import UnpicklingError, loads", False),
        ("import pickle\nfrom pickle import UnpicklingError", False),
        ("from pickle import *", False),
        ("import joblib", False),
    ],
)
def test_of_pickle_the_name_of_its_error_alone_may_be_imported(line, allowed):
    assert (unpicklers(ast.parse(line)) == set()) is allowed


def test_help_imports_no_network_library():
    code = "import sys, distill.__main__; print({'torch', 'diffusers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "set()", out.stderr


def test_a_users_own_eval_module_is_named_and_not_imported(tmp_path):
    (tmp_path / "eval.py").write_text("raise SystemExit('wrong module')")
    paths = f"sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({str(ROOT)!r})"
    code = f"import sys; {paths}; import distill"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "fewstep needs its own package 'eval'" in out.stderr
    assert "rename that file" in out.stderr
