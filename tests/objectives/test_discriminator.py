"""A discriminator of the teacher's samples: its optimum is the log-density ratio."""

import math

import pytest
import torch
from torch import nn

from distill.objectives.adversarial.discriminator import Discriminator
from distill.objectives.base import Batch
from distill.objectives.noise_levels import LogUniform
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.guidance import DiscriminatorGuided
from teachers.process import Karras, Linear, Tabulated
from teachers.solver import solve
from tests.helpers.noise_predictors import guided, labels, predictor

D = torch.float64


class Quadratic(nn.Module):
    """ℓ = a + b x + c x² of x_t (B, 1), at one noise level."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(3, dtype=D))

    def forward(self, x_t, t, cond=None):
        return torch.cat([torch.ones_like(x_t), x_t, x_t**2], 1) @ self.weights


def ratio_of(mean, std, other, wide):
    """The coefficients of log N(mean, std²)/N(other, wide²)."""
    a = math.log(wide / std) + (other / wide) ** 2 / 2 - (mean / std) ** 2 / 2
    return [a, mean / std**2 - other / wide**2, 0.5 / wide**2 - 0.5 / std**2]


def test_the_losss_optimum_is_the_log_ratio_and_moves_the_teacher_onto_the_data():
    """Teacher N(0.3, 1), data N(1, 0.6²), both seen at σ = 0.8."""
    process, level = Karras(0.002, 20.0), 0.8
    teacher = Gaussian(torch.tensor([0.3], dtype=D), torch.ones(1, dtype=D), process)
    data = Gaussian(torch.tensor([1.0], dtype=D), torch.tensor([0.36], dtype=D), process)
    critic = Quadratic()
    objective = Discriminator(
        teacher=teacher, student=Generator(teacher), critic=critic, levels=2, solver_steps=24,
        times=LogUniform(level, level * (1 + 1e-9)),
    )  # fmt: skip
    torch.manual_seed(0)
    batch = Batch(data.sample(40_000), torch.randn(40_000, 1, dtype=D))
    optimizer = torch.optim.LBFGS([critic.weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = objective.critic_loss(batch).value
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = ratio_of(1.0, math.hypot(0.6, level), 0.3, math.hypot(1.0, level))
    assert critic.weights.tolist() == pytest.approx(exact, abs=0.04)
    x_t = torch.linspace(-0.5, 2.0, 9, dtype=D)[:, None]
    t = process.time(torch.full((9,), level, dtype=D))
    found = DiscriminatorGuided(teacher, critic)(x_t, t)
    torch.testing.assert_close(found, data(x_t, t), rtol=0, atol=0.04)
    assert (teacher(x_t, t) - data(x_t, t)).abs().max() > 0.3


def test_it_learns_data_against_samples_of_the_guided_teacher_under_equal_conditions():
    seen = []

    def critic(x_t, t, cond):
        seen.append((x_t, cond))
        return x_t.sum(1)

    process = Linear()
    teacher = guided(predictor(1, process, "flow"), 2.0)
    objective = Discriminator(
        teacher=teacher, student=Generator(teacher), critic=critic, levels=3, solver_steps=4,
        times=LogUniform(1e-9, 1.1e-9),
    )  # fmt: skip
    batch = Batch(torch.randn(6, 3, dtype=D), torch.randn(6, 3, dtype=D), labels(6))
    (turn,) = objective.turns(0)
    assert turn.players == ("critic",)
    loss = turn.loss(batch)
    x = solve(teacher, batch.noise, 4, "heun", batch.cond).detach().repeat(3, 1)
    data = batch.data.repeat(3, 1)
    ((both, cond),) = seen
    torch.testing.assert_close(both, torch.cat([x, data]), rtol=0, atol=1e-6)
    assert torch.equal(cond["class_labels"], batch.cond["class_labels"].repeat(6))
    expected = -x.sum(1).neg().sigmoid().log().mean() - data.sum(1).sigmoid().log().mean()
    torch.testing.assert_close(loss.value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("process", [Karras(), Linear(), Tabulated.linear()], ids=str)
def test_times_are_even_in_the_logarithm_of_the_noise_level(process):
    torch.manual_seed(0)
    t = LogUniform(0.05, 20.0).sample(torch.zeros(40_000, 1), process)
    alpha, sigma = process.scales(t.double())
    place = ((sigma / alpha).log() - math.log(0.05)) / math.log(400)
    even = torch.linspace(0, 1, len(place), dtype=D)
    assert (place.sort().values - even).abs().max() < 0.01


def test_an_empty_range_of_times_is_refused():
    with pytest.raises(ValueError, match="least, 2"):
        LogUniform(2.0, 1.0)
