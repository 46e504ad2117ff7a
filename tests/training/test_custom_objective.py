"""Objectives in a user's own file: what is refused, and when, and that they resume."""

import json
import sys

import pytest
import torch
import yaml

from distill import __main__ as cli
from distill.config.objective_schema import network_types, objective_class
from distill.config.recipe import Recipe
from distill.training import build
from students.two_time import TwoTime
from teachers import UserError, load
from tests.helpers.command_line import called
from tests.helpers.engines import assert_same
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
        "second turn": ('Turn(("fake",), None)', "names the player 'fake', which does not exist"),
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


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_code_than_it_began_with(pipelines, tmp_path, capsys):
    """A run keeps its objective's file, and goes on with that code only."""
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


WEIGHTING = """
import torch
from dataclasses import dataclass
from distill.objective import Auxiliary, Loss, Objective, Turn
from functools import partial

class Uncertainty(Auxiliary):
    '''u(t) of Karras et al. 2024 (arXiv:2312.02696), linear in 1, t and t².'''

    def __init__(self, start):
        super().__init__()
        self.powers = torch.nn.Parameter(torch.tensor([start, 0.0, 0.0]))

    @classmethod
    def for_objective(cls, teacher):
        return cls(float(teacher.shape[-1]))

    def forward(self, t):
        return torch.stack([t**0, t, t**2], 1) @ self.powers

@dataclass(kw_only=True)
class Weighted(Objective):
    weighting: Uncertainty

    two_times = True

    def turns(self, step):
        yield Turn(("student", "weighting"), partial(self.loss, step=step))

    def loss(self, batch, step):
        t = 0.1 + 0.8 * torch.rand(len(batch.noise), device=batch.noise.device)
        s = t * torch.rand_like(t)
        x_t = self.teacher.process.noise(batch.data, t, batch.noise)
        x = self.student.denoiser(x_t, t, batch.cond, s)
        error = (x - batch.data).square().flatten(1).mean(1)
        u = self.weighting(t)
        return Loss((error / u.exp() + u).mean(), {"u": u.detach().mean()})
"""


def weighted(pipelines, folder, out, steps, resume=False):
    (folder / "weighted.py").write_text(WEIGHTING)
    tree = recipe_tree("ect", pipelines["edm"], steps=steps)
    tree["objective"] = {"name": f"{folder / 'weighted.py'}:Weighted"}
    tree["players"] = {"weighting": {"lr": 0.1}}
    return build.build(Recipe.check(tree), out, resume)


def test_a_learned_weighting_is_a_player_and_a_resumed_run_is_the_run(pipelines, tmp_path):
    whole = weighted(pipelines, tmp_path, tmp_path / "a", 5)
    objective = whole.engine.objective
    assert objective.weighting.powers.tolist() == [8.0, 0.0, 0.0]  # of 8 pixels a side
    assert isinstance(objective.student.denoiser, TwoTime)
    assert set(whole.engine.players) == {"student", "weighting"}
    whole.engine.train()
    assert all(p != q for p, q in zip(objective.weighting.powers.tolist(), (8.0, 0.0, 0.0)))
    assert objective.student.denoiser.embedding.out.weight.any()  # it reads its landing times
    assert whole.engine.evaluations["weighting"] == 0  # no denoiser is evaluated in it
    half = weighted(pipelines, tmp_path, tmp_path / "b", 5)
    half.engine.cfg = half.engine.cfg.model_copy(update={"steps": 3})
    half.engine.train()
    rest = weighted(pipelines, tmp_path, tmp_path / "b", 5, resume=True)
    rest.engine.train()
    assert_same(whole.engine, rest.engine)
    found = rest.engine.objective.weighting.powers
    assert torch.equal(found, objective.weighting.powers)


def test_a_weighting_is_no_network_that_adapters_could_be(pipelines, tmp_path):
    (tmp_path / "weighted.py").write_text(WEIGHTING)
    tree = recipe_tree("ect", pipelines["edm"])
    tree["objective"] = {"name": f"{tmp_path / 'weighted.py'}:Weighted"}
    tree["adapters"] = {"players": ["weighting"]}
    with pytest.raises(UserError, match=r"adapters\.players: .*weighting"):
        Recipe.check(tree)


def test_a_learned_weighting_learns_the_log_of_the_error(tmp_path):
    """Its minimum is u = log |x̂ - x|², here of a network that is fixed."""
    (tmp_path / "weighted.py").write_text(WEIGHTING)
    kind = objective_class(f"{tmp_path / 'weighted.py'}:Weighted")
    teacher = load("analytic:gaussian")
    weighting = network_types(kind)["weighting"].for_objective(teacher)
    t, error = torch.linspace(0, 1, 50), torch.linspace(0, 1, 50).mul(2).exp()
    optimizer = torch.optim.LBFGS(weighting.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        u = weighting(t)
        value = (error / u.exp() + u).mean()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(weighting(t), error.log(), atol=1e-2, rtol=0)
