"""Flash Diffusion: its stages and places, its three terms, and a student for a fake score."""

import math

import pytest
import torch
from torch import nn

from distill.objectives.adversarial.flash import SHARES, Flash, place_weights
from distill.objectives.base import Batch
from distill.objectives.losses import critic_loss, generator_loss, mean_square, surrogate
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.denoiser import Denoiser
from teachers.process import Linear, Tabulated
from tests.helpers.noise_predictors import labels, predictor
from tests.helpers.refusals import refused
from tests.objectives.test_turns import Slope

D = torch.float64
OFF = (0.0,) * 4
SPREAD = 0.7


def made(process=None, n=16, levels=8, **fields):
    """An objective of small random networks, and a batch with labels."""
    process = process or Linear()
    predicts = "eps" if isinstance(process, Tabulated) else "flow"
    teacher, network = (predictor(seed, process, predicts) for seed in (1, 2))
    torch.manual_seed(0)
    batch = Batch(torch.randn(n, 3, dtype=D), torch.randn(n, 3, dtype=D), labels(n))
    student = Generator(network, (1.0, 0.5))
    critic = Slope(0.5)
    return Flash(teacher=teacher, student=student, critic=critic, levels=levels, **fields), batch


# ---- stages and places


def test_places_are_drawn_around_the_quarters_of_the_grid():
    near, far = math.exp(-0.5 / 0.25), math.exp(-4 / 0.5)  # one place from a mode, and two
    found = place_weights((0.1, 0.2, 0.3, 0.4), 8, 0.5)
    expected = [0.1 + 0.2 * far, 0.3 * near, 0.2 + (0.1 + 0.3) * far, 0.5 * near]
    assert found[:4] == pytest.approx(expected, abs=1e-6)
    assert found[6] == pytest.approx(0.4 + 0.3 * far, abs=1e-6)
    assert all(sum(s) == pytest.approx(1) for s in SHARES)
    assert place_weights(SHARES[0], 40, 0.5)[0] < 1e-12 < 0.3 < place_weights(SHARES[3], 40, 0.5)[0]


