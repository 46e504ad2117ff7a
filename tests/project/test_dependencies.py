"""What is imported is declared: as a dependency, or in an extra that its absence names."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("distill", "teachers", "students", "eval", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Where a module's package is called otherwise.
PACKAGE_OF = {"PIL": "pillow", "yaml": "pyyaml", "cleanfid": "clean-fid", "google": "protobuf"}
COMES_WITH = {"pydantic_core": "pydantic"}  # it requires the very version

# Modules that a run may do without: the extra with them, and who says so where they are missing.
OPTIONAL = {
    "datasets": ("data", "distill/data/tables.py"),
    "pyarrow": ("data", "distill/data/tables.py"),
    "resvg_py": ("emoji", "eval/emoji/build.py"),
    "gguf": ("gguf", "teachers/storage/gguf_files.py"),
    "bitsandbytes": ("memory", "distill/training/optimizers.py"),
}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    return {canonical(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def third_party():
    """Each module of others' that our code imports, anywhere in a file, and the files."""
    found = {}
    for file in (f for p in PACKAGES for f in (ROOT / p).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in PACKAGES:
                    found.setdefault(top, set()).add(str(file.relative_to(ROOT)))
    return found


DECLARED = names(PROJECT["dependencies"])
EXTRAS = {k: names(v) for k, v in PROJECT["optional-dependencies"].items()}


def test_every_import_is_declared():
    found = third_party()
    assert {"torch", "diffusers", "pydantic"} <= found.keys()
    for module, files in found.items():
        package = canonical(COMES_WITH.get(module) or PACKAGE_OF.get(module, module))
        if module in OPTIONAL:
            extra, home = OPTIONAL[module]
            assert package in EXTRAS[extra] and package not in DECLARED
            assert files == {home}  # so there is one place that can say it is missing
        else:
            assert package in DECLARED, f"{module} is imported by {sorted(files)}"


def test_the_optional_modules_are_those_in_use():
    assert OPTIONAL.keys() <= third_party().keys()


@pytest.mark.parametrize(("extra", "home"), sorted({*OPTIONAL.values()}))
def test_a_missing_extra_names_its_remedy(extra, home):
    assert f"pip install 'fewstep[{extra}]'" in (ROOT / home).read_text()


def test_what_a_run_needs_at_its_end_comes_with_a_plain_install():
    assert {"transformers", "peft", "lpips", "clean-fid", "sentencepiece", "protobuf"} <= DECLARED
    for line in PROJECT["dependencies"]:
        assert ">=" in line, line  # a floor, which the oldest environment is made of
    assert "scipy>=1.11.1,<1.18" in " ".join(PROJECT["dependencies"]).replace(" ", "")


def test_no_extra_asks_again_for_a_dependency():
    for extra, packages in EXTRAS.items():
        assert not packages & DECLARED, extra
