"""A discriminator's file: `distill teach` writes it, recipes read it, misfits are refused."""

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.config.recipe import Recipe
from distill.pairs.settings import teacher_identity
from distill.planning import forecast
from distill.pretrain.pixels import teach
from distill.publish.card import require_finished
from distill.sampling.discriminator import NAME, check, critic_of
from distill.sampling.guided_teacher import guided, load_teacher
from distill.training import build
from teachers.denoiser import Guided
from teachers.errors import UserError
from teachers.guidance import DiscriminatorGuided, describe
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

KEY = "teacher.discriminator.file"


def taught(tree, out, resume=False):
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return teach(str(file), out, [], resume)


@pytest.fixture(scope="module")
def run(pipelines, tmp_path_factory):
    """The folder of a run that trained a discriminator of a small pipeline."""
    out = tmp_path_factory.mktemp("discriminator") / "run"
    taught(recipe_tree("discriminator", pipelines["edm"]), out)
    return out


def section_of(pipelines, file, teacher=None, **keys):
    source = {"source": teacher or str(pipelines["edm"]), "null_label": 10}
    tree = recipe_tree("ect", source["source"])
    tree["teacher"] = {**source, "discriminator": {"file": str(file), **keys}}
    return Recipe.check(tree).teacher


def point(n=3):
    torch.manual_seed(0)
    cond = {"class_labels": torch.arange(n)}
    return torch.randn(n, 1, 8, 8), torch.tensor([0.3, 0.5, 0.6])[:n], cond


