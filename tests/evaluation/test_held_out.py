"""Networks that a loss reads: they are recorded, and their figures are no headline."""

import json

import pytest
import yaml

from distill.benchmark import leaderboard
from distill.config.recipe import Recipe
from distill.publish.card import facts_of, metadata, quality
from distill.publish.licence import licence_of
from distill.publish.results_table import advised, best, headline_figure, not_held_out
from distill.report.page import verdict
from distill.sampling.used_networks import of_headline, of_student, record, used_networks
from students import schedulers
from students.export import folder
from teachers import load
from tests.helpers import exports
from tests.helpers.command_line import called

ROW = {"protocol": "shapes", "n": 720, "seeds": 1, "spread": {}, "images_per_s": 10.0}
FIGURES = {"fd": 2.0, "fd_second": 3.0, "coverage": 0.9, "accuracy": 0.95}


def metrics_of(**steps):
    return {"student": {k.removeprefix("at_"): {**ROW, **v} for k, v in steps.items()}}


def recipe(**sections):
    tree = {"teacher": "shapes", "objective": {"name": "dmd2"}, "data": {"source": "shapes"},
            "train": {"steps": 1, "batch": 2}}  # fmt: skip
    return Recipe.check({**tree, "eval": {"protocol": "shapes"}, **sections})


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({}, []),
        ({"rewards": {"a": {"function": "shapes"}}}, ["shapes"]),
        (
            {"rewards": {"a": {"function": "m.py:f"}, "b": {"function": "m.py:g", "network": "x"}}},
            ["m.py:f", "x"],
        ),
        ({"critic": {"encoder": "m.py:dino"}}, ["m.py:dino"]),
        (
            {"critic": {"encoder": "m.py:d", "network": "facebook/dinov2-large"}},
            ["facebook/dinov2-large"],
        ),
        ({"critic": {}}, []),
        ({"objective": {"name": "kd", "distance": "lpips"}}, ["lpips-vgg"]),
        ({"objective": {"name": "kd", "distance": "square"}}, []),
    ],
)
def test_the_networks_of_a_recipe(sections, names):
    tree = recipe(**{k: v for k, v in sections.items() if k != "objective"}).tree()
    assert used_networks({**tree, **sections} if "objective" in sections else tree) == names


def test_a_recipe_of_an_earlier_version_has_no_sections():
    assert used_networks({}) == [] == used_networks({"critic": None, "rewards": None})


@pytest.fixture
def gamed():
    """The summary of a run that raised the classifier of the shapes' figures."""
    metrics = metrics_of(at_1=FIGURES, at_2={**FIGURES, "fd": 1.0, "fd_second": 4.0})
    return {"metrics": metrics, **record(["shapes"], "shapes", metrics["student"])}


def test_the_headline_is_the_first_figure_that_is_held_out(gamed):
    assert gamed["used_networks"] == ["shapes"]
    assert gamed["held_out"] == {
        "fd": False, "fd_second": True, "coverage": False, "accuracy": True
    }  # fmt: skip
    said = verdict(gamed)
    assert said.startswith(
        "In 1 step the student's Fréchet distance, second network is 3.000"
    )  # and not in 2 steps, where the distance of the network in the loss is the lowest
    assert advised([1, 2], gamed) == 1
    assert advised([1, 2], {"metrics": gamed["metrics"]}) == 2
    assert headline_figure(gamed["metrics"]) == "fd"


def test_without_a_figure_that_is_held_out_there_is_no_headline(gamed):
    held = dict.fromkeys(gamed["held_out"], False)
    assert headline_figure(gamed["metrics"], held) is None is best(gamed["metrics"], held)
    assert verdict({**gamed, "held_out": held}) == (
        "Measured by protocol shapes. Not held out, since training used the network that reads "
        "them (shapes), are Fréchet distance, Fréchet distance, second network, coverage, accuracy."
    )


def test_the_sentence_names_what_is_lost_and_why():
    held = {"fd": False, "recall": False, "accuracy": True}
    assert not_held_out({"used_networks": ["b", "a"], "held_out": held}) == (
        "Not held out, since training used the network that reads them (a, b), are "
        "Fréchet distance, recall."
    )
    assert not_held_out({"used_networks": ["a"], "held_out": {"fd": True}}) == ""
    assert not_held_out({}) == ""


def test_a_run_without_such_networks_records_nothing():
    assert record([], "shapes", metrics_of(at_1=FIGURES)["student"]) == {}


def test_weights_that_a_figure_chose_are_not_judged_by_its_network():
    """As `distill average --search` leaves them."""
    tree = recipe(rewards={"a": {"function": "m.py:f"}}).tree()
    assert of_headline("shapes") == "shapes" and of_headline("digits") == "digits"
    assert of_headline("closed form") == ""
    used = of_student({"recipe": tree, "chosen_by": of_headline("shapes")})
    assert used == ["m.py:f", "shapes"]
    assert record(used, "shapes", {"1": FIGURES})["held_out"]["fd"] is False
    assert of_student({"recipe": None}) == []


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of a student whose recipe raises a reward of the digits' classifier."""
    teacher, out = load("digits"), tmp_path_factory.mktemp("digits") / "student"
    tree = {
        "teacher": "digits",
        "objective": {"name": "dmd2"},
        "data": {"source": "digits"},
        "train": {"steps": 1, "batch": 2},
        "rewards": {"mine": {"function": "mine.py:f", "network": "digits"}},
    }
    with exports.in_this_process():
        folder.export(schedulers.student(teacher, 1), teacher, out, Recipe.check(tree).tree())
    return out


def test_a_card_says_so_and_lists_held_out_figures_alone(student, gamed):
    facts = facts_of(student, {**gamed, "steps": 5, "wall_s": 1.0}, "me/few")
    assert quality(facts).endswith("are Fréchet distance, coverage.")
    front = yaml.safe_load(metadata(facts, licence_of("digits")))
    found = {m["type"] for r in front["model-index"][0]["results"] for m in r["metrics"]}
    assert found == {"fd_second", "accuracy"}


def test_rows_that_are_not_held_out_are_marked_and_come_after_the_others():
    def line(name, fd, lost=()):
        metrics = {k: {"mean": fd, "spread": 0.0} for k in ("fd", "fd_second")}
        return leaderboard.LeaderboardRow(
            name, "student", "dmd2", 1, [0], metrics, 1, 1, 1, 1, not_held_out=[*lost]
        )

    lines = [line("gamed", 0.1, ["fd"]), line("a", 0.5), line("b", 0.3)]
    lines.append(leaderboard.LeaderboardRow("failed", "student", "dmd2", None, [], {}))
    assert [v.name for v in leaderboard.ordered(lines)] == ["b", "a", "gamed", "failed"]
    table = leaderboard.table([lines[0]])
    assert "0.100†" in table and table.count("†") == 1


def test_distill_eval_says_it_of_a_student_that_was_so_trained(student, capsys, tmp_path):
    out, run = tmp_path / "figures.json", tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(student)  # of a run's folder, too
    code, said, _ = called(capsys, "eval", run, "--seeds", "1", "--json", out)
    assert code == 0
    assert "Not held out" in said and "(digits)" in said
    tree = json.loads(out.read_text())
    assert tree["used_networks"] == ["digits"]
    assert tree["held_out"] == {
        "fd": False, "fd_second": True, "precision": False, "recall": False, "coverage": False,
        "accuracy": False,
    }  # fmt: skip
