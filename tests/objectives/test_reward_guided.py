"""Rewards: on any objective, and by a latent proxy that learns to order samples as they do."""

import sys
from pathlib import Path

import pytest
import torch

from distill.config.recipe import Recipe
from distill.data.stream import Source
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.trajectory.lcm import LCM
from distill.objectives.trajectory.rg_lcd import LatentReward, RewardGuidedLCM
from distill.rewards.rewards import caption_certainty, checked, rehearse, reward_of, rewarded
from distill.training import build
from eval import shapes
from students import schedulers
from teachers import load
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


@pytest.fixture(scope="module")
def teacher():
    return load("shapes")


def make(teacher, kind=RewardGuidedLCM, **keys):
    torch.manual_seed(0)
    networks = {"proxy": LatentReward.for_objective(teacher)} if kind is RewardGuidedLCM else {}
    student = schedulers.student(teacher, 1)
    return kind(teacher=teacher.denoiser, student=student, **networks, target_ema=0.0, **keys)


def batch(teacher, n=3):
    torch.manual_seed(1)
    prompts = shapes.captions(n, seed=2)
    x = torch.randn(n, *teacher.shape)
    return Batch(x, torch.randn_like(x), teacher.codec.condition(prompts), torch.arange(n))


def test_a_weight_of_zero_is_latent_consistency(teacher):
    data, values = batch(teacher), []
    for objective in (make(teacher, proxy_weight=0.0), make(teacher, LCM)):
        torch.manual_seed(3)
        values.append(objective.loss(data, 0).value)
    assert torch.equal(*values)


def test_the_student_raises_the_proxys_reward_and_the_proxy_learns_from_no_graph(teacher):
    objective, data = make(teacher, proxy_weight=2.0), batch(teacher)
    objective.reward = lambda x, b: x.flatten(1).mean(1)
    other = make(teacher, LCM)
    torch.manual_seed(3)
    plain = other.loss(data, 0)
    torch.manual_seed(3)
    loss = objective.loss(data, 0)
    raised = objective.proxy(loss.samples, data.cond).mean()
    torch.testing.assert_close(loss.value, plain.value - 2 * raised)
    objective.proxy_loss(data, 0).value.backward()
    assert all(p.grad is None for p in objective.student.parameters())
    assert all(p.grad is not None for p in objective.proxy.parameters())


def test_the_proxys_loss_is_the_kl_of_pairs(teacher):
    objective, data = make(teacher), batch(teacher, 2)
    scores = torch.tensor([[1.0, 0.0], [0.5, 2.0], [-1.0, 0.3]])  # of three samples, two prompts
    objective.reward = lambda x, b: scores[[torch.equal(x, y) for y in triple].index(True)]
    torch.manual_seed(4)
    triple = objective.triple(data, 0)
    torch.manual_seed(4)
    found = objective.proxy_loss(data, 0).value
    given = torch.stack([objective.proxy(x, data.cond) for x in triple])
    total = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for k in range(2):
            p = scores[[i, j], k].softmax(0)
            q = given[[i, j], k].softmax(0)
            total += (p * (p / q).log()).sum().item() / 6
    assert found.item() == pytest.approx(total, rel=1e-4)


def test_a_proxy_learns_the_rewards_order(teacher):
    """On fixed latents, a reward of one channel's mean."""
    objective, data = make(teacher), batch(teacher, 16)
    objective.reward = lambda x, b: 4 * x[:, 0].flatten(1).mean(1)
    triple = [torch.randn_like(data.x) for _ in range(3)]
    objective.triple = lambda batch, step: triple
    optimizer = torch.optim.Adam(objective.proxy.parameters(), 3e-3)
    first = objective.proxy_loss(data, 0).value.item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective.proxy_loss(data, 0).value
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


# ---- rewards on any objective


def test_a_reward_is_taken_from_losses_of_the_student_with_samples_and_from_no_other(teacher):
    objective = make(teacher, LCM)
    x = torch.randn(3, *teacher.shape, requires_grad=True)
    loss, turn = Loss(torch.tensor(2.0), {}, x), Turn(("student",), lambda b: loss)
    assert rewarded(loss, batch(teacher), turn, objective) is loss
    objective.reward = lambda x, b: x.flatten(1).sum(1)
    found = rewarded(loss, batch(teacher), turn, objective)
    torch.testing.assert_close(found.value, 2 - x.flatten(1).sum(1).mean())
    torch.testing.assert_close(torch.autograd.grad(found.value, x)[0], torch.full_like(x, -1 / 3))
    assert rewarded(loss, batch(teacher), Turn(("fake",), lambda b: loss), objective) is loss
    with refused("rewards"):
        rewarded(loss._replace(samples=None), batch(teacher), turn, objective)
    with refused("rewards.mine.function", "(3, 1)"):
        checked(torch.zeros(3, 1), "mine", torch.zeros(3, 1, 2, 2))


def test_each_of_several_rewards_must_have_a_gradient(teacher, tmp_path):
    """The sum's gradient alone would not show that one of them is ignored."""
    file = tmp_path / "rewards.py"
    file.write_text(
        "def good(images, prompts):\n    return images.flatten(1).mean(1)\n"
        "def flat(images, prompts):\n    return images.detach().flatten(1).mean(1)\n"
    )
    tree = {
        "teacher": "shapes",
        "objective": {"name": "lcm"},
        "data": {"source": "shapes"},
        "rewards": {k: {"function": f"{file}:{k}"} for k in ("good", "flat")},
        "train": {"steps": 1},
    }
    source = type("S", (), {"prompts": shapes.captions(4, seed=2)})()
    x = torch.randn(4, *teacher.shape)
    reward = reward_of(Recipe.check(tree), teacher, source)
    assert reward(x, batch(teacher, 4)).shape == (4,)  # without a gradient nothing is known
    with refused("rewards.flat.function", "gradient"):
        reward(x.requires_grad_(True), batch(teacher, 4))
    weighed = reward_of(Recipe.check(tree), teacher, source, needs_gradient=False)
    assert weighed(x, batch(teacher, 4)).shape == (4,)


