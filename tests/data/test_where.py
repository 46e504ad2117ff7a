"""`data.where`: a source without the conditions that another student learns."""

import pytest
import torch

from distill.config.compare import differences
from distill.config.recipe import Recipe
from distill.config.schema import WhereSection
from distill.data import from_recipe
from distill.data.conditions.part import places_of
from distill.pairs.settings import identity, prompts_of, settings_of
from distill.training.build import grid_prompts
from students.routing.rule import expert_of, first_place
from teachers import load
from teachers.analytic import Gaussian
from teachers.teacher import Pixels, Teacher
from tests.helpers.datasets import folder_of, pixels
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

CAPTIONS = ["a red circle", "Red squares", "a hundred blue circles", "a dark blue sky"]


def recipe(**data):
    tree = {"teacher": {"source": "digits"}, "objective": {"name": "ect"}, "data": data}
    return Recipe.check({**tree, "train": {"steps": 2, "seed": 3}})


def places(prompts, classes=0, **where):
    return places_of(prompts, WhereSection(**where), classes)


def test_words_are_whole_and_of_any_case():
    assert places(CAPTIONS, words=["red"]) == [0, 1]  # and not "hundred"
    assert places(CAPTIONS, words=["circles", "DARK BLUE"]) == [2, 3]
    assert first_place("red, or blue", ["blue", "red"]) == 0
    assert first_place("infrared", ["red"]) is None


def test_a_rule_sends_a_label_to_its_part_and_a_prompt_to_that_of_its_first_word():
    rule = {"by": "labels", "parts": [[0, 1], [2]]}
    assert [expert_of(v, rule) for v in (1, "2", 0)] == [0, 1, 0]
    rule = {"by": "words", "parts": [["blue"], ["red"]]}
    assert expert_of("red and blue", rule) == 1 and expert_of("Blue and red", rule) == 0
    with pytest.raises(ValueError, match="green"):
        expert_of("green", rule)


def test_digits_of_some_labels_are_the_digits_of_those_labels_in_their_order():
    teacher = load("digits")
    whole = from_recipe.source_of(recipe(source="digits"), teacher)
    part = from_recipe.source_of(recipe(source="digits", where={"labels": [7, 2]}), teacher)
    kept = [i for i, label in enumerate(whole.prompts) if label in (2, 7)]
    assert part.size == len(kept) and set(part.prompts) == {2, 7}
    assert torch.equal(part.x, whole.x[kept])
    assert torch.equal(part.cond["class_labels"], whole.cond["class_labels"][kept])


@pytest.mark.parametrize("source", ["digits", None])
def test_a_part_that_is_everything_changes_nothing(source):
    teacher, tree = load("digits"), recipe_tree("sid", "digits")
    tree["data"] = {"source": source}
    plain = from_recipe.source_of(Recipe.check(tree), teacher)
    tree["data"]["where"] = {"labels": list(range(10))}
    part = from_recipe.source_of(Recipe.check(tree), teacher)
    for number in (0, 7):
        for a, b in zip(plain.batch(number, 1, 2, 16), part.batch(number, 1, 2, 16), strict=True):
            assert (a is b is None) or str(a) == str(b)


def test_a_run_on_everything_has_the_plain_runs_weights(pipelines, tmp_path):
    """K = 1 of several students is the run that there was before."""
    weights = []
    for name, where in (("plain", None), ("part", {"labels": list(range(10))})):
        tree = recipe_tree("dmd2", pipelines["edm"])
        tree["data"]["where"], tree["train"]["steps"] = where, 2
        weights.append(trained(Recipe.check(tree), tmp_path / name))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def trained(recipe, out):
    from distill.training.build import build

    run = build(recipe, out)
    run.engine.train()
    return [p.detach().clone() for p in run.student.parameters()]


