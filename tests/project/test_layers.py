"""The design, enforced: who may import whom, how long an objective may be, what never appears."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("teachers", "students", "distill", "eval")
FILES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
OBJECTIVES = [p for p in sorted((ROOT / "distill/objectives").glob("*.py")) if p.stem != "__init__"]

# What each package may import of the others.
MAY = {
    "teachers": {"teachers"},
    "students": {"teachers", "students"},
    "distill": {"teachers", "students", "distill"},
    "eval": {"eval"},
}
SHARED = ("eval.images", "eval.text")  # readers of files, which import nothing and serve all
SEES_ALL = {
    f"distill/{name}.py"
    for name in (
        "baselines",
        "build",
        "evaluation",
        "catalogue",
        "commands/measuring",
        "asked",
        "drawing",
        "finish",
        "measure",
        "race",
        "references",
        "sources",
        "teach",
    )
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    name = str(path.relative_to(ROOT))
    ours = {m.split(".")[0] for m in imports(path) if not m.startswith(SHARED)} & set(PACKAGES)
    allowed = set(PACKAGES) if name in SEES_ALL else MAY[name.split("/")[0]]
    assert ours <= allowed


@pytest.mark.parametrize("name", SHARED)
def test_shared_readers_import_none_of_the_packages(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert not {m.split(".")[0] for m in imports(path)} & set(PACKAGES)


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda p: p.stem)
def test_objectives_know_nothing_of_the_engine(path):
    ours = {m for m in imports(path) if m.startswith("distill.")}
    allowed = (
        "distill.objective",
        "distill.objectives.losses",
        "distill.jvp",
        "distill.objectives",
    )
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
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert not any(isinstance(f, ast.Name) and f.id in ("print", "exec") for f in calls)
    loads = [f for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f) == "torch.load"]
    assert not loads
    assert not {"pickle", "dill", "joblib"} & imports(path)


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