def test_the_built_in_reward_is_higher_for_the_caption_that_was_drawn():
    captions = shapes.captions(32, seed=5)
    images = shapes.draw(captions, seed=6).float() / 127.5 - 1
    right = caption_certainty(images, captions)
    wrong = caption_certainty(images, captions[1:] + captions[:1])
    assert right.mean() > -0.3 and (right > wrong).float().mean() > 0.9
    images.requires_grad_(True)
    assert torch.autograd.grad(caption_certainty(images, captions).sum(), images)[0].any()


def test_gradients_flow_through_the_decoder_to_the_students_latents(teacher):
    """The shapes have latents: the reward is of the images that they decode to."""
    tree = {
        "teacher": "shapes",
        "objective": {"name": "lcm"},
        "data": {"source": "shapes"},
        "rewards": {"a": {"function": "shapes", "weight": 0.5}},
        "train": {"steps": 1},
    }
    prompts = shapes.captions(4, seed=2)
    source = type("S", (), {"prompts": prompts})()
    objective = make(teacher, LCM)
    objective.reward = reward_of(Recipe.check(tree), teacher, source)
    images = shapes.draw(prompts, seed=3).float() / 127.5 - 1
    x = teacher.codec.encode(images).requires_grad_(True)
    found = objective.reward(x, batch(teacher, 4))
    torch.testing.assert_close(found, 0.5 * caption_certainty(teacher.codec.decode(x), prompts))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.abs().flatten(1).amax(1).min() > 0
    with torch.no_grad():  # a small step along it raises the reward
        above = objective.reward(x + 1e-3 * gradient / gradient.norm(), batch(teacher, 4))
    assert above.sum() > found.sum()
    with refused("rewards"):
        turn = Turn(("student",), lambda b: Loss(torch.tensor(0.0)))
        objective.reward = lambda x, b: x.detach().flatten(1).sum(1)
        rewarded(Loss(torch.tensor(0.0), {}, x), batch(teacher, 4), turn, objective)


def test_a_run_hands_a_function_the_images_and_labels_of_its_batch(tmp_path, pipelines):
    file = tmp_path / "mine.py"
    file.write_text("def seen(images, labels):\n    return images[:, 0, 0, 0] * 0 + len(labels)\n")
    tree = recipe_tree("ect", pipelines["edm"])
    tree["rewards"] = {"mine": {"function": f"{file}:seen", "weight": 0.5}}
    parts = build.networks(Recipe.check(tree), tmp_path / "run", False)
    data = parts.source.batch(0, 0, 1, 4)
    assert parts.objective.reward(data.x, data).tolist() == [2.0] * 4


def test_rewards_without_prompts_or_needed_and_missing_are_refused(teacher, pipelines):
    tree = recipe_tree("rg-lcd", pipelines["edm"])
    recipe = Recipe.check(tree)
    source = type("S", (), {"prompts": None})()
    with refused("rewards"):
        reward_of(recipe, teacher, source)
    with refused("rewards", "mine.py:reward"):
        try:
            Recipe.check({**tree, "rewards": {}})
        except Exception as error:
            raise type(error)(str(error).removeprefix("recipe: ")) from None


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (lambda x, p: 1 / 0, ("rewards.a.function", "ZeroDivisionError")),
        (lambda x, p: sys.exit(3), ("rewards.a.function", "SystemExit: 3")),
        (lambda x, p: x.flatten(1).mean(1) * float("nan"), ("rewards", "nan")),
        (lambda x, p: x.detach().flatten(1).mean(1), ("rewards.a.function", "gradient")),
        (lambda x, p: x.flatten(1), ("rewards.a.function", "(2,)")),
    ],
)
def test_a_reward_that_cannot_be_raised_is_refused_before_training(reward, line, monkeypatch):
    """Before the run's folder is made."""
    monkeypatch.setattr("distill.rewards.rewards.function_at", lambda name, key: reward)
    tree = {
        "teacher": "digits",
        "objective": {"name": "ect"},
        "data": {"source": "digits"},
        "rewards": {"a": {"function": "mine.py:reward"}},
        "train": {"steps": 1, "batch": 4},
    }
    with refused(*line):
        build.networks(Recipe.check(tree), Path("nowhere"), False)


def test_a_reward_without_gradient_will_do_for_a_proxy(teacher):
    prompts = shapes.captions(4, seed=2)
    x = torch.randn(4, *teacher.shape)
    source = Source(tuple(teacher.shape), x, teacher.codec.condition(prompts), seed=0, size=4)
    objective = make(teacher)
    objective.reward = lambda x, b: x.detach().flatten(1).mean(1)
    rehearse(objective, source, "cpu")
    other = make(teacher, LCM)
    other.reward = objective.reward
    with refused("rewards", "gradient"):
        rehearse(other, source, "cpu")


def test_the_built_in_reward_is_refused_for_labels():
    tree = {
        "teacher": "digits",
        "objective": {"name": "ect"},
        "data": {"source": "digits"},
        "rewards": {"a": {"function": "shapes"}},
        "train": {"steps": 1},
    }
    with refused("rewards.a.function", "labels"):
        reward_of(Recipe.check(tree), load("digits"), type("S", (), {"prompts": [1]})())