def test_one_gaussian_of_two_parts_has_their_spread_and_one_of_each_has_not(tmp_path):
    """Data N(±1, ¼): as one Gaussian 1¼ of variance, as two ¼ each; 20,000 of each."""
    file = tmp_path / "data.py"
    file.write_text(
        "import torch\n\ndef data():\n"
        "    labels = torch.arange(40_000) % 2\n"
        "    x = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0)) / 2\n"
        "    return x + (2.0 * labels - 1)[:, None], labels\n"
    )
    teacher = Teacher(Gaussian(torch.zeros(1), torch.eye(1)), Pixels(2, None), (1,), "two")
    for where, mean, variance in ((None, 0, 1.25), ([0], -1, 0.25), ([1], 1, 0.25)):
        keys = {"source": f"{file}:data", "where": where and {"labels": where}}
        batch = from_recipe.source_of(recipe(**keys), teacher).batch(0, 0, 1, 20_000)
        x, x_t = batch.data, batch.data + batch.noise
        slope = ((x - x.mean()) * (x_t - x_t.mean())).mean() / x_t.var()
        assert abs(slope - variance / (variance + 1)) < 0.02  # the denoiser's at σ = 1
        assert abs(x.mean() - mean) < 0.03 and abs(x.var() - variance) < 0.03


def test_files_and_prompts_of_a_part_are_told(tmp_path, capsys):
    for name in "379":
        folder_of(tmp_path / "images" / name, 2, captioned=False)
    keys = {"source": str(tmp_path / "images"), "where": {"labels": [3, 9]}}
    listing = from_recipe.encoding_job(recipe(**keys), pixels(10)).listing
    assert [item.prompt for item in listing.items] == [3, 3, 9, 9]
    assert "4 of 6 items are in data.where" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    tree = recipe_tree("sid", "shapes")
    del tree["teacher"]["null_label"]
    tree["data"] = {"prompts": str(tmp_path / "prompts.txt"), "where": {"words": ["red"]}}
    checked, teacher = Recipe.check(tree), load("shapes")
    listing = from_recipe.encoding_job(checked, teacher).listing
    assert [item.prompt for item in listing.items] == CAPTIONS[:2]
    assert from_recipe.every_prompt(checked, teacher) == CAPTIONS
    assert set(grid_prompts(checked, teacher)) == set(CAPTIONS[:2])


def test_pairs_of_a_part_are_others(tmp_path):
    teacher, prompts, names = load("digits"), [], []
    for where in (None, {"labels": [1, 4]}):
        settings = settings_of(
            Recipe.check(
                {**recipe_tree("kd", "digits"), "data": {"source": "pairs", "where": where}}
            )
        )
        prompts.append(prompts_of(settings, teacher))
        names.append(identity(settings, {}, prompts[-1]))
    assert prompts == [list(range(10)), [1, 4]]
    assert names[0]["prompts"] != names[1]["prompts"] and "where" not in names[0]


def test_a_resumed_run_has_the_same_part():
    trees = [recipe(source="digits", where=w).tree() for w in (None, {"labels": [1]})]
    assert differences(*trees)[0][0] == "data.where"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({}, ["data.where", "labels or words"]),
        ({"labels": [1], "words": ["a"]}, ["data.where", "both"]),
        ({"labels": []}, ["data.where.labels"]),
        ({"words": [""]}, ["data.where.words.0"]),
        ({"labels": [-1]}, ["data.where.labels.0"]),
    ],
)
def test_what_a_recipe_alone_shows_is_refused_in_it(where, words):
    with refused(words[0], *words[1:]):
        recipe(source="digits", where=where)


def test_a_protocol_of_every_condition_is_refused_beside_a_part():
    tree = recipe_tree("sid", "digits")
    tree["data"]["where"], tree["eval"] = {"labels": [1]}, {"protocol": "digits"}
    with refused("eval.protocol", "distill route"):
        Recipe.check(tree)


@pytest.mark.parametrize(
    ("prompts", "classes", "where", "words"),
    [
        ([0, 1], 2, {"labels": [2]}, ["data.where.labels", "2 is no class", "0 to 1"]),
        ([0, 2], 3, {"labels": [1]}, ["data.where.labels", "none of this class"]),
        (CAPTIONS, 0, {"labels": [1]}, ["data.where.labels", "no classes"]),
        ([0, 1], 2, {"words": ["red"]}, ["data.where.words", "no captions", "labels"]),
        (CAPTIONS, 0, {"words": ["red", "orange"]}, ["data.where.words", "'orange'"]),
    ],
)
def test_what_the_data_do_not_have_is_refused(prompts, classes, where, words):
    with refused(words[0], *words[1:]):
        places(prompts, classes, **where)
