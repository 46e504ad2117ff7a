"""The formulas that objectives share, by hand; and the laws of the times that they draw."""

import math

import pytest
import torch

from distill.objectives.losses import (
    critic_loss,
    generator_loss,
    mean_abs,
    mean_square,
)
from distill.objectives.noise_levels import LogNormal, Uniform
from teachers.process import Karras, Linear


def softplus(x):
    return math.log1p(math.exp(x))


def test_the_critics_loss_is_low_where_data_have_high_logits_and_fakes_low_ones():
    fake, real = torch.tensor([-2.0, 1.0]), torch.tensor([3.0, -0.5])
    expected = (softplus(-2) + softplus(1)) / 2 + (softplus(-3) + softplus(0.5)) / 2
    assert critic_loss(fake, real).item() == pytest.approx(expected, rel=1e-6)
    fake.requires_grad_(), real.requires_grad_()
    critic_loss(fake, real).backward()
    assert (fake.grad > 0).all() and (real.grad < 0).all()  # a step down lowers and raises them


def test_the_students_loss_is_low_where_its_samples_have_high_logits():
    logits = torch.tensor([-2.0, 1.0], requires_grad=True)
    value = generator_loss(logits)
    assert value.item() == pytest.approx((softplus(2) + softplus(-1)) / 2, rel=1e-6)
    value.backward()
    assert (logits.grad < 0).all()


def test_distances_are_of_each_sample_and_averaged_over_its_dimensions():
    x, y = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
    y[1] *= -3
    torch.testing.assert_close(mean_square(x, y), torch.tensor([1.0, 9.0]))
    torch.testing.assert_close(mean_abs(y), torch.tensor([1.0, 3.0]).view(2, 1, 1))


def test_uniform_times_fill_their_range_evenly():
    t = Uniform(0.3, 0.7).sample(torch.zeros(100_000, 2), Karras())
    assert t.shape == (100_000,)
    assert 0.3 <= t.min() < 0.3001 and 0.6999 < t.max() <= 0.7
    assert t.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert t.std().item() == pytest.approx(0.4 / 12**0.5, rel=0.01)


@pytest.mark.parametrize("process", [Karras(), Linear()], ids=repr)
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.3), (-0.5, 0.0)])
def test_log_normal_times_have_noise_levels_of_that_mean_and_deviation(mean, std, process):
    t = LogNormal(mean, std).sample(torch.zeros(100_000, 2), process).double()
    alpha, sigma = process.scales(t)
    levels = (sigma / alpha).log()
    assert levels.mean().item() == pytest.approx(mean, abs=0.02)
    assert levels.std().item() == pytest.approx(std, rel=0.02, abs=1e-4)


def test_log_normal_times_are_held_within_the_process():
    t = LogNormal(0.0, 20.0).sample(torch.zeros(1000, 2), Karras())
    assert t.min() == 0 and t.max() == 1


def test_shifted_times_have_the_noise_levels_of_a_shifted_flow():
    torch.manual_seed(0)
    plain = Uniform().sample(torch.zeros(50_000, 2), Linear()).double()
    torch.manual_seed(0)
    shifted = Uniform(shift=3.0).sample(torch.zeros(50_000, 2), Linear()).double()
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), atol=1e-6, rtol=1e-5)


def test_a_flows_logit_normal_times_are_log_normal_levels():
    torch.manual_seed(0)
    t = LogNormal(-0.4, 1.0).sample(torch.zeros(100_000, 2), Linear()).double()
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert logit.std().item() == pytest.approx(1.0, abs=0.02)
