"""UniFL against DRaFT, closed forms of its three kinds of feedback, and what is recorded."""

import math

import pytest
import torch
from torch import nn

from distill.config.objectives import DRaFT, UniFL
from distill.config.recipe import Recipe
from distill.config.schema import RewardSection
from distill.objectives.adversarial.unifl import PixelCritic
from distill.objectives.base import Batch, Turn
from distill.rewards.rewards import CERTAINTIES, rewarded
from distill.rewards.terms import Rewards, Term
from distill.sampling.used_networks import record, used_networks
from eval import shapes
from students.generator import Generator
from teachers import load
from teachers.process import Linear
from teachers.teacher import Pixels, Teacher
from tests.helpers.refusals import refused
from tests.helpers.toys import Slopes, recipe_tree

D = torch.float64
WANTED = 2.0  # m' of the reward -(x - m')² / 2
TIMES = (1.0, 0.5)  # x̂ = k x_t there


class Constant(nn.Module):
    """A critic whose logit is a number times the mean of x."""

    def __init__(self, slope=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=D))

    def forward(self, x):
        return self.slope * x.mean(1)


def slopes(*values):
    return Slopes(torch.tensor(TIMES, dtype=D), torch.tensor(values, dtype=D), Linear())


def made(slope=0.0, **fields):
    student = Generator(slopes(0.3, 0.7), TIMES, renoise=False).keep(2)
    teacher = slopes(0.4, 0.6).requires_grad_(False)
    return UniFL(teacher=teacher, student=student, pixel_critic=Constant(slope), **fields)


def draws(*values):
    z = torch.tensor(values, dtype=D)[:, None]
    return Batch(z + 5, z, None, torch.arange(len(z)))


def quadratic(x, prompts=(), graph=True):
    return -0.5 * (x - WANTED).square().sum(1)


def with_floor(floor, weight=1.0):
    section = RewardSection(function="shapes", floor=floor, weight=weight)
    return Rewards([Term(section, quadratic)], ["a caption"] * 3)


def student_loss(objective, batch, place, judged):
    loss = objective.feedback(batch, objective.student, place, judged)
    return rewarded(loss, batch, Turn(("student",), None), objective)


def gradient(objective, value):
    return torch.autograd.grad(value, objective.student.denoiser.slopes)[0]


def test_without_a_floor_and_a_critic_it_is_the_gradient_of_one_step_of_draft_bit_for_bit():
    batch = draws(1.0, -0.4, 2.5)
    ours = made()
    ours.reward = with_floor(None)
    draft = DRaFT(teacher=ours.teacher, student=ours.student, last_steps=1)
    draft.reward = lambda x, b: quadratic(x)
    loss, reference = student_loss(ours, batch, (0, 1), False), draft.loss(batch, 0)
    assert torch.equal(loss.value, reference.value) and torch.equal(loss.samples, reference.samples)
    found = gradient(ours, loss.value)
    assert torch.equal(found, gradient(draft, reference.value)) and found[1] != 0 == found[0]


def test_a_floor_below_all_rewards_leaves_a_gradient_of_exactly_0():
    batch = draws(1.0, -0.4, 2.5)
    ours = made()
    ours.reward = with_floor(-100.0)
    loss = student_loss(ours, batch, (0, 1), False)
    assert loss.value == 0 and not gradient(ours, loss.value).any()


def test_a_floor_makes_a_reward_the_hinge_of_the_paper():
    batch = draws(1.0, -0.4, 2.5)
    ours = made()
    x = ours.walked(batch, ours.student, 0, 1)
    reward = quadratic(x).detach()
    floor = reward.median().item() + 1e-3  # one sample is above
    ours.reward = with_floor(floor, weight=0.7)
    loss = student_loss(ours, batch, (0, 1), False)
    below = reward < floor
    assert below.tolist().count(True) == 2
    expected = 0.7 * (floor - reward).clamp(min=0).mean()
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.logs["reward"], -expected)
    (grad,) = torch.autograd.grad(loss.value, loss.samples)
    force = 0.7 * (x.detach() - WANTED) / 3 * below[:, None]
    torch.testing.assert_close(grad, force)


def test_perceptual_feedback_starts_from_noised_data():
    """x_½ = ½ x + ½ z, and x̂ = k₂ x_½; from noise the first step comes before, without a graph."""
    batch, ours = draws(1.0, -0.4, 2.5), made()
    half = (batch.x + batch.noise) / 2
    torch.testing.assert_close(ours.walked(batch, ours.student, 1, 1), 0.7 * half)
    x = ours.walked(batch, ours.student, 0, 1)
    before = 0.5 * 0.3 * batch.noise + 0.5 * batch.noise
    torch.testing.assert_close(x, 0.7 * before)
    torch.testing.assert_close(gradient(ours, x.sum()), torch.stack([0 * x.sum(), before.sum()]))
    torch.testing.assert_close(ours.walked(batch, ours.student, 0, 0), 0.3 * batch.noise)


