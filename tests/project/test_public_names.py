"""Names that scripts of users import stay where they are."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PUBLIC = {
    "teachers": "load Codec Denoiser Guided Linear Network Process Teacher UserError",
    "students": "Critic Generator",
    "students.export": "export load_student ExportError",
    "distill.objective": "Batch Count Learns Loss NonNegative Objective Positive Share Turn Whole",
    "distill.config.objectives": "OBJECTIVES",
}
COMMANDS = (
    "run sample eval draw reference report compare card push convert doctor plan cache teach bench "
    "list show"
)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_can_be_imported(module):
    found = import_module(module)
    assert not [name for name in PUBLIC[module].split() if not hasattr(found, name)]


def test_functions_are_not_hidden_by_modules_of_their_name():
    import students.export
    import teachers

    assert callable(teachers.load) and callable(students.export.export)


def test_python_m_distill_has_every_command():
    words = [sys.executable, "-m", "distill", "--help"]
    out = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    named = {line.split()[0] for line in out.splitlines() if line.startswith("  ") and line.strip()}
    assert set(COMMANDS.split()) <= named


def test_a_turn_takes_its_old_argument():
    from distill.objective import Turn

    loss = print
    assert Turn(("student",), loss, fresh=True) == Turn(("student",), loss, reset=True)
    assert Turn(("student",), loss).reset is False and Turn(("student",), loss, True).reset
