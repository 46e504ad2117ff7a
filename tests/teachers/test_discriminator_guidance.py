"""Discriminator guidance in closed form: a Gaussian teacher, and data of another Gaussian."""

import pytest
import torch
from torch import nn

from teachers.analytic import Gaussian
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Denoiser
from teachers.guidance import PURE, DiscriminatorGuided, describe
from teachers.process import Karras, Linear, Trig
from teachers.solver import SOLVERS
from tests.helpers.noise_predictors import guided, labels, predictor

D = torch.float64
PROCESSES = [Karras(), Linear(), Linear(3.0), Trig(), Trig(0.5)]
MEAN, COV = torch.tensor([1.0, -0.5], dtype=D), torch.tensor([[0.6, 0.2], [0.2, 0.4]], dtype=D)
OTHER, WIDE = torch.tensor([0.4, 0.2], dtype=D), torch.tensor([[1.1, -0.3], [-0.3, 0.9]], dtype=D)


class Exact(nn.Module):
    """log p_t/q_t of the two Gaussians, each noised to t; it counts the samples it is asked for."""

    def __init__(self, data, teacher):
        super().__init__()
        self._of, self.samples = (data, teacher), 0
        self.offset = nn.Parameter(torch.zeros((), dtype=D))

    def forward(self, x_t, t, cond=None):
        self.samples += len(x_t)
        data, teacher = (self.log_density(g, x_t, t) for g in self._of)
        return data - teacher + self.offset

    @staticmethod
    def log_density(gaussian, x_t, t):
        alpha, sigma = gaussian.process.at(t, x_t)
        variance = alpha**2 * gaussian.values + sigma**2  # (B, D), in the eigenbasis
        gap = (x_t - alpha * gaussian.mean) @ gaussian.vectors
        return -0.5 * (gap**2 / variance + variance.log()).sum(1)


def pair(process):
    """The data's exact denoiser, the teacher, and the ratio of their densities."""
    data, teacher = Gaussian(MEAN, COV, process), Gaussian(OTHER, WIDE, process)
    return data, teacher, Exact(data, teacher)


def points(process, n=64):
    """x_t of all noise levels but the last, and t."""
    t = torch.linspace(0.02, 0.97, n, dtype=D)
    x = torch.randn(n, 2, dtype=D)
    return process.noise(x, t, torch.randn(n, 2, dtype=D)), t


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_with_the_exact_ratio_and_weight_one_the_teacher_is_the_datas_denoiser(process):
    data, teacher, ratio = pair(process)
    x_t, t = points(process)
    found = DiscriminatorGuided(teacher, ratio)(x_t, t)
    torch.testing.assert_close(found, data(x_t, t), rtol=0, atol=1e-6)
    assert (teacher(x_t, t) - data(x_t, t)).abs().max() > 0.1


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_the_weight_multiplies_what_is_added_to_the_score(process):
    data, teacher, ratio = pair(process)
    x_t, t = points(process)
    gap = data(x_t, t) - teacher(x_t, t)
    for scale in (0.5, 2.0):
        found = DiscriminatorGuided(teacher, ratio, scale)(x_t, t)
        torch.testing.assert_close(found, teacher(x_t, t) + scale * gap, rtol=0, atol=1e-6)