def test_a_critic_that_says_nothing_has_two_ln_2_and_its_student_ln_2():
    batch, ours = draws(1.0, -0.4, 2.5), made(slope=0.0)
    assert ours.telling(batch, ours.student, (0, 1)).value.item() == pytest.approx(2 * math.log(2))
    loss = ours.feedback(batch, ours.student, (0, 1))
    assert loss.value.item() == pytest.approx(math.log(2))


def test_student_and_critic_play_against_each_other():
    batch, ours = draws(1.0, 0.4, 2.5), made(slope=0.1, gan_weight=2.0)  # data are above samples
    x = ours.walked(batch, ours.student, 0, 1)
    loss = ours.feedback(batch, ours.student, (0, 1))
    expected = 2 * torch.log1p(torch.exp(-0.1 * x.detach().mean(1))).mean()
    torch.testing.assert_close(loss.value, expected)
    assert gradient(ours, loss.value)[1] < 0  # its samples rise towards what the critic likes
    told = ours.telling(batch, ours.student, (0, 1))
    by_hand = (torch.log1p(torch.exp(0.1 * x.detach().mean(1))).mean()
               + torch.log1p(torch.exp(-0.1 * batch.x.mean(1))).mean())  # fmt: skip
    torch.testing.assert_close(told.value, by_hand)
    (grad,) = torch.autograd.grad(told.value, ours.pixel_critic.slope)
    assert grad < 0  # a steeper one tells them better
    assert not torch.autograd.grad(told.value, ours.student.denoiser.slopes, allow_unused=True)[0]


def test_stages_have_their_turns_and_their_places():
    ours = made(start=1, first_stage=3)
    assert ours.last_stage == 3
    for step in range(12):
        turns = [*ours.turns(step)]
        judged = step >= 3
        assert [t.players for t in turns] == [("student",), ("pixel_critic",)][: 1 + judged]
        places = [t.loss.keywords["place"] for t in turns]
        assert len({*places}) == 1 and (judged or places[0] == (1, 1))
    ends = {next(iter(ours.turns(3))).loss.keywords["place"] for _ in range(40)}
    assert ends == {(0, 0), (0, 1)}


def test_the_critic_reads_pictures_with_their_graph():
    torch.manual_seed(0)
    teacher = load("shapes")
    critic = PixelCritic.for_objective(teacher)
    x = torch.randn(2, *teacher.shape, requires_grad=True)
    logits = critic(x)
    assert logits.shape == (2,)
    logits.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for p in teacher.codec.vae.parameters())
    names = {n.partition(".")[0] for n in critic.state_dict()}
    assert names == {"body"}  # the autoencoder is not the critic's


def test_certainties_of_attributes_add_up_to_that_of_the_caption():
    captions = shapes.captions(5, seed=1)
    images = torch.randn(5, 3, 32, 32)
    parts = [CERTAINTIES[f"shapes-{k}"](images, captions) for k in shapes.Scene._fields]
    assert len(CERTAINTIES) == 5 and all((p < 0).all() for p in parts)
    torch.testing.assert_close(sum(parts), CERTAINTIES["shapes"](images, captions))


def test_the_rewards_network_is_recorded_as_used():
    tree = {"rewards": {"a": {"function": "shapes-colour"}, "b": {"function": "shapes-count"}}}
    used = used_networks(tree)
    assert used == ["shapes"]
    row = {"1": {"fd": 1.0, "fd_second": 1.0, "accuracy": 0.9, "protocol": "shapes"}}
    held = record(used, "shapes", row)["held_out"]
    assert held["accuracy"] and held["fd_second"] and not held["fd"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rewards": {"w": {"function": "shapes", "floor": -1.0, "held_out": True}},
          "train": {"steps": 4, "guards": {}}}, "rewards.w.floor"),
        ({"objective": {"name": "unifl", "start": -1}}, "objective.start"),
        ({"rewards": {"w": {"function": "shapes", "floor": "high"}}}, "rewards.w.floor"),
    ],
)  # fmt: skip
def test_recipes_that_nothing_reads_are_refused(changes, key):
    with refused(f"*{key}"):
        Recipe.check({**recipe_tree("unifl", "digits"), **changes})


def test_a_floor_is_also_for_objectives_of_rewards_alone():
    tree = recipe_tree("draft", "digits")
    tree["rewards"]["bright"]["floor"] = 0.5
    assert Recipe.check(tree).rewards["bright"].floor == 0.5
    tree["rewards"]["bright"]["warmup"] = 2
    with refused("*rewards.bright.warmup"):
        Recipe.check(tree)


def test_a_chain_without_such_a_step_is_refused():
    with refused("objective.start", "2 steps", "at most 1"):
        made(start=2)
    vectors = Teacher(slopes(0.1, 0.1), Pixels(), (3,))
    with refused("objective.name", "(3,)"):
        PixelCritic.for_objective(vectors)
