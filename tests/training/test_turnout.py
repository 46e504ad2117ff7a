"""Players that begin late or wait: warm-ups, and a ratio of updates that follows a scalar."""

import json
import math

import pytest
import torch

from distill.benchmark import budget
from distill.config.optimizer import OptimizerConfig, Wait
from distill.config.recipe import Recipe
from distill.training import build
from tests.benchmark.test_budget import counted
from tests.helpers.engines import stream
from tests.helpers.refusals import refused
from tests.helpers.toys import REWARD, recipe_tree
from tests.training.test_player import player


def run(pipelines, out, name, players, **train):
    tree = recipe_tree(name, pipelines["edm"], **{"steps": 6, **train})
    tree["players"] = players
    return Recipe.check(tree), out


def moves(engine):
    """For each step, the players whose weights moved in it."""
    data, found = stream(engine), []
    before = {n: [p.detach().clone() for p in m.params] for n, m in engine.players.items()}
    while not engine.done:
        engine.advance(data)
        now = {n: [p.detach().clone() for p in m.params] for n, m in engine.players.items()}
        found.append({n for n in now if not all(map(torch.equal, now[n], before[n]))})
        before = now
    data.close()
    return found


@pytest.mark.parametrize(
    ("players", "learning"),
    [
        ({}, ["sfc", "fc", "sfc", "fc", "sfc", "fc"]),  # the student's turn is every second
        ({"student": {"begins": 3}}, ["fc", "fc", "fc", "fc", "sfc", "fc"]),
        ({"critic": {"begins": 2}, "fake": {"begins": 1}}, ["s", "f", "sfc", "fc", "sfc", "fc"]),
    ],
)
def test_a_player_learns_from_the_step_that_it_begins_in(players, learning, pipelines, tmp_path):
    recipe, out = run(pipelines, tmp_path / "run", "dmd2", players)
    found = moves(build.build(recipe, out).engine)
    assert [{name[0] for name in names} for names in found] == [set(v) for v in learning]


def test_what_nobody_learns_from_is_not_evaluated_and_budgets_know_it(pipelines, tmp_path):
    players = {"student": {"begins": 3}, "fake": {"begins": 2}}
    recipe, out = run(pipelines, tmp_path / "run", "sid", players)
    foretold = budget.evaluations_after_steps(recipe)
    spent = counted(recipe, out)
    assert [next(foretold) for _ in range(6)] == spent
    assert spent[:2] == [0, 0]
    assert spent[3] - spent[2] > spent[2] > 0


def test_the_schedule_starts_where_the_player_begins():
    whole = player(OptimizerConfig(lr=1.0, decay="linear", begins=3), steps=13)[1]
    assert [whole.rate(k) for k in (3, 8, 13)] == [1, 0.5, 0]  # ends with the training
    moved = OptimizerConfig(lr=1.0, warmup=1, decay="linear", decay_steps=4, begins=3)
    mover = player(moved)[1]
    assert [mover.rate(k) for k in range(3, 8)] == [0.5, 0.75, 0.5, 0.25, 0]
    mover.restart(1)
    assert mover.schedule_start == 3
    mover.restart(5)
    assert mover.rate(5) == 0.5


def test_one_that_waits_learns_once_in_the_steps_between_logs():
    waits = OptimizerConfig(waits=Wait("critic/accuracy", 0.8))
    mover = player(waits)[1]
    with mover.turn(7):
        pass
    for value, learns in ((0.9, False), (0.7, True), (0.8, True), (math.nan, True)):
        mover.hear({"critic/accuracy": value, "critic/loss": 9.0})
        assert mover.learns(11, every=5) == learns
        assert mover.learns(12, every=5)
    mover.hear({"critic/accuracy": 0.9})
    mover.hear({"critic/loss": 0.0})  # what it waits for was not logged: as before
    assert not mover.learns(11, every=5)
    twin = player(waits)[1]
    twin.load_state_dict(mover.state_dict())
    assert twin.waiting and twin.learned == 7


def test_one_whose_turns_are_not_in_logged_steps_learns_while_it_waits(pipelines, tmp_path):
    waits = {"scalar": "student/matching", "above": -1e9}
    recipe, out = run(
        pipelines, tmp_path / "run", "dmd2", {"student": {"waits": waits}}, log_every=2
    )
    engine, steps = build.build(recipe, out).engine, []
    advance = engine.advance
    engine.advance = lambda data: (advance(data), steps.append(engine.players["student"].learned))[
        0
    ]
    engine.train()
    assert steps == [0, 0, 2, 2, 4, 4]  # its turns are those of even steps, and logs of odd ones


