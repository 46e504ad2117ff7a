"""Messages repeat no more than the ends of a long value, whatever it was given for."""

import pytest

from teachers.errors import QUOTED, WORD, UserError, cut, quoted, shortened
from tests.helpers.command_line import called

MOST = 500  # characters of a whole line; one that names all objectives has 410
VALUES = {  # of 5,000 characters
    "word": "x" * 5000,
    "blanks": "ab cd " * 833,
    "path": "abcd/" * 1000,
    "quotes": "a'b\"c " * 714,
    "lines": "ab\ncd: [\n" * 500,
}

RUN = ("run", "digits/dmd2")
EVAL = ("eval", "digits")


def cases():
    """Words of a command line, with V for the long value."""
    yield "run", "V"
    yield "run", "V.yaml"
    yield *RUN, "V"
    yield *RUN, "V=1"
    yield *RUN, "train.V=1"
    yield *RUN, "players.V.lr=1"
    keys = ("train.steps", "train.precision", "train.trackers", "teacher", "teacher.source",
            "teacher.guidance", "teacher.guidance.weaker", "teacher.precision", "student.steps",
            "objective.name", "objective.student_every", "adapters.targets", "adapters.kind",
            "data.source", "data.prompts", "data.size", "eval.protocol", "eval.teacher_solver",
            "critic.blocks", "players.student.lr", "players.student.optimizer")  # fmt: skip
    for key in keys:
        yield *RUN, f"{key}=V"
    yield *RUN, "train.trackers=[V]"
    yield *RUN, "objective.name=V:V"
    yield *RUN, "objective.name=distill.losses:V"
    yield *RUN, "objective.name=V.py:V"
    yield *RUN, "teacher=V.py:V"
    yield *RUN, "teacher=analytic:V"
    yield *RUN, "--out", "V"
    yield "sample", "V", "--out", "a.png"
    yield "sample", "digits", "--out", "V"
    yield "sample", "digits", "--out", "a.png", "--seed", "V"
    yield "eval", "V"
    for option in (
        "protocol",
        "steps",
        "seeds",
        "against",
        "solver",
        "schedule",
        "precision",
        "json",
    ):
        yield *EVAL, f"--{option}", "V"
    yield "draw", "V", "digits", "prompts", "folder"
    yield "draw", "geneval", "digits", "V", "V"
    yield "reference", "V", "V"
    yield "reference", "coco2014", "V"
    yield "report", "V"
    yield "compare", "V"
    yield "card", "V"
    yield "push", "V", "V"
    yield "convert", "V", "V"
    yield "doctor", "V"
    yield "doctor", "digits", "--image", "V"
    yield "plan", "V"
    yield "plan", "digits/dmd2", "--gpu", "V"
    yield "plan", "digits/dmd2", "--json", "V"
    yield "cache", "V"
    yield "teach", "V"
    yield "bench", "V"
    yield "bench", "bench/digits", "V=1"
    yield "bench", "bench/digits", "seeds=V"
    yield "list", "V"
    yield ("V",)
    yield ("--V",)
    yield "run", "--V"


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("words", cases(), ids=" ".join)
def test_no_line_repeats_a_long_value(words, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = called(capsys, *(w.replace("V", value) for w in words))
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("distill: ")
    assert len(err) < MOST
    assert not list(tmp_path.rglob("*"))


def test_both_ends_of_a_long_value_are_shown():
    assert quoted("abc") == "'abc'"
    text = quoted("a" * 300 + "b" * 300)
    assert len(text) == QUOTED and text.startswith("'aaa") and text.endswith("bbb'") and "…" in text
    assert len(cut("x" * 999, 50)) == 50


def test_prose_between_apostrophes_is_left_as_it_is():
    prose = "the teacher's pictures " + "are many, " * 20 + "and the students' are few"
    assert shortened(prose) == prose
    message = f"teacher {'x' * 5000!r}: no such folder; the recipe's key is teacher.source"
    assert len(str(UserError(message))) < QUOTED + 80
    assert str(UserError(message)).endswith("the recipe's key is teacher.source")
    path = "/" + "d/" * 2000 + "file.yaml"
    assert len(str(UserError(f"{path}: damaged"))) <= WORD + 10
    assert "file.yaml: damaged" in str(UserError(f"{path}: damaged"))
