"""Recipes: every mistake is one line with its place and its remedy, before anything is built."""

import pytest
import yaml

from distill.benchmark.spec import Bench, Row
from distill.config import renamed
from distill.config.recipe import Recipe, find, networks_of, read_yaml, shipped
from distill.objectives import OBJECTIVES
from distill.objectives.losses import LogNormal, Uniform
from teachers import UserError
from tests.helpers.toys import recipe_tree


def load(tmp_path, text, *overrides):
    (tmp_path / "r.yaml").write_text(text)
    return Recipe.load(tmp_path / "r.yaml", overrides)


GOOD = """
teacher: digits
objective: {name: sid}
train: {steps: 10}
"""


def test_defaults_are_spelled_out(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert recipe.objective == {
        "name": "sid", "alpha": 1.2, "fake_sees": "places", "scale": 100.0,
        "times": {"low": 0.0, "high": 0.8}, "fake_times": {"mean": -1.2, "std": 1.2},
    }  # fmt: skip
    assert Recipe.check(recipe.tree()) == recipe


def test_overrides_reach_any_depth(tmp_path):
    recipe = load(tmp_path, GOOD, "train.steps=7", "objective.times={mean: -1, std: 2}",
                  "players.fake.lr=1e-3", "teacher.guidance=2")  # fmt: skip
    assert recipe.train.steps == 7
    assert recipe.players["fake"].lr == 1e-3
    assert recipe.teacher.guidance == 2
    assert recipe.keys_schema().model_validate(
        {"times": {"mean": -1, "std": 2}}
    ).times == LogNormal(-1, 2)
    assert recipe.objective["times"] == {"mean": -1.0, "std": 2.0}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.stesp=5"], "train.stesp: unknown key; did you mean 'steps'?"),
        (["trian.steps=5"], "trian: unknown key; did you mean 'train'?"),
        (["objective.alpah=1"], "objective.alpah: unknown key; did you mean 'alpha'?"),
        (["players.fake.lrr=1"], "players.fake.lrr: unknown key; did you mean 'lr'?"),
        (["players.fkae.lr=1"], "players.fkae: sid has no such player; did you mean 'fake'?"),
        (["objective.times.hihg=1"], "objective.times.hihg: unknown key; did you mean 'high'?"),
        (["objective.name=dmd"], "objective.name: 'dmd' is unknown; did you mean 'dmd2'?"),
        (["train.steps=-5"], "train.steps: expected greater than or equal to 1, not -5"),
        (["train.steps=many"], "train.steps: expected a valid integer, not 'many'"),
        (["train.steps=true"], "train.steps: expected a valid integer, not True"),
        (["train.batch=1.5"], "train.batch: expected a valid integer, not 1.5"),
        (["players.student.lr=-1"], "players.student.lr: expected greater than 0, not -1"),
        (["players.student.lr=fast"], "players.student.lr: expected a valid number"),
        (["train.precision=fp8"], "train.precision: expected 'fp32', 'bf16' or 'fp16', not 'fp8'"),
        (["objective=sid"], "objective: expected a section of keys, not 'sid'"),
        (["train.batch=10", "train.accumulate=3"], "train.batch: 10 does not divide into"),
        (["critic={}"], "critic: sid has no critic; remove the section"),
        (["steps"], "override 'steps': expected key.path=value"),
        (["data.prompts="], "override 'data.prompts=': no value; write null"),
        (["teacher.source.deep=1"], "override 'teacher.source.deep=1': teacher.source is a value"),
        (["train.steps=[1"], "is not valid YAML"),
        (["objective.name=dmd2", "critic={}"], "dmd2 needs real data, which its critic compares"),
        (["objective.name=fdistill"], "critic: fdistill needs one; add the section 'critic: {}'"),
        (["objective.name=consistency"], "data.source is missing: consistency needs real data"),
        (["objective.name=nowhere.py:Mine"], "cannot import 'nowhere.py'"),
        (["train.steps=2020-13-45"], "is not valid YAML"),
        (["teacher.guidance=.inf"], "teacher.guidance: expected a finite number, not inf"),
        (["players.student.lr=true"], "players.student.lr: expected a number, not True"),
        (["student={steps: 4, counts: [3, 4]}"], "student.counts: 3 does not divide student.steps"),
        (["student={steps: 4, counts: [1, 2]}"], "[1, 2] should hold student.steps, 4"),
        (["student={steps: 4, counts: [2, 2, 4]}"], "no count twice"),
        (["student.weights=[1]"], "student.weights: nothing to weigh"),
        (["student={steps: 2, counts: [1, 2], weights: [1]}"], "1 weights for 2 counts"),
        (
            ["objective.name=progressive", "data.source=digits", 
                "student={steps: 2, counts: [1, 2]}"],
            "student.counts: this objective's last stage trains one count; remove it",
        ),
        (["train.trackers=3"], "train.trackers: expected a list, not 3"),
        (["players.student.betas=[1, 1]"], "players.student.betas.0: expected less than 1"),
        (["objective.times={low: 0.9, high: 0.1}"], "low, 0.9, is above high, 0.1"),
        (["objective.times={mean: .nan, std: 1}"], "expected a finite number, not nan"),
        (["objective.name=:x"], "cannot import ''"),
        (["objective.name=json:JSONDecoder"], "json has no Objective named 'JSONDecoder'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_place_and_remedy(tmp_path, overrides, line):
    with pytest.raises(UserError) as error:
        load(tmp_path, GOOD, *overrides)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("teacher: digits\ntrain: {steps: 1}", "objective: missing"),
        ("teacher: digits\nobjective: {}\ntrain: {steps: 1}", "objective.name is missing"),
        ("- a list", "expected a mapping of sections"),
        ("a: [", "not valid YAML"),
        (GOOD.replace("steps: 10", "batch: 10"), "train.steps: missing"),
    ],
)
def test_a_recipe_that_is_not_whole_says_what_is_missing(tmp_path, text, line):
    with pytest.raises(UserError, match=line.replace("[", r"\[")):
        load(tmp_path, text)


