"""Budgets: the steps that they buy, counted beforehand, against what real runs count."""

import pytest

from distill.benchmark import budget
from distill.config.recipe import Recipe
from distill.training import build
from tests.helpers.engines import stream
from tests.helpers.refusals import refused
from tests.helpers.toys import FIVE, recipe_tree


def counted(recipe, out):
    """The evaluations after each step of a real run."""
    engine = build.build(recipe, out).engine
    batches, found = stream(engine), []
    for _ in range(recipe.train.steps):
        engine.advance(batches)
        found.append(sum(engine.evaluations.values()))
    batches.close()
    return found


@pytest.mark.parametrize("name", [*FIVE, "ect", "sida", "uni-instruct"])
def test_evaluations_are_foretold_step_by_step(name, pipelines, tmp_path):
    tree = recipe_tree(name, pipelines["edm"], steps=6, seed=3)
    if name == "sid":  # random counts and places in the chain: each step costs its own
        tree["student"] = {"steps": 4}
    recipe = Recipe.check(tree)
    foretold = budget.evaluations_after_steps(recipe)
    assert [next(foretold) for _ in range(6)] == counted(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", ["cmt", "imm", "meanflow", "ctm"])
def test_shares_and_groups_of_a_batch_count_as_they_run(name, pipelines, tmp_path):
    """The student has one step, so that as many samples as steps are no part of the batch."""
    tree = recipe_tree(name, pipelines["edm"], steps=2, batch=8)
    if name == "meanflow":
        tree["objective"]["equal"] = 0.75
    if name == "ctm":  # balances its terms by gradients, through the critic as well
        tree |= {"critic": {}, "objective": {"name": name, "levels": 4, "solver_steps": 2}}
    recipe = Recipe.check(tree)
    foretold = budget.evaluations_after_steps(recipe)
    assert [next(foretold) for _ in range(2)] == counted(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", ["mmd", "fd-loss", "drift"])
def test_features_of_a_guided_teacher_count_once(name, pipelines, tmp_path):
    tree = recipe_tree(name, pipelines["edm"], steps=3)
    tree["teacher"]["guidance"] = 2.0
    tree["student"] = {"steps": 2}
    if name == "fd-loss":  # data are read in the first steps alone
        tree["objective"]["reference_steps"] = 2
    recipe = Recipe.check(tree)
    foretold = budget.evaluations_after_steps(recipe)
    assert [next(foretold) for _ in range(3)] == counted(recipe, tmp_path / "run")


@pytest.mark.parametrize("adapters", [None, {"rank": 2}], ids=["full", "lora"])
def test_a_guided_teacher_counts_twice(adapters, pipelines, tmp_path):
    tree = recipe_tree("sid", pipelines["edm"], steps=2)
    tree["teacher"]["guidance"] = 2.0
    recipe = Recipe.check({**tree, "adapters": adapters})
    foretold = budget.evaluations_after_steps(recipe)
    assert [next(foretold) for _ in range(2)] == counted(recipe, tmp_path / "run")
    # student twice, fake twice, and the guided teacher with its two halves; 8 samples a step
    assert next(budget.evaluations_after_steps(recipe)) == 8 * (2 + 2 + 2)


@pytest.mark.parametrize("ranked", [False, True], ids=["nobody", "ranking"])
def test_steps_before_a_player_begins_count_as_they_run(ranked, pipelines, tmp_path):
    """They are free where nobody learns; what orders samples learns in the student's turn."""
    tree = recipe_tree("sid", pipelines["edm"], steps=4)
    tree["players"] = {"student": {"begins": 2}, "fake": {"begins": 1}}
    if ranked:
        file = tmp_path / "mine.py"
        file.write_text("def bright(images, prompts):\n    return images.flatten(1).mean(1)\n")
        tree["rewards"] = {"bright": {"function": f"{file}:bright", "kind": "ranked"}}
    recipe = Recipe.check(tree)
    foretold = budget.evaluations_after_steps(recipe)
    found = counted(recipe, tmp_path / "run")
    assert [next(foretold) for _ in range(4)] == found
    assert (found[0] > 0) == ranked
    assert budget.steps_for_evaluations(recipe, found[-1]) == 4


def test_a_budget_buys_the_most_steps_that_do_not_exceed_it(pipelines):
    recipe = Recipe.check(recipe_tree("sid", pipelines["edm"], batch=8))
    each = 8 * 5  # student and fake twice, teacher once
    assert budget.steps_for_evaluations(recipe, 10 * each) == 10
    assert budget.steps_for_evaluations(recipe, 11 * each - 1) == 10


def test_networks_compute_again_once_they_were_counted(pipelines, tmp_path):
    from teachers.denoiser import Network

    before = Network.forward
    recipe = Recipe.check(recipe_tree("dmd2", pipelines["edm"]))
    next(budget.evaluations_after_steps(recipe))
    assert Network.forward is before


def test_a_budget_below_one_step_is_refused(pipelines):
    recipe = Recipe.check(recipe_tree("sid", pipelines["edm"]))
    with refused("budget", "3"):
        budget.steps_for_evaluations(recipe, 3)


def test_seconds_buy_as_many_steps_as_they_take(pipelines, monkeypatch):
    clock = iter([0.0, budget.TIMED * 0.5, 0.0, budget.TIMED * 0.5])
    monkeypatch.setattr(budget.time, "perf_counter", lambda: next(clock))
    recipe = Recipe.check(recipe_tree("progressive", pipelines["unconditional"]) | {
        "teacher": {"source": "analytic:gaussian"}, "objective": {"name": "sid"}, "data": {},
    })  # fmt: skip
    assert budget.steps_for_seconds(recipe, 10.2) == 20
    with refused("budget", "0.5", "0.2"):
        budget.steps_for_seconds(recipe, 0.2)
