"""The systems of students that `distill list students` names."""

import re
from pathlib import Path

import pytest

from distill.config.recipe import SHIPPED, shipped
from distill.config.systems import SYSTEMS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_has_its_file_recipe_and_row(name):
    system = SYSTEMS[name]
    assert (ROOT / system.file).is_file() and system.recipe in shipped()
    header = (SHIPPED / f"{system.recipe}.yaml").read_text()
    assert f"distill {system.command} recipes/{system.recipe}.yaml" in header
    rows = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE)
    assert len(rows) == 1 and system.arxiv in rows[0] and f"`{system.recipe}`" in rows[0]