def test_a_missing_file_names_the_nearest_recipe():
    with pytest.raises(UserError, match=r"no such file; did you mean 'digits/dmd2'"):
        Recipe.load("digits/dmd")


RUNS = [n for n in shipped() if not n.startswith(("teachers/", "bench/"))]


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_recipe_is_valid_and_short(name):
    from distill.config.recipe import SHIPPED

    Recipe.load(name)
    Recipe.load(f"recipes/{name}.yaml")
    assert len((SHIPPED / f"{name}.yaml").read_text().splitlines()) <= 35


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith(("digits/", "shapes/"))])
def test_every_recipes_header_carries_a_measured_result(name):
    from distill.config.recipe import SHIPPED

    header = [v for v in (SHIPPED / f"{name}.yaml").read_text().splitlines() if v.startswith("#")]
    assert any("Measured on" in v for v in header), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objectives_signature_is_its_schema(name):
    kind = OBJECTIVES[name]
    assert {"teacher", "student"} <= set(networks_of(kind))
    assert isinstance(kind.needs_data, str)


def test_the_networks_an_objective_names_are_known_from_its_fields():
    assert networks_of(OBJECTIVES["dmd2"]) == {
        "teacher": True,
        "student": True,
        "fake": True,
        "critic": False,
    }
    assert networks_of(OBJECTIVES["fdistill"])["critic"] is True


def test_small_recipes_of_the_tests_are_valid(pipelines):
    assert Recipe.check(recipe_tree("dmd2", pipelines["edm"])).objective["times"] == {
        "low": 0.02,
        "high": 0.98,
    }
    assert Uniform(0.02, 0.98) == OBJECTIVES["dmd2"].times


