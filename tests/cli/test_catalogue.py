"""`distill list`: everything there is, each with a whole sentence."""

import pytest

from distill.cli import catalogue
from distill.cli.catalogue import KINDS
from tests.helpers.command_line import called

LISTED = {
    "objectives": "dmd2",
    "students": "tiue",
    "recipes": "digits/dmd2",
    "teachers": "analytic:ring",
    "metrics": "coverage",
    "protocols": "digits",
}


@pytest.mark.parametrize("what", LISTED)
def test_everything_there_is_can_be_listed(what, capsys):
    code, out, _ = called(capsys, "list", what)
    assert code == 0
    assert LISTED[what] in [line.split()[0] for line in out.splitlines()]


def test_a_list_of_nothing_in_particular_is_of_everything_under_its_heading(capsys):
    code, out, _ = called(capsys, "list")
    assert code == 0
    lines = out.splitlines()
    assert [v.strip() for v in lines if not v.startswith(" ")] == list(LISTED)
    for what, name in LISTED.items():
        below = lines[lines.index(what) + 1 :]
        until = next((i for i, v in enumerate(below) if not v.startswith(" ")), len(below))
        assert name in [v.split()[0] for v in below[:until]]


def test_everything_listed_has_a_description_and_no_two_objectives_share_one():
    for kind in KINDS.values():
        assert all(kind().values())
    lines = KINDS["objectives"]()
    assert len(set(lines.values())) == len(lines)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One.\nTwo.", "One."),
        ("One line and\nits rest: 1.5 of it. Two.", "One line and its rest: 1.5 of it."),
        ("As Yin et al. 2024 say. distill run x", "As Yin et al. 2024 say. distill run x"),
        ("One.\ndistill run x", "One."),
        ("No end\n  of it\n\nTwo.", "No end of it"),
    ],
)
def test_what_is_listed_is_the_first_whole_sentence(text, first):
    assert catalogue.sentence(text) == first


def test_a_header_that_runs_over_lines_is_listed_whole():
    lines = KINDS["recipes"]()
    assert lines["shapes/sid-lora"].endswith("as adapters on the teacher's own weights.")
    assert all(v.endswith(".") and v.count(". ") == 0 for v in lines.values()), lines


def test_an_objective_that_requires_a_critic_needs_data():
    lines = catalogue.objectives()
    assert lines["fdistill"].endswith("Needs data.")
    assert lines["dmd2"].endswith("Needs data if it has a critic.")
    assert lines["sid"].endswith("Needs no data.")
