"""Recipes: every mistake is one line with its place and its remedy, before anything is built."""

import pytest
import yaml

from distill.benchmark.spec import Bench, Row
from distill.config import renamed
from distill.config.objective_schema import networks_of
from distill.config.objectives import OBJECTIVES
from distill.config.recipe import Recipe, find, read_yaml, shipped
from distill.objectives.noise_levels import LogNormal, Uniform
from tests.helpers.refusals import refused
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
        "times": {"low": 0.0, "high": 0.8, "shift": 1.0}, "fake_times": {"mean": -1.2, "std": 1.2},
        "guide_fake": False, "drop": 0.1,
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
        (["train.stesp=5"], ("train.stesp", "steps")),
        (["trian.steps=5"], ("trian", "train")),
        (["objective.alpah=1"], ("objective.alpah", "alpha")),
        (["players.fake.lrr=1"], ("players.fake.lrr", "'lr'")),
        (["players.fkae.lr=1"], ("players.fkae", "fake")),
        (["objective.times.hihg=1"], ("objective.times.hihg", "high")),
        (["objective.name=dmd3"], ("objective.name", "'dmd3'", "dmd")),
        (["objective.scale=1e300"], ("objective.scale", "1e+300", "1e+18")),
        (["objective.scale=1e-300"], ("objective.scale", "1e-300")),
        (["objective.times={shift: 1e30}"], ("objective.times.shift", "1e+30")),
        (["objective={name: ct, last: 2000000}"], ("objective.last", "1048576")),
        (["objective={name: shortcut, levels: 536870912}"], ("objective.levels", "1048576")),
        (["train.steps=-5"], ("train.steps", "1", "5")),
        (["train.steps=many"], ("train.steps", "many")),
        (["train.steps=true"], ("train.steps", "True")),
        (["train.batch=1.5"], ("train.batch", "1.5")),
        (["players.student.lr=-1"], ("players.student.lr", "0", "1")),
        (["players.student.lr=fast"], ("players.student.lr", "fast")),
        (["train.precision=fp8"], ("train.precision", "fp32", "bf16", "fp16", "'fp8'")),
        (["objective=sid"], ("objective", "'sid'")),
        (["train.batch=10", "train.accumulate=3"], ("train.batch", "10")),
        (["critic={}"], ("critic", "section")),
        (["steps"], ("override 'steps'", "steps", "key.path")),
        (["teacher.source.deep=1"], ("override 'teacher.source.deep=1'", "teacher.source")),
        (["train.steps=[1"], ("override 'train.steps=[1'", "'[1'")),
        (["objective.name=dmd2", "critic={}"], ("data.source", "dmd2")),
        (["objective.name=fdistill"], ("critic", "critic: {}")),
        (["objective.name=consistency"], ("data.source", "data.source")),
        (["objective.name=nowhere.py:Mine"], ("objective.name", "nowhere.py")),
        (["train.steps=2020-13-45"], ("override 'train.steps=2020-13-45'", "'2020-13-45'")),
        (["teacher.guidance=.inf"], ("teacher.guidance", "finite")),
        (["teacher.guidance.scale=[3, 2]"], ("teacher.guidance.scale", "3", "2")),
        (["teacher.guidance={scale: 2, sampling_scale: 2}"],
            ("teacher.guidance.sampling_scale", "scale")),
        (["teacher.guidance={scale: [1, 3], sampling_scale: 4}"],
            ("teacher.guidance.sampling_scale", "4", "[1, 3]")),
        (["objective={name: kd}", "data={source: pairs, count: 64}",
            "teacher.guidance={scale: [1, 3]}"], ("teacher.guidance.scale", "kd", "one number")),
        (["players.student.lr=true"], ("players.student.lr", "True")),
        (["student={steps: 4, counts: [3, 4]}"], ("student.counts", "3", "student.steps")),
        (["student={steps: 4, counts: [1, 2]}"], ("student.counts", "[1, 2]", "student.steps, 4")),
        (["student={steps: 4, counts: [2, 2, 4]}"],
            ("student.counts", "[2, 2, 4]", "student.steps, 4")),
        (["student.weights=[1]"], ("student.weights", "student")),
        (["student={steps: 2, counts: [1, 2], weights: [1]}"], ("student.weights", "1", "2")),
        (
            ["objective.name=progressive", "data.source=digits", 
                "student={steps: 2, counts: [1, 2]}"],
            ("student.counts", "objective"),
        ),
        (["train.trackers=3"], ("train.trackers", "3")),
        (["players.student.betas=[1, 1]"], ("players.student.betas.0", "1")),
        (["objective.times={low: 0.9, high: 0.1}"], ("objective.times", "0.9", "0.1")),
        (["objective.times={mean: .nan, std: 1}"], ("objective.times.mean", "finite")),
        (["objective.name=:x"], ("objective.name", "import")),
        (["objective.name=json:JSONDecoder"], ("objective.name", "Objective", "JSONDecoder")),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_place_and_remedy(tmp_path, overrides, line):
    with refused(*line):
        load(tmp_path, GOOD, *overrides)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("teacher: digits\ntrain: {steps: 1}", ("objective",)),
        ("teacher: digits\nobjective: {}\ntrain: {steps: 1}", ("objective.name",)),
        ("- a list", ("recipe */r.yaml", "sections")),
        ("a: [", ("recipe */r.yaml", "<stream end>", "1", "5")),
        (GOOD.replace("steps: 10", "batch: 10"), ("train.steps",)),
    ],
)
def test_a_recipe_that_is_not_whole_says_what_is_missing(tmp_path, text, line):
    with refused(*line):
        load(tmp_path, text)


def test_a_missing_file_names_the_nearest_recipe():
    with refused("recipe 'digits/dmd2-3step'", "digits/dmd2-4step"):
        Recipe.load("digits/dmd2-3step")


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
        "shift": 1.0,
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
    with refused("student.counts", "2", "4"):
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
    with refused("objective.realism", "gan_weight"):
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


@pytest.mark.usefixtures("_unwarned")
@pytest.mark.parametrize("keys", [("realism", "gan_weight"), ("gan_weight", "realism")])
def test_two_names_of_one_key_on_a_command_line_are_refused(keys):
    words = [f"objective.{key}=0.{i}" for i, key in enumerate(keys, 1)]
    with refused(f"override '{words[1]}'", *keys):
        Recipe.load("digits/dmd2", words)
    assert Recipe.load("digits/dmd2", [words[0], words[0]]).objective["gan_weight"] == 0.1


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("ect", {"solver": "ddim"}),
        ("tcm", {"solver": "ddim"}),
        ("shortcut", {"distance": "square"}),
        ("shortcut", {"huber_c": 0.1}),
        ("ayf", {"power": 0.5}),
        ("anyflow", {"power": 0.5}),
    ],
)
def test_an_option_that_the_loss_never_reads_is_refused(name, option):
    """Its default is accepted: recipes that are written in full have it."""
    tree = Recipe.load(f"digits/{name}", []).tree()
    (key,) = option
    with refused(f"objective.{key}", "no use for it"):
        Recipe.check({**tree, "objective": {**tree["objective"], **option}}, "recipe")
    Recipe.check(tree)


def test_an_encoder_where_the_fake_score_is_the_critic_is_refused():
    tree = Recipe.load("digits/sida", []).tree()
    with refused("critic.encoder", "fake score itself"):
        Recipe.check({**tree, "critic": {"encoder": "mine.py:f"}}, "recipe")
