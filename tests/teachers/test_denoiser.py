import math

import pytest
import torch
from torch import nn

from teachers.analytic import Finite, Gaussian, Mixture, ring
from teachers.denoiser import PREDICTIONS, Denoiser, Guided, Network, Reparametrised, edm
from teachers.process import Karras, Linear, Tabulated, Trig


class Answer(nn.Module):
    """A backbone that says the one right thing for a known x and ε."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x_t, t):
        return self.out


@pytest.mark.parametrize("process", [Linear(), Trig(), Tabulated.linear(), Karras()], ids=repr)
def test_every_prediction_of_the_truth_gives_x(process):
    x, eps = torch.randn(2, 16, 3, dtype=torch.double)
    t = torch.rand(16, dtype=torch.double).clamp(0.1, 0.9)
    alpha, sigma = process.at(t, x)
    x_t = process.noise(x, t, eps)
    u = x_t / alpha
    n = ((sigma / alpha) ** 2 + 0.25).sqrt()
    truth = {
        "x": x,
        "eps": eps,
        "v": alpha * eps - sigma * x,
        "flow": eps - x,
        "edm": (x - 0.25 / n**2 * u) * n / (sigma / alpha * 0.5),
    }
    assert truth.keys() == PREDICTIONS.keys()
    for name, out in truth.items():
        torch.testing.assert_close(Network(Answer(out), process, name)(x_t, t), x)


def test_the_weight_makes_the_squared_error_of_x_the_networks_own():
    t = torch.rand(8, dtype=torch.double).clamp(0.1, 0.9)
    alpha, sigma = Tabulated.linear().scales(t)
    snr = (alpha / sigma).square()
    weigh = {n: Network(nn.Identity(), Tabulated.linear(), n).weight(t) for n in PREDICTIONS}
    torch.testing.assert_close(weigh["eps"], snr.clamp(max=1e8))
    torch.testing.assert_close(weigh["v"], snr + 1)
    torch.testing.assert_close(weigh["x"], torch.ones_like(t))


def test_a_consistency_network_is_the_identity_at_sigma_min():
    process = Karras()
    network = Network(Answer(torch.randn(4, 3)), process, edm(0.5, 0.002))
    x = torch.randn(4, 3)
    torch.testing.assert_close(network(x, torch.zeros(4)), x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "process", [Karras(0.01, 20), Trig(), Trig(0.5), Tabulated.linear()], ids=repr
)
def test_the_process_is_only_a_clock(process):
    straight, x = Mixture(ring(), 0.2, process), torch.randn(16, 2)
    seen = Reparametrised(Mixture(ring(), 0.2, Linear()), process)
    t = torch.rand(16).clamp(0.1, 0.9)
    torch.testing.assert_close(seen(x, t), straight(x, t), atol=1e-4, rtol=1e-3)


def test_pure_noise_under_another_process_is_finite():
    seen = Reparametrised(Mixture(ring(), 0.2, Karras()), Linear())
    assert torch.isfinite(seen(torch.randn(4, 2), torch.ones(4))).all()


class Counting(Denoiser):
    process = Linear()
    calls = 0

    def forward(self, x_t, t, cond=None, s=None):
        self.calls += 1
        return x_t * cond["class_labels"].view(-1, 1)


def test_guidance_is_linear_and_scale_one_is_one_evaluation_of_the_condition():
    inner, x, t = Counting(), torch.randn(4, 2), torch.rand(4)
    cond, null = {"class_labels": torch.tensor([1, 2, 3, 4])}, {"class_labels": torch.tensor([10])}
    torch.testing.assert_close(Guided(inner, 1.0, null)(x, t, cond), inner(x, t, cond))
    assert inner.calls == 2
    g = cond["class_labels"].view(-1, 1)
    torch.testing.assert_close(Guided(inner, 3.0, null)(x, t, cond), x * (10 + 3 * (g - 10)))
    assert inner.calls == 3  # both halves in one batch


def test_a_gaussian_denoiser_is_the_posterior_mean():
    cov = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=torch.double)
    mean = torch.tensor([0.3, -1.0], dtype=torch.double)
    teacher = Gaussian(mean, cov, Karras())
    x_t, t = torch.randn(8, 2, dtype=torch.double), torch.full((8,), 0.4, dtype=torch.double)
    sigma = Karras().scales(t)[1][0]
    gain = cov @ torch.linalg.inv(cov + sigma**2 * torch.eye(2))
    torch.testing.assert_close(teacher(x_t, t), mean + (x_t - mean) @ gain.T)


def test_the_denoiser_of_a_finite_set_is_the_mixture_of_its_points():
    items = ring(5).double()
    finite, mixture = Finite(items), Mixture(items, 1e-6)
    x_t, t = torch.randn(8, 2, dtype=torch.double), torch.full((8,), 0.5, dtype=torch.double)
    torch.testing.assert_close(finite(x_t, t), mixture(x_t, t))


def test_a_mixtures_weights_are_the_shares_of_its_components():
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.double)
    mixture = Mixture(means, 0.5, Karras(), torch.tensor([0.2, 0.8], dtype=torch.double))
    x_t, t = torch.tensor([[0.3]], dtype=torch.double), torch.tensor([0.4], dtype=torch.double)
    sigma = Karras().scales(t)[1].item()
    var = 0.25 + sigma**2
    left, right = 0.2 * math.exp(-(1.3**2) / (2 * var)), 0.8 * math.exp(-(0.7**2) / (2 * var))
    gain = 0.25 / var
    expected = (left * (-1 + gain * 1.3) + right * (1 - gain * 0.7)) / (left + right)
    assert mixture(x_t, t).item() == pytest.approx(expected, rel=1e-9)
    assert (mixture.sample(20_000) > 0).double().mean().item() == pytest.approx(
        0.8 * 0.97725 + 0.2 * 0.02275, abs=0.015
    )


def test_labels_restrict_the_finite_set():
    items, labels = ring(4).double(), torch.tensor([0, 0, 1, 1])
    cond = {"class_labels": torch.tensor([1] * 8)}
    x_t, t = torch.randn(8, 2, dtype=torch.double), torch.full((8,), 0.5, dtype=torch.double)
    torch.testing.assert_close(
        Finite(items, labels)(x_t, t, cond), Finite(items[2:])(x_t, t), atol=1e-9, rtol=0
    )


def test_the_loss_is_the_squared_error_by_its_weight_averaged_over_dimensions():
    class Off(Gaussian):
        """Wrong by 2 in each dimension, and of a weight that grows with t."""

        def forward(self, x_t, t, cond=None, s=None):
            return torch.zeros_like(x_t) + 2

        def weight(self, t):
            return 1 + t

    x, t = torch.zeros(3, 5), torch.tensor([0.0, 0.5, 1.0])
    off = Off(torch.zeros(5), torch.ones(5))
    assert off.loss(x, t).item() == pytest.approx(4 * (1 + 1.5 + 2) / 3)


def test_a_wrapper_has_the_weight_of_its_network_at_the_same_noise():
    inner = Network(nn.Identity(), Linear(), "eps")
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.double)
    alpha, sigma = Karras().scales(t)
    expected = inner.weight(Linear().time(sigma / alpha))
    torch.testing.assert_close(Reparametrised(inner, Karras()).weight(t), expected)
    torch.testing.assert_close(expected, sigma**-2.0, rtol=1e-6, atol=0)  # ε's weight is the SNR
    torch.testing.assert_close(Guided(inner, 3.0).weight(t), inner.weight(t))