@pytest.mark.parametrize(("above", "learning"), [
    (-1.0, ["sc", "sc", "s", "sc", "s", "sc"]), (2.0, ["sc"] * 6),
])  # fmt: skip
def test_the_engine_tells_players_what_is_logged(above, learning, pipelines, tmp_path):
    """Accuracy is from 0 to 1: the critic waits after the first log, or never."""
    waits = {"scalar": "critic/accuracy", "above": above}
    recipe, out = run(pipelines, tmp_path / "run", "ladd", {"critic": {"waits": waits}})
    engine, found = build.build(recipe, out).engine, []
    play = engine.play

    def noted(turn, place, data):
        found.append((engine.step, set(engine._learning(turn))))
        return play(turn, place, data)

    engine.play = noted
    engine.train()
    by_step = [set().union(*(v for k, v in found if k == step)) for step in range(6)]
    assert [{name[0] for name in names} for names in by_step] == [set(v) for v in learning]


@pytest.mark.parametrize("name", ["ladd", "dmd2"])
def test_a_scalar_that_nothing_logs_is_refused_in_the_first_step(name, pipelines, tmp_path):
    waits = {"scalar": "critic/accurcy", "above": 0.8}
    recipe, out = run(pipelines, tmp_path / "run", name, {"critic": {"waits": waits}})
    engine = build.build(recipe, out).engine
    with refused("players.critic.waits", "'critic/accurcy'", "critic/accuracy"):
        engine.train()
    assert engine.step == 0


def test_the_scalars_player_may_learn_with_others_or_begin_later(pipelines, tmp_path):
    players = {
        "student": {"begins": 4},
        "fake": {"waits": {"scalar": "student/gap", "above": 99}},
        "critic": {"waits": {"scalar": "critic/accuracy", "above": -1}},
    }
    recipe, out = run(pipelines, tmp_path / "run", "dmd2", players)
    engine = build.build(recipe, out).engine
    engine.train()
    assert engine.players["critic"].waiting and not engine.players["fake"].waiting
    logged = ["fake+critic/loss", "fake+critic/accuracy", "student/loss"]
    assert Wait("critic/accuracy", 0).found(logged) == "fake+critic/accuracy"
    assert Wait("student/accuracy", 0).found(logged) is None
    with refused("players.fake.waits.scalar", "'studnt/loss'", "student/loss"):
        run(pipelines, None, "sid", {"fake": {"waits": {"scalar": "studnt/loss", "above": 1}}})


@pytest.mark.parametrize("scalar", ["fake+critic/accuracy", "critic/accuracy", "critic/accurcy"])
def test_a_scalar_of_a_player_that_begins_later_is_waited_for(scalar, pipelines, tmp_path):
    players = {"fake": {"begins": 3}, "critic": {"begins": 3}}
    players["student"] = {"waits": {"scalar": scalar, "above": 2.0}}
    recipe, out = run(pipelines, tmp_path / "run", "dmd2", players, log_every=1)
    engine = build.build(recipe, out).engine
    if scalar.endswith("accuracy"):
        engine.train()
    else:
        with refused("players.student.waits", scalar, "critic/accuracy"):
            engine.train()
    assert engine.step == (6 if scalar.endswith("accuracy") else 3)


def test_a_player_that_would_never_learn_is_refused(pipelines):
    with refused("players.student.begins", "step 6", "train.steps"):
        run(pipelines, None, "sid", {"student": {"begins": 6}})


def test_a_run_logs_and_saves_before_anything_has_been_learned(pipelines, tmp_path):
    recipe, out = run(
        pipelines, tmp_path / "run", "lagrangian", {"student": {"begins": 3}}, log_every=1
    )
    engine = build.build(recipe, out).engine
    engine.train()
    lines = [json.loads(v) for v in (out / "metrics.jsonl").read_text().splitlines()]
    assert ["student/loss" in v for v in lines] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("kind", [{"kind": "ranked"}, {"balance": True}, {"kind": "weighted"}])
def test_samples_are_ranked_while_the_student_waits(kind, pipelines, tmp_path):
    recipe, out = run(pipelines, tmp_path / "run", "dmd2", {"student": {"begins": 3}})
    mine = {"function": f"{REWARD}:brightness"}
    rewards = {"order": {**mine, "kind": "ranked", "balance": True}, "other": {**mine, **kind}}
    tree = recipe.tree() | {"rewards": rewards}
    found = moves(build.build(Recipe.check(tree), out).engine)
    assert [{name[0] for name in names} for names in found][:4] == [
        set("rfc"), set("fc"), set("rfc"), set("fc"),
    ]  # fmt: skip