def test_stages_draw_other_places_and_have_other_terms():
    objective, batch = made(stage_steps=10, mode_std=1e-3)
    places, terms = [set() for _ in range(4)], []
    for step in range(0, 50, 10):
        for _ in range(60):
            student, critic = objective.turns(step)
            assert student.players == ("student",) and critic.players == ("critic",)
            places[min(step // 10, 3)].add(student.loss.keywords["place"])
        terms.append(set(student.loss(batch).logs))
    assert places == [{4, 6}, {0, 2, 4, 6}, {0, 2, 4, 6}, {0, 2, 4, 6}]
    assert terms == [{"distillation"}, *[{"distillation", "gan", "matching"}] * 4]
    assert objective.last_stage == 30
    without, _ = made(gan_weights=OFF)
    assert [t.players for t in without.turns(0)] == [("student",)]


# ---- the terms


@pytest.mark.parametrize("process", [Linear(), Tabulated.scaled_linear()])
def test_the_target_is_the_teachers_rest_of_the_grid(process):
    objective, batch = made(process, levels=4, solver="ddim")
    times = process.levels(4)[::-1]
    x_t = process.noise(batch.data, torch.full((16,), times[2], dtype=D), batch.noise)
    x = x_t
    for k in (2, 3):
        t, s = (torch.full((16,), times[i], dtype=D) for i in (k, k + 1))
        guess = objective.teacher(x, t, batch.cond)
        x = process.step(x, guess, t, s) if k < 3 else guess
    t = torch.full((16,), times[2], dtype=D)
    student = objective.student.denoiser(x_t, t, batch.cond)
    found = objective.student_loss(batch, 2, 0)
    torch.testing.assert_close(found.value, mean_square(student, x).mean())
    torch.testing.assert_close(found.samples, student)


def test_at_the_first_place_it_is_pure_noise():
    process = Tabulated.scaled_linear()  # whose α is not 0 there
    objective, batch = made(process)
    x_t, t = objective.noised(batch, 0)
    assert torch.equal(x_t, batch.noise * objective.student.scale(batch.noise)) and (t == 1).all()
    later, s = objective.noised(batch, 1)
    torch.testing.assert_close(later, process.noise(batch.data, s, batch.noise))


def test_the_terms_are_weighted_and_the_student_is_the_fake_score():
    objective, batch = made(gan_weights=(0, 0, 0.4, 0), matching_weights=(0, 0, 0.3, 0))
    torch.manual_seed(7)
    found = objective.student_loss(batch, 3, 2)
    x, process = found.samples, Linear()
    torch.manual_seed(7)
    t, noise = 0.75 * torch.rand(16), torch.randn_like(x)
    gan = (objective.critic(process.noise(x, t, noise), t) - 1).square().mean()
    t, noise = 0.02 + 0.96 * torch.rand(16), torch.randn_like(x)
    x_t = process.noise(x, t, noise).detach()
    real = objective.teacher(x_t, t, batch.cond)
    fake = objective.student.denoiser(x_t, t, batch.cond)
    grad = (fake - real) / (x - real).abs().mean(1, keepdim=True)
    plain = objective.student_loss(batch, 3, 0).value
    expected = plain + 0.4 * gan + 0.3 * surrogate(x, grad.detach())
    torch.testing.assert_close(found.value, expected)
    ours, theirs = (torch.autograd.grad(v, x, retain_graph=True)[0] for v in (gan, found.value))
    (distilled,) = torch.autograd.grad(mean_square(x, target(objective, batch)).mean(), x)
    torch.testing.assert_close(theirs, distilled + 0.4 * ours + 0.3 * grad.detach() / x.numel())


def target(objective, batch, place=3):
    from teachers.solver import dpmpp_2m

    x_t, _ = objective.noised(batch, place)
    times = torch.tensor(objective.grid()[place:], dtype=torch.float64)
    return dpmpp_2m(objective.teacher, x_t, times, batch.cond)


# ---- a Gaussian teacher N(0, c²): the flow map is x_t c / √(c² + σ²), of a flow with α = 1 - σ


class Map(Denoiser):
    """x̂ = g(t) x_t, with g the flow map of the Gaussian, or any other function of t."""

    def __init__(self, gain):
        super().__init__()
        self.process, self.gain, self.w = Linear(), gain, nn.Parameter(torch.ones((), dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        alpha, sigma = self.process.at(t, x_t)
        return self.w * self.gain(alpha, sigma) * x_t


def flow_map(alpha, sigma):
    return SPREAD / (alpha**2 * SPREAD**2 + sigma**2).sqrt()


def posterior_mean(alpha, sigma):
    return alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)


def gaussian(gain, **fields):
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.full((1,), SPREAD**2, dtype=D), Linear())
    student = Generator(Map(gain), (1.0, 0.5))
    torch.manual_seed(1)
    batch = Batch(SPREAD * torch.randn(64, 1, dtype=D), torch.randn(64, 1, dtype=D))
    return Flash(teacher=teacher, student=student, critic=Slope(0.5), **fields), batch


@pytest.mark.parametrize("place", [0, 100, 150])
def test_distillation_ends_at_the_flow_map_and_not_at_the_denoiser(place):
    objective, batch = gaussian(flow_map, levels=200)
    assert objective.student_loss(batch, place, 0).value < 1e-5
    other, _ = gaussian(posterior_mean, levels=200)
    assert other.student_loss(batch, place, 0).value > 1e-3


def test_matching_vanishes_where_the_student_denoises_as_the_teacher_and_not_at_the_flow_map():
    """The method's bias: its student is a fake score, and so must denoise at every time."""
    same, batch = gaussian(posterior_mean, matching_times=Uniform(0.5, 0.5))
    x = SPREAD * torch.randn(64, 1, dtype=D)
    assert same.gradient(x, batch).abs().max() < 1e-12
    other, _ = gaussian(flow_map, matching_times=Uniform(0.5, 0.5))
    torch.manual_seed(3)
    pull = other.gradient(x, batch)
    assert (pull * x).mean() > 0.05  # down it, samples shrink


# ---- the game


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_the_least_squares_critic_ends_at_the_difference_over_the_sum(ratio):
    """Where data are `ratio` times as likely as samples."""
    logit = torch.tensor((ratio - 1) / (ratio + 1), dtype=D, requires_grad=True)
    fake, real = critic_parts(logit)
    (fake + ratio * real).backward()
    assert logit.grad.abs() < 1e-12
    assert generator_loss(torch.tensor([1.0, 3.0]), "least-squares") == 2.0


def critic_parts(logit):
    """The least-squares critic's loss of a sample, and of a datum; the other's is none."""
    one = torch.ones(1, dtype=D)
    return (
        critic_loss(logit[None], one, "least-squares"),
        critic_loss(-one, logit[None], "least-squares"),
    )


@pytest.mark.parametrize("levels", [2, 32])
def test_a_grid_must_have_four_modes_and_reach_the_noise(levels):
    with refused("objective.levels", str(levels)):
        made(Tabulated.scaled_linear(), levels=levels)
    if levels > 2:
        made(Linear(), levels=levels)