def test_weight_zero_is_the_teacher_bit_for_bit_and_asks_no_discriminator():
    _, teacher, ratio = pair(Karras())
    x_t, t = points(Karras())
    alone = DiscriminatorGuided(teacher, ratio, 0.0)
    assert torch.equal(alone(x_t, t), teacher(x_t, t))
    assert ratio.samples == 0
    assert describe(alone) == "unguided, g = 1"
    assert "w = 2 where 0.1 <" in describe(DiscriminatorGuided(teacher, ratio, 2.0, (0.1, 5.0)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws_the_datas_samples(solver):
    process = Karras(0.01, 20.0)
    data, teacher, ratio = pair(process)
    z = 20.0 * torch.randn(32, 2, dtype=D)
    times = process.grid(12)
    draws = []
    for denoiser in (DiscriminatorGuided(teacher, ratio), data, teacher):
        torch.manual_seed(0)  # of solvers that draw noise
        draws.append(SOLVERS[solver](denoiser, z, times, None))
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=1e-5)
    assert (draws[2] - draws[1]).abs().max() > 0.1


def test_it_acts_in_its_interval_alone():
    process = Linear()
    data, teacher, ratio = pair(process)
    t = torch.tensor([0.2, 0.5, 0.75, 0.75 + 1e-9, 0.9], dtype=D)  # σ/α = 1/4, 1, 3, …
    x_t = torch.randn(5, 2, dtype=D)
    denoiser = DiscriminatorGuided(teacher, ratio, interval=(0.25, 3.0))
    found, inside = denoiser(x_t, t), torch.tensor([False, True, True, False, False])
    torch.testing.assert_close(found[inside], data(x_t, t)[inside], rtol=0, atol=1e-6)
    assert torch.equal(found[~inside], teacher(x_t, t)[~inside])


@pytest.mark.parametrize("process", [Linear(), Trig()], ids=str)
def test_where_nothing_is_left_of_the_data_the_teacher_stays_as_it_is(process):
    """At t = 1, σ²/α has no finite value."""
    _, teacher, ratio = pair(process)
    x_t, t = torch.randn(3, 2, dtype=D), torch.ones(3, dtype=D)
    alpha, sigma = process.scales(t)
    assert (sigma > PURE * alpha).all()
    assert torch.equal(DiscriminatorGuided(teacher, ratio)(x_t, t), teacher(x_t, t))


def test_samples_that_look_like_the_teachers_are_boosted():
    data, teacher, ratio = pair(Karras())
    x_t, t = points(Karras())
    gap, low = data(x_t, t) - teacher(x_t, t), ratio(x_t, t) < 0
    assert 5 < low.sum() < 60
    found = DiscriminatorGuided(teacher, ratio, 1.5, boost=2.0)(x_t, t)
    weight = torch.where(low, 3.0, 1.5)[:, None]
    torch.testing.assert_close(found, teacher(x_t, t) + weight * gap, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_is_taken_where_the_caller_records_none(mode):
    data, teacher, ratio = pair(Karras())
    with mode():
        x_t, t = points(Karras())
        found = DiscriminatorGuided(teacher, ratio)(x_t, t)
        torch.testing.assert_close(found, data(x_t, t), rtol=0, atol=1e-6)
    assert not found.requires_grad


def test_the_discriminators_weights_are_frozen_and_get_no_gradient():
    _, teacher, ratio = pair(Karras())
    x_t, t = points(Karras())
    denoiser = DiscriminatorGuided(teacher, ratio)
    assert not denoiser(x_t, t).requires_grad
    x_t.requires_grad_()
    denoiser(x_t, t).sum().backward()
    assert not ratio.offset.requires_grad and ratio.offset.grad is None


def test_a_gradient_to_the_noisy_sample_passes_through_it():
    """As score identity needs: that of the data's denoiser, second derivatives of ℓ included."""
    data, teacher, ratio = pair(Trig())
    x_t, t = points(Trig())
    x_t.requires_grad_()
    direction = torch.randn_like(x_t)
    slopes = [
        torch.autograd.grad((denoiser(x_t, t) * direction).sum(), x_t)[0]
        for denoiser in (DiscriminatorGuided(teacher, ratio), data)
    ]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scales", [None, torch.tensor([1.0, 2.0, 3.0, 1.5, 1.0], dtype=D)])
def test_it_is_added_to_a_guided_teacher_under_the_samples_own_condition(scales):
    seen = []

    def ratio(x_t, t, cond):
        seen.append(cond)
        return (x_t * cond["class_labels"][:, None]).sum(1)

    teacher = guided(predictor(1), 2.5)
    x_t, t, cond = torch.randn(5, 3, dtype=D), torch.linspace(0.1, 0.9, 5, dtype=D), labels(5)
    given = cond if scales is None else {**cond, GUIDANCE_SCALE: scales}
    alpha, sigma = teacher.process.at(t, x_t)
    move = 0.5 * sigma**2 / alpha * cond["class_labels"][:, None]
    with torch.no_grad():
        found = DiscriminatorGuided(teacher, ratio, 0.5)(x_t, t, given)
        torch.testing.assert_close(found, teacher(x_t, t, given) + move)
    assert set(seen[0]) == {"class_labels"}
    assert "g = 2.5" in describe(DiscriminatorGuided(teacher, ratio))


def test_fused_attention_has_its_second_derivative():
    class Attends(Denoiser):
        process = Karras()

        def forward(self, x_t, t, cond=None, s=None):
            return x_t

        def weight(self, t):
            return torch.ones_like(t)

    def ratio(x_t, t, cond):
        q = x_t[:, None]  # (B, 1 head, N, C)
        return nn.functional.scaled_dot_product_attention(q, q, q).square().flatten(1).sum(1)

    x_t = torch.randn(2, 4, 8, requires_grad=True)
    t = torch.full((2,), 0.3)
    DiscriminatorGuided(Attends(), ratio)(x_t, t).sum().backward()
    assert x_t.grad is not None and torch.isfinite(x_t.grad).all()