@pytest.mark.parametrize(
    ("section", "learns", "trained"),
    [
        ("{steps: 4}", "chains", {4: 4}),
        ("{steps: 4}", "one-chain", {4: 4}),
        ("{steps: 4}", "all-times", {1: 1, 2: 2, 4: 4}),
        ("{steps: 4, counts: [4, 1]}", "all-times", {1: 1, 4: 4}),
        ("{steps: 4, counts: [1, 2, 4]}", "chains", {1: 1, 2: 2, 4: 4}),
        ("{steps: 4, counts: [4, 1], weights: [3, 2]}", "chains", {1: 2, 4: 3}),
    ],
)
def test_a_student_is_trained_for_its_own_steps_unless_told(tmp_path, section, learns, trained):
    recipe = load(tmp_path, GOOD, f"student={section}")
    assert recipe.student.trained(learns, (1, 2, 4)) == trained


def test_counts_without_times_in_the_scheduler_are_refused(tmp_path):
    recipe = load(tmp_path, GOOD, "student={steps: 4, counts: [2, 4]}")
    with pytest.raises(UserError, match="no times for 2 of 4 steps"):
        recipe.student.trained("chains", (4,))


OLD_NAMES = [
    ("digits/dmd2", "objective.realism", "gan_weight", 0.2),
    ("digits/dmd2", "objective.critique", "critic_weight", 0.3),
    ("digits/dmd2", "objective.reuse", "share_samples", True),
    ("digits/dmd2", "objective.rivals_see", "fake_sees", "places"),
    ("digits/sid", "objective.rivals_see", "fake_sees", "last"),
    ("digits/fdistill", "objective.memory", "ratio_ema", 0.4),
    ("digits/progressive", "objective.first", "initial_steps", 8),
]


@pytest.fixture
def _unwarned(monkeypatch):
    monkeypatch.setattr(renamed, "_warned", set())


@pytest.mark.usefixtures("_unwarned")
@pytest.mark.parametrize(("name", "old", "new", "value"), OLD_NAMES)
def test_an_old_key_is_read_with_one_line(name, old, new, value, tmp_path, capsys):
    tree = read_yaml(find(name))
    tree["objective"].pop(new, None)
    tree["objective"][old.partition(".")[2]] = value
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(tree))
    for recipe in (Recipe.load(file), Recipe.load(name, [f"{old}={yaml.safe_dump(value)}"])):
        assert recipe.objective[new] == value
        assert old.partition(".")[2] not in recipe.objective
    line = f"distill: {old} is now objective.{new}; the old name will go with the next release\n"
    assert capsys.readouterr().err == line


@pytest.mark.usefixtures("_unwarned")
def test_a_benchmarks_old_keys_are_laid_over_new_ones(capsys):
    row = {"name": "old", "recipe": "digits/dmd2", "overrides": {"objective": {"realism": 0.7}}}
    tree = {
        "budget": {"seconds": 1},
        "seeds": [0],
        "common": {"train": {"batch": 8}},
        "rows": [row],
    }
    assert Bench.model_validate(tree).recipe(Row(**row), 0).objective["gan_weight"] == 0.7
    assert "objective.realism is now" in capsys.readouterr().err


def test_a_key_under_both_names_is_refused():
    tree = read_yaml(find("digits/dmd2"))
    tree["objective"] |= {"realism": 0.1, "gan_weight": 0.1}
    with pytest.raises(UserError, match=r"^objective\.realism: .*gan_weight"):
        renamed.current_names(tree)


def test_a_field_of_ones_own_objective_may_have_an_old_name():
    tree = {"objective": {"name": "mine.py:Mine", "first": 3, "memory": 1}}
    assert renamed.current_names(tree) == tree
    assert renamed.current_key("objective.first", tree) == "objective.first"


@pytest.mark.usefixtures("_unwarned")
def test_old_keys_of_a_text_teacher_are_read():
    tree = read_yaml(find("teachers/shapes"))
    optimizer = tree["train"]["vae"].pop("optimizer")
    tree["train"]["vae"]["moves"] = optimizer
    assert renamed.current_names(tree)["train"]["vae"]["optimizer"] == optimizer
    assert renamed.current_key("train.unet.moves.lr", tree) == "train.unet.optimizer.lr"
