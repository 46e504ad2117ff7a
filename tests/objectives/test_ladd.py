"""Adversarial distillation: what the student starts from, whose turn it is, ADD's second loss."""

import pytest
import torch

from distill.objectives.adversarial.ladd import ADD, GDD, LADD
from distill.objectives.base import Batch
from distill.objectives.noise_levels import Uniform
from distill.objectives.weights import error_weight
from students.generator import Generator
from teachers.process import Karras, Linear, Tabulated, Trig
from tests.helpers.noise_predictors import labels, predictor
from tests.objectives.test_turns import Level, Slope

D = torch.float64
FOUR = (1.0, 0.75, 0.5, 0.25)


def made(kind=LADD, chain=FOUR, process=None, critic=None, n=16, **fields):
    """An objective of small random networks, and a batch with labels."""
    process = process or Linear()
    teacher, network = (predictor(seed, process, "flow") for seed in (1, 2))
    student = Generator(network, chain).keep(len(chain))
    critic = Slope(0.5) if critic is None else critic
    torch.manual_seed(0)
    batch = Batch(torch.randn(n, 3, dtype=D), torch.randn(n, 3, dtype=D), labels(n))
    return kind(teacher=teacher, student=student, critic=critic, **fields), student, batch


def players(objective, step):
    return [turn.players for turn in objective.turns(step)]


# ---- what a step starts from


@pytest.mark.parametrize("process", [Linear(), Karras(), Tabulated.scaled_linear()])
def test_from_data_the_student_denoises_noised_data_and_at_the_first_time_pure_noise(process):
    objective, student, batch = made(process=process, starts_from="data")
    seen = []
    student.denoiser.register_forward_pre_hook(lambda m, args: seen.append(args[:3]))
    objective.samples(batch, student, 1)
    ((x_t, t, cond),) = seen
    assert sorted(set(t.tolist())) == sorted(FOUR) and cond is batch.cond
    first = t == 1
    pure = batch.noise * student.scale(batch.noise)
    noised = process.noise(batch.data, t, batch.noise)
    assert torch.equal(x_t[first], pure[first]) and first.sum() == 4
    assert torch.equal(x_t[~first], noised[~first])
    if process.scales(torch.ones(1, dtype=D))[0] > 0:  # where data would show through
        assert not torch.allclose(pure[first], noised[first])


def test_from_noise_the_student_is_its_own_chain_at_every_place():
    objective, student, batch = made()
    torch.manual_seed(3)
    ours = objective.samples(batch, student, 1)
    torch.manual_seed(3)
    assert torch.equal(ours, student.rollout(batch.noise, batch.cond, 1))


@pytest.mark.parametrize("sees", ["last", "places"])
def test_the_critic_learns_from_the_places_of_the_chain_that_it_is_to_see(sees):
    critic = Slope(0.5)
    seen = []
    critic.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    objective, student, batch = made(critic=critic, critic_sees=sees, critic_times=Uniform(0, 0))
    torch.manual_seed(3)
    loss = objective.critic_loss(batch, student, 1)
    torch.manual_seed(3)
    expected = student.samples(batch.noise, batch.cond, sees, 1)
    assert torch.equal(seen[0][:16], expected) and torch.equal(seen[0][16:], batch.data)
    loss.value.backward()
    assert critic.w.grad is not None
    assert all(p.grad is None for p in student.parameters())


# ---- turns


def test_the_critic_has_every_step_and_a_start_and_the_student_every_kth():
    objective, *_ = made(student_every=2, frozen_steps=3)
    both, one = [("student",), ("critic",)], [("critic",)]
    assert [players(objective, step) for step in range(6)] == [one, one, one, one, both, one]


def test_gradients_reach_the_player_of_the_turn_alone():
    objective, student, batch = made(ADD, critic=Slope(0.5), r1=0)
    teacher, critic = objective.teacher, objective.critic
    teacher.requires_grad_(False), critic.requires_grad_(False)  # as the engine has it
    objective.student_loss(batch, student, 0).value.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert critic.w.grad is None and all(p.grad is None for p in teacher.parameters())


# ---- the losses


def test_without_a_distillation_loss_the_student_only_plays():
    """A critic that says one thing of everything gives no gradient, whatever the teacher says."""
    objective, student, batch = made(critic=Level(0.3), gan_weight=0.5)
    loss = objective.student_loss(batch, student, 0)
    assert set(loss.logs) == {"gan"}
    assert loss.value == 0.5 * loss.logs["gan"]
    assert not loss.value.grad_fn or torch.autograd.grad(
        loss.value, loss.samples, allow_unused=True
    ) == (None,)


@pytest.mark.parametrize("weighting", ["alpha", "x", "eps", "min-snr"])
@pytest.mark.parametrize("process", [Linear(), Trig()])
def test_adds_second_loss_is_the_distance_to_a_fixed_target(process, weighting):
    """λ c(t) |x̂ - sg D_T(sg x̂_t, t)|², a mean over dimensions."""
    objective, student, batch = made(
        ADD, process=process, critic=Level(0.0), r1=0, gan_weight=0, distillation_weight=2.5,
        weighting=weighting,
    )  # fmt: skip
    torch.manual_seed(5)
    loss = objective.student_loss(batch, student, 1)
    (grad,) = torch.autograd.grad(loss.value, loss.samples)
    torch.manual_seed(5)
    x = objective.samples(batch, student, 1).detach()
    objective.drawn(x, objective.critic_times)  # the critic's
    t = 0.02 + 0.96 * torch.rand(len(x))
    x_t = process.noise(x, t, torch.randn_like(x))
    target = objective.teacher(x_t, t, batch.cond).detach()
    if weighting == "alpha":
        alpha, sigma = process.scales(t.double())
        c = alpha / (alpha**2 + sigma**2).sqrt()
    else:
        c = error_weight(weighting, process, t).double()
    c = c[:, None]
    expected = 2.5 * (c * (x - target) ** 2).mean()
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, 2 * 2.5 * c * (x - target) / x.numel(), rtol=1e-6, atol=0)


def test_a_variance_preserving_alpha_is_the_process_own():
    objective, *_ = made(process=Trig())
    t = torch.linspace(0, 0.99, 9, dtype=D)
    torch.testing.assert_close(objective.distillation_scale(t), Trig().scales(t)[0])


def test_the_papers_differ_in_their_defaults():
    add, *_ = made(ADD)
    gdd, *_ = made(GDD)
    ladd, *_ = made(LADD)
    assert (ladd.game, ladd.starts_from, ladd.r1, ladd.distillation_weight) == (
        "logistic", "noise", 0, 0)  # fmt: skip
    assert (add.game, add.starts_from, add.r1, add.penalty, add.distillation_weight) == (
        "hinge", "data", 1e-5, "features", 2.5)  # fmt: skip
    assert (gdd.game, gdd.starts_from, gdd.r1, gdd.penalty, gdd.distillation_weight) == (
        "logistic", "noise", 1e-4, "exact", 0)  # fmt: skip
    assert ladd.critic_times.mean == ladd.critic_times.std == 1


def test_an_option_that_is_off_changes_no_bit():
    plain, student, batch = made(critic=Slope(0.5))
    values = []
    for fields in ({}, {"r1": 0.0, "distillation_weight": 0.0, "penalty": "approximate"}):
        objective, *_ = made(critic=Slope(0.5), **fields)
        torch.manual_seed(1)
        values.append(
            [objective.student_loss(batch, student, 0).value,
             objective.critic_loss(batch, student, 0).value]
        )  # fmt: skip
    assert values[0] == values[1]
    assert plain.r2 == 0
