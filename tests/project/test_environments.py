"""The package where a user has it: installed plainly, at the oldest versions, or not installed."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distill import __version__

ROOT = Path(__file__).parent.parent.parent
SPEC = importlib.util.spec_from_file_location("environments", ROOT / "benchmarks/environments.py")
environments = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(environments)


def test_the_oldest_environment_is_made_of_every_declared_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = environments.floors()
    assert len(pins) == len(project["dependencies"])
    assert "scipy==1.11" in " ".join(pins) and not any("," in pin or ">" in pin for pin in pins)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("environments")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_plain_install_runs_to_the_end(folder):
    """What pip installs by itself today runs recipes of digits and shapes to their end."""
    plain = folder / "plain"
    environments.run_all(plain, environments.environment(plain, []))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_oldest_versions_run_to_the_end_and_share_students_with_the_newest(folder):
    """So do the lowest versions of all dependencies; each draws the students of both."""
    plain, oldest = folder / "plain", folder / "oldest"
    newest = environments.environment(plain, [])
    programs = environments.environment(oldest, environments.floors())
    students = [
        *environments.run_all(oldest, programs).values(),
        *environments.run_all(plain, newest).values(),
    ]
    for run in students:
        gap = environments.largest_gap((plain, newest), (oldest, programs), run / "student")
        assert gap < 1e-3, run


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_runs_to_the_end(tmp_path):
    """The dependencies alone are on the path: no metadata of fewstep, no finder of an install."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(importlib.util.find_spec("torch").origin).parent.parent.iterdir():
        if not entry.name.startswith(("fewstep", "__editable__")):
            (site / entry.name).symlink_to(entry)
    start = (
        "import sys, runpy; sys.argv[0] = 'distill';"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(site)!r}];"
        "runpy.run_module('distill', run_name='__main__')"
    )
    words = ["run", "digits/dmd2", *environments.SHORT, "--out", str(tmp_path / "run")]
    # -S leaves this environment's own site-packages out; the export's check needs them again
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-S", "-c", start, *words], check=True, cwd=tmp_path, env=env)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["versions"]["fewstep"] == __version__ and summary["failed"] == {}