def test_a_run_leaves_the_average_of_the_critics_weights_and_no_student(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["objective"] == "discriminator" and summary["metrics"] == {}
    assert summary["network_evaluations_by_network"]["teacher"] > 0
    assert not (run / "student").exists() and not (run / "samples").exists()
    lines = [json.loads(v) for v in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("critic/lr" in v and "student/lr" not in v for v in lines)


def test_what_is_saved_is_what_is_loaded(pipelines, tmp_path):
    recipe = Recipe.check(recipe_tree("discriminator", pipelines["edm"], ema=0.0))
    taught(recipe.tree(), tmp_path / "run")
    engine = build.build(recipe, tmp_path / "run", resume=True).engine
    section = section_of(pipelines, tmp_path / "run" / NAME)
    teacher = load_teacher(section)
    critic = critic_of(section.discriminator, teacher)
    x_t, t, cond = point()
    with torch.no_grad():
        torch.testing.assert_close(
            critic(x_t, t, cond), engine.objective.critic(x_t, t, cond), rtol=0, atol=0
        )
    assert not any(p.requires_grad for p in critic.parameters())


def test_a_run_that_is_taken_up_again_leaves_the_same_file(pipelines, run, tmp_path):
    tree = recipe_tree("discriminator", pipelines["edm"])
    other = tmp_path / "run"
    taught({**tree, "train": {**tree["train"], "steps": 2}}, other)
    for name, tensor in load_file(other / NAME).items():
        assert tensor.shape == load_file(run / NAME)[name].shape
    taught(tree, other, resume=True)
    ours, whole = load_file(other / NAME), load_file(run / NAME)
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


def test_a_recipes_teacher_is_moved_at_the_levels_of_training(pipelines, run):
    section = section_of(pipelines, run / NAME, scale=2.0)
    teacher = load_teacher(section)
    denoiser = guided(section, teacher)
    assert isinstance(denoiser, DiscriminatorGuided) and isinstance(denoiser.denoiser, Guided)
    assert (denoiser.scale, denoiser.interval, denoiser.boost) == (2.0, (0.05, 20.0), 1.0)
    assert "w = 2" in describe(denoiser)
    x_t, t, cond = point()
    plain = teacher.denoiser(x_t, t, cond)
    assert (denoiser(x_t, t, cond) - plain).abs().max() > 1e-6
    low = torch.full((3,), 0.01)
    assert torch.equal(denoiser(x_t, low, cond), teacher.denoiser(x_t, low, cond))
    keys = {"scale": 0.5, "interval": [0.1, 2.0], "boost": 2.0}
    other = guided(section_of(pipelines, run / NAME, **keys), teacher)
    assert (other.scale, other.interval, other.boost) == (0.5, (0.1, 2.0), 2.0)


def test_a_student_learns_from_the_moved_teacher_and_leaves_without_it(pipelines, run, tmp_path):
    tree = recipe_tree("sid", pipelines["edm"], steps=1, accumulate=1)
    tree["teacher"]["discriminator"] = {"file": str(run / NAME)}
    engine = build.build(Recipe.check(tree), tmp_path / "run").engine
    assert isinstance(engine.objective.teacher, DiscriminatorGuided)
    assert not isinstance(engine.objective.student.denoiser, DiscriminatorGuided)
    engine.train()


def test_pairs_of_the_teacher_alone_are_not_those_of_the_moved_one(pipelines, run):
    section = section_of(pipelines, run / NAME)
    alone = section.model_copy(update={"discriminator": None})
    teacher = load_teacher(section)
    assert teacher_identity(section, teacher) != teacher_identity(alone, teacher)
    assert "discriminator" not in teacher_identity(alone, teacher)


@pytest.mark.parametrize("name", ["discriminator", "dmd2"])
def test_runs_of_it_and_with_it_have_a_plan(name, pipelines, run):
    tree = recipe_tree(name, pipelines["edm"])
    if name == "dmd2":
        tree["teacher"]["discriminator"] = {"file": str(run / NAME)}
    assert forecast.plan(Recipe.check(tree)).peak > 0


# ---- refusals


def changed(run, tmp_path, weights=None, **about):
    """A copy of the run's file, with other weights or other words about itself."""
    with safe_open(run / NAME, framework="pt") as file:
        words = json.loads(file.metadata()["discriminator"])
    path = tmp_path / "changed.safetensors"
    tensors = load_file(run / NAME) if weights is None else weights
    save_file(tensors, path, {"discriminator": json.dumps({**words, **about})})
    return path


def test_a_file_that_is_no_discriminator_is_refused(pipelines, run, tmp_path):
    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    files = [tmp_path / "missing", tmp_path, tmp_path / "text", tmp_path / "plain.safetensors"]
    files.append(changed(run, tmp_path, format=99))
    for file in files:
        with refused(KEY, file.name):
            load_teacher(section_of(pipelines, file))


def test_a_discriminator_of_another_teacher_is_refused(pipelines, run, tmp_path):
    with refused(KEY, "edm", "weights"):
        load_teacher(section_of(pipelines, run / NAME, "digits"))
    with refused(KEY, "levels"):
        load_teacher(section_of(pipelines, changed(run, tmp_path, levels=[0.0] * 6)))


def test_heads_of_other_blocks_are_refused(pipelines, run, tmp_path):
    with refused(KEY, "backbone.nowhere"):
        file = changed(run, tmp_path, blocks=["backbone.nowhere"])
        load_teacher(section_of(pipelines, file))
    with refused(KEY, "backbone.down_blocks.0"):
        file = changed(run, tmp_path, blocks=["backbone.down_blocks.0"])
        load_teacher(section_of(pipelines, file))
    with refused(KEY, "changed"):
        load_teacher(section_of(pipelines, changed(run, tmp_path, {"a": torch.zeros(1)})))


def test_a_run_with_a_wrong_file_is_refused_before_it_leaves_a_folder(pipelines, tmp_path):
    tree = recipe_tree("dmd2", pipelines["edm"])
    tree["teacher"]["discriminator"] = {"file": str(tmp_path / "missing")}
    with refused(KEY, "missing"):
        build.build(Recipe.check(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("critic.san", True),
        ("critic.reads", "student"),
        ("critic.encoder", "mine.py:network"),
        ("objective.game", "hinge"),
        ("objective.reach", {}),
        ("adapters", {}),
        ("student", {"renoise": False}),
        ("rewards", {"a": {"function": "shapes"}}),
        ("train.guards", {}),
        ("eval.every", 2),
        ("players.student", {}),
        ("teacher.discriminator", {"file": "a"}),
    ],
)
def test_what_a_run_without_a_student_cannot_have_is_refused(key, value):
    tree = recipe_tree("discriminator", "digits")
    node = tree
    *parents, leaf = key.split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node[leaf] = value
    with pytest.raises(UserError) as error:
        Recipe.check(tree)
    assert error.value.key.endswith(key)


@pytest.mark.parametrize("interval", [[0.01, 1.0], [0.1, 50.0]])
def test_levels_that_it_was_not_trained_at_are_refused(pipelines, run, interval):
    section = section_of(pipelines, run / NAME, interval=interval)
    with refused("teacher.discriminator.interval", "0.05 ≤ σ/α ≤ 20"):
        check(section.discriminator, load_teacher(section))


def test_its_run_has_no_page_and_says_so(run):
    with refused("run *", "trained a discriminator", "teacher.discriminator.file"):
        require_finished(run)


@pytest.mark.parametrize("interval", [[1.0, 1.0], [2.0, 0.1]])
def test_an_empty_interval_is_refused(interval):
    tree = recipe_tree("ect", "digits")
    tree["teacher"]["discriminator"] = {"file": "a", "interval": interval}
    with refused("*teacher.discriminator.interval"):
        Recipe.check(tree)
