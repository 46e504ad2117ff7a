"""What critics read: the fake score, the teacher, or a network of images from a user's file."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.training import build
from students.critic import Critic, ImageFeatures, SANCritic
from teachers.process import Linear
from teachers.teacher import Codec
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

FILE = """
import torch

def encoder():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(1, 4, 3, 2)
    return torch.nn.Sequential(conv, torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(36, 5))

def number():
    return 3

def large():
    return torch.nn.Linear(7, 7)

def broken():
    raise ValueError("no weights")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def recipe(critic):
    return Recipe.check(
        {
            "teacher": "digits",
            "objective": {"name": "gdd", "r1": 0.5},
            "critic": critic,
            "data": {"source": "digits"},
            "train": {"steps": 1, "batch": 4, "sample_every": 0},
        }
    )


@pytest.mark.parametrize("more", [{}, {"blocks": ["encoder.0", "encoder.3"], "san": True}])
def test_a_run_trains_the_heads_on_a_frozen_network_and_records_whose_it_is(file, tmp_path, more):
    engine = build.build(recipe({"encoder": f"{file}:encoder", **more}), tmp_path / "run").engine
    critic = engine.objective.critic
    encoder = critic._denoiser[0].encoder
    before = [p.clone() for p in encoder.parameters()]
    heads = [p.clone() for p in critic.parameters()]
    engine.train()
    assert all(map(torch.equal, before, encoder.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(heads, critic.parameters(), strict=True))
    assert engine.latest["critic/r1"] > 0 and engine.latest["student/grad_norm"] > 0
    blocks = ", ".join(more.get("blocks", ["encoder"]))
    assert f"mine.py:encoder's {blocks}" in engine.objective.loss_features
    assert isinstance(critic, SANCritic) == bool(more)
    assert len(critic.heads) == len(more.get("blocks", "1"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("number", "int"), ("broken", "no weights"), ("large", "RuntimeError"), ("absent", "absent")],
)
def test_what_is_no_network_of_the_teachers_images_is_refused(file, tmp_path, name, reason):
    with refused("critic.encoder*", reason):
        build.build(recipe({"encoder": f"{file}:{name}"}), tmp_path / "run")


def test_the_network_reads_decoded_images():
    class Halves(Codec):
        def decode(self, latents):
            return latents / 2

    network = nn.Conv2d(2, 3, 1)
    features = ImageFeatures(network, Halves(), Linear())
    critic = Critic(features, (2, 4, 4), None, ("encoder",))
    x, t = torch.randn(3, 2, 4, 4, requires_grad=True), torch.rand(3)
    (found,) = critic.features(x, t)
    torch.testing.assert_close(found, network(x / 2))
    (grad,) = torch.autograd.grad(critic(x, t).sum(), x)
    assert grad.abs().sum() > 0 and not any(p.requires_grad for p in network.parameters())


def test_a_path_beside_the_recipe_is_found(file):
    text = recipe({"encoder": "mine.py:encoder"}).model_dump_json()
    (file.parent / "gdd.yaml").write_text(text)  # JSON is YAML
    loaded = Recipe.load(file.parent / "gdd.yaml")
    assert loaded.critic.encoder.endswith(f"{file.parent.name}/mine.py:encoder")


# ---- the fake score or the teacher


@pytest.mark.parametrize(("reads", "moved"), [(None, True), ("fake", True), ("teacher", False)])
def test_only_a_fake_score_that_the_critic_reads_learns_from_it(reads, moved, tmp_path):
    tree = recipe_tree("dmd2", "digits", steps=1)
    tree["teacher"] = "digits"
    tree["critic"] = {} if reads is None else {"reads": reads}
    tree["players"] = {"fake": {"betas": [0.0, 0.99]}}
    objective = build.build(Recipe.check(tree), tmp_path / "run").engine.objective
    critic, fake = objective.critic, objective.fake
    assert critic.source == ("fake" if moved else "teacher")
    assert bool(objective.loss_features) != moved
    x, cond = torch.randn(4, 1, 8, 8), {"class_labels": torch.arange(4)}
    fake.requires_grad_(True)
    critic.requires_grad_(True)
    critic(x, torch.full((4,), 0.5), cond).sum().backward()
    grads = [p.grad for p in fake.parameters()]
    assert any(g is not None and g.abs().max() > 0 for g in grads) == moved
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.parametrize("adapters", [None, {"rank": 2}], ids=["weights", "adapters"])
def test_a_student_learns_from_the_critic_on_its_features_by_its_samples_alone(adapters, tmp_path):
    """Its gradient is that of a critic on a frozen copy, and its features follow its weights."""
    tree = recipe_tree("ladd", "digits", steps=1)
    tree |= {"teacher": "digits", "critic": {"reads": "student"}}
    if adapters is not None:
        tree["adapters"] = {**adapters, "players": ["student"]}
    objective = build.build(Recipe.check(tree), tmp_path / "run").engine.objective
    critic, student = objective.critic, objective.student.denoiser
    weights = [p.requires_grad_(True) for p in student.parameters()]
    with torch.no_grad():
        for p in weights:
            p += 0.05 * torch.randn_like(p)
    assert (critic.source, objective.loss_features) == ("student", "")
    x, t, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), {"class_labels": torch.arange(4)}

    def gradients(critic):
        sample = student(x, torch.ones(4), cond)
        return torch.autograd.grad(critic(sample, t, cond).sum(), weights)

    found = gradients(critic)
    assert all(p.requires_grad for p in weights)
    frozen = deepcopy(student).requires_grad_(False)
    apart = Critic(frozen, (1, 8, 8), {"class_labels": torch.tensor([0])}, critic.blocks)
    apart.load_state_dict(critic.state_dict())
    for a, b in zip(found, gradients(apart), strict=True):
        torch.testing.assert_close(a, b)
    before = critic(x, t, cond)
    with torch.no_grad():
        for p in weights:
            p += 0.05 * torch.randn_like(p)
    assert not torch.equal(before, critic(x, t, cond))


def test_features_of_a_student_with_recomputed_activations_are_refused():
    tree = recipe_tree("ladd", "digits", checkpointing=True)
    with refused("critic.reads", "train.checkpointing"):
        Recipe.check({**tree, "critic": {"reads": "student"}})


@pytest.mark.parametrize(
    ("name", "critic", "key"),
    [
        ("ladd", {"reads": "fake"}, "critic.reads"),
        ("sida", {"reads": "teacher"}, "critic.reads"),
        ("dmd2", {"reads": "teacher", "encoder": "mine.py:encoder"}, "critic.reads"),
        ("sida", {"reads": "student"}, "critic.reads"),
        ("dmd2", {"reads": "data"}, "critic.reads"),
    ],
)
def test_features_that_the_objective_has_not_are_refused(name, critic, key):
    with refused(key):
        Recipe.check({**recipe_tree(name, "digits"), "critic": critic})
