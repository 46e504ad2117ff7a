"""Objectives in a user's own file: what is refused, and when, and that they resume."""

import json
import sys

import pytest
import yaml

from distill import __main__ as cli
from distill.config.recipe import Recipe
from distill.training import build
from tests.helpers.command_line import called
from tests.helpers.refusals import refused_line
from tests.helpers.toys import recipe_tree

MINE = '''
from dataclasses import dataclass
from distill.objective import Loss, Objective, Positive

@dataclass(kw_only=True)
class Regress(Objective):
    """Say at once what the teacher says at once: an objective in one method."""
    at: Positive = 1.0

    def loss(self, batch, step):
        t = batch.noise.new_full((len(batch.noise),), self.at)
        x_t = self.teacher.process.noise(batch.data, t, batch.noise)
        gap = self.student.denoiser(x_t, t, batch.cond) - self.teacher(x_t, t, batch.cond)
        return Loss(gap.square().mean())
'''


def test_an_objective_in_a_users_file_runs_resumes_and_exports(pipelines, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    tree = recipe_tree("sid", pipelines["edm"])
    tree["objective"] = {"name": f"{tmp_path / 'mine.py'}:Regress", "at": 0.9}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    code, _, err = called(
        capsys, "run", tmp_path / "r.yaml", "train.steps=2", "--out", tmp_path / "run"
    )
    assert code == 0, err
    code, _, err = called(
        capsys, "run", tmp_path / "r.yaml", "train.steps=4", "--out", tmp_path / "run", "--resume"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4
    code, _, err = called(
        capsys, "run", tmp_path / "r.yaml", "objective.att=1", "--out", tmp_path / "x"
    )
    assert "did you mean 'at'" in err


PLAYS = """
from dataclasses import dataclass
from functools import partial
from distill.objective import Loss, Objective, Turn

@dataclass(kw_only=True)
class Silent(Objective):
    pass

@dataclass(kw_only=True)
class Lossless(Objective):
    def turns(self, step):
        yield Turn(("student",), partial(self.loss, step=step))

@dataclass(kw_only=True)
class Plays(Objective):
    def loss(self, batch, step):
        return {loss}

    def turns(self, step):
        {turns}
"""
GIVES = "Loss(self.student(batch.noise, batch.cond).square().mean())"


YIELDS = 'yield Turn(("student",), partial(self.loss, step=0))'
MEAN = GIVES[5:-1]


@pytest.mark.parametrize(
    ("name", "turns", "loss", "line"),
    [
        ("Silent", "pass", GIVES, ("Silent",)),
        ("Lossless", "pass", GIVES, ("Lossless",)),
        (
            "Plays",
            'yield Turn(("studnet",), self.loss)',
            GIVES,
            ("'studnet'", "'student'"),
        ),
        (
            "Plays",
            'yield Turn(("teacher",), self.loss)',
            GIVES,
            ("'teacher'", "student"),
        ),
        ("Plays", "yield Turn((), self.loss)", GIVES, (" ()",)),
        (
            "Plays",
            'yield Turn("student", self.loss)',
            GIVES,
            ("players 'student'", "('student',)"),
        ),
        ("Plays", 'yield Turn(("student",), 3)', GIVES, (" int",)),
        ("Plays", 'yield "student"', GIVES, (" str",)),
        (
            "Plays",
            'return Turn(("student",), self.loss)',
            GIVES,
            ("turns(0)", "a Turn"),
        ),
        ("Plays", "return", GIVES, ("turns(0)", "None")),
        ("Plays", "yield from ()", GIVES, ("turns(0)", "nothing")),
        ("Plays", 'yield Turn(("student",), self.loss)', GIVES, ("loss(batch)",)),
        ("Plays", YIELDS.replace("step", "at"), GIVES, ("loss(batch, at=…)",)),
        ("Plays", YIELDS, MEAN, (" Tensor", "Loss(value)")),
        ("Plays", YIELDS, "Loss(batch.noise.new_ones(4))", ("(4,)",)),
        ("Plays", YIELDS, f"Loss({MEAN}.item())", (" float", "scalar")),
        ("Plays", YIELDS, f"Loss({MEAN}.detach())", ("no weight",)),
        ("Plays", YIELDS, f"Loss({MEAN}.long())", ("torch.int64",)),
        ("Plays", YIELDS, f"Loss({MEAN} * 1j)", ("torch.complex64",)),
        ("Plays", YIELDS, f"Loss({MEAN}, None)", ("logs", "None", "dict")),
        (
            "Plays",
            YIELDS,
            f"Loss({MEAN}, {{'a': batch.noise[:3, 0, 0, 0]}})",
            ("logs 'a'", "(3,)"),
        ),
        ("Plays", YIELDS, f"Loss({MEAN}, {{'a': 1.0}})", ("logs 'a'", " float")),
        ("Plays", YIELDS, f"Loss({MEAN}, {{'a': None}})", ("logs 'a'", "None")),
        (
            "Plays",
            YIELDS,
            f"Loss({MEAN}, {{'a': {MEAN} * 1j}})",
            ("logs 'a'", "complex"),
        ),
    ],
)
def test_an_objective_that_cannot_be_played_is_one_line_naming_its_class(
    pipelines, tmp_path, capsys, name, turns, loss, line
):
    recipe = playing(tmp_path, pipelines, turns, loss, name)
    code, _, err = called(capsys, "run", recipe, "--out", tmp_path / "run")
    assert code == 2, err
    refused_line(err, "objective.name", *line)
    assert err.startswith(f"distill: objective.name: {name}: ")
    assert not (tmp_path / "run").exists()


def playing(tmp_path, pipelines, turns, loss, name="Plays"):
    """A recipe with an objective of these turns and this loss, in a user's file."""
    (tmp_path / "mine.py").write_text(PLAYS.format(turns=turns, loss=loss))
    tree = recipe_tree("sid", pipelines["edm"])
    tree["objective"] = {"name": f"{tmp_path / 'mine.py'}:{name}"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("wrong", ["second turn", "second loss"])
def test_a_later_turn_that_cannot_be_played_is_one_line_too(pipelines, tmp_path, capsys, wrong):
    second = {
        "second turn": ('Turn(("fake",), None)', "names the player 'fake', and it has no such"),
        "second loss": ('Turn(("student",), lambda batch: 3)', "its loss returns a int; return"),
    }
    turn, line = second[wrong]
    recipe = playing(tmp_path, pipelines, f"{YIELDS}; yield {turn}", GIVES)
    code, _, err = called(capsys, "run", recipe, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert line in err


def test_what_a_users_loss_raises_keeps_its_traceback_and_leaves_no_folder(
    pipelines, tmp_path, monkeypatch
):
    recipe = playing(tmp_path, pipelines, YIELDS, "Loss(batch.nosie)")
    monkeypatch.setattr(sys, "argv", ["distill", "run", str(recipe), "--out", str(tmp_path / "r")])
    with pytest.raises(AttributeError, match="nosie") as raised:
        cli.main()
    assert raised.traceback[-1].path == tmp_path / "mine.py"
    assert not (tmp_path / "r").exists()


def test_a_users_file_that_exits_is_one_line(pipelines, tmp_path, capsys):
    recipe = playing(tmp_path, pipelines, YIELDS, GIVES)
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(3)\n")
    code, _, err = called(capsys, "run", recipe, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "mine.py' (SystemExit: 3)" in err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_other_code_than_it_began_with(pipelines, tmp_path, capsys):
    recipe, out = playing(tmp_path, pipelines, YIELDS, GIVES), tmp_path / "run"
    words = ("run", recipe, "--out", out)
    assert called(capsys, *words, "train.steps=2")[0] == 0
    kept = (tmp_path / "mine.py").read_bytes()
    (tmp_path / "mine.py").write_bytes(kept.replace(b"square()", b"abs()"))
    code, _, err = called(capsys, *words, "train.steps=4", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--resume: {tmp_path / 'mine.py'} has changed since" in err
    assert f"restore it from {out / 'objective.py'}, or start in another folder" in err
    assert (out / "objective.py").read_bytes() == kept
    (tmp_path / "mine.py").write_bytes(kept)
    assert called(capsys, *words, "train.steps=4", "--resume")[0] == 0


COUNTS = """
from dataclasses import dataclass
from distill.objective import Loss, Objective, Turn

@dataclass(kw_only=True)
class Counts(Objective):
    def __post_init__(self):
        self.asked, self.played, self.computed = [], [], []

    def turns(self, step):
        self.asked = [*self.asked, step]
        yield Turn(("student",), self.loss)
        self.played.append(step)

    def state_dict(self):
        return {"computed": self.computed}

    def load_state_dict(self, state):
        self.computed = state["computed"]

    def loss(self, batch):
        self.computed.append(len(self.computed))
        return Loss(self.student(batch.noise, batch.cond).square().mean())
"""


def test_looking_at_an_objectives_first_turn_leaves_no_trace_in_it(pipelines, tmp_path):
    (tmp_path / "counts.py").write_text(COUNTS)
    tree = recipe_tree("sid", pipelines["edm"], steps=2)
    tree["objective"] = {"name": f"{tmp_path / 'counts.py'}:Counts"}
    engine = build.build(Recipe.check(tree), tmp_path / "run").engine
    engine.train()
    assert engine.objective.asked == engine.objective.played == [0, 1]
    assert engine.objective.computed == [0, 1, 2, 3]  # of two shards at each step
