"""What the docs say is what was measured."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_those_of_the_committed_results():
    result = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], cwd=ROOT)
    assert result.returncode == 0, "run python benchmarks/tables.py"


def test_every_file_that_the_docs_point_to_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
