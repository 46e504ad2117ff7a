"""Weights of noise levels: equal to the losses that they stand for."""

import math

import pytest
import torch

from distill.config.objectives import OBJECTIVES
from distill.objectives.base import Batch
from distill.objectives.weights import error_weight
from students.generator import Generator
from teachers.denoiser import Network
from teachers.process import Cosine, Karras, Linear, Trig
from tests.helpers.toys import Affine

D = torch.float64


@pytest.mark.parametrize(("weighting", "predicts"), [("x", "x"), ("eps", "eps"), ("v", "v")])
def test_a_weight_is_the_loss_of_that_prediction_on_variance_preserving_noise(weighting, predicts):
    process = Trig()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=D)
    x, eps, out = (torch.randn(3, 4, dtype=D) for _ in range(3))
    x_t = process.noise(x, t, eps)
    network = Network(Fixed(out), process, predicts)
    alpha, sigma = process.at(t, x)
    wanted = {"x": x, "eps": eps, "v": alpha * eps - sigma * x}[predicts]
    error = (network(x_t, t) - x).square().mean(1)
    expected = (out - wanted).square().mean(1)
    torch.testing.assert_close(error_weight(weighting, process, t) * error, expected)


def test_flow_is_the_loss_of_a_rectified_flows_velocity():
    process, t = Linear(), torch.tensor([0.1, 0.5, 0.9], dtype=D)
    x, eps, out = (torch.randn(3, 4, dtype=D) for _ in range(3))
    x_hat = Network(Fixed(out), process, "flow")(process.noise(x, t, eps), t)
    weight = error_weight("flow", process, t)
    torch.testing.assert_close(
        weight * (x_hat - x).square().mean(1), (out - (eps - x)).square().mean(1)
    )


@pytest.mark.parametrize("process", [Karras(), Linear(), Trig(), Cosine()], ids=repr)
def test_weights_depend_on_the_noise_level_alone(process):
    t = process.time(torch.tensor([0.25, 0.5, 2.0], dtype=D))  # SNR 16, 4, 1/4
    for weighting, expected in {
        "eps": [16, 4, 0.25],
        "v": [17, 5, 1.25],
        "flow": [25, 9, 2.25],
        "min-snr": [5, 4, 0.25],
        "truncated-snr": [16, 4, 1],
    }.items():
        assert error_weight(weighting, process, t).tolist() == pytest.approx(expected)
    bounded = error_weight("min-snr", process, t, gamma=1.0).tolist()
    assert bounded == pytest.approx([1, 1, 0.25])


def test_the_sigmoid_weight_of_eps_rises_with_noise_and_is_half_at_its_bias():
    t = torch.linspace(0.01, 0.99, 50, dtype=D)
    of_eps = error_weight("sigmoid", Linear(), t) / error_weight("eps", Linear(), t)
    assert (of_eps.diff() > 0).all()  # monotone: an ELBO
    at = Linear().time(torch.tensor([math.exp(-1)], dtype=D))  # log SNR 2
    half = error_weight("sigmoid", Linear(), at) / error_weight("eps", Linear(), at)
    assert half.item() == pytest.approx(0.5)


def test_diffusion_weighs_its_error_by_the_recipes_weight():
    network = Affine(torch.zeros(1, dtype=D), torch.full((1, 1), 0.5, dtype=D))
    batch = Batch(torch.ones(4, 1, dtype=D), torch.ones(4, 1, dtype=D))
    times = OBJECTIVES["diffusion"].times.__class__(0.7, 0.0)  # one noise level

    def loss(**keys):
        student = Generator(network)
        return OBJECTIVES["diffusion"](teacher=network, student=student, times=times, **keys).loss(
            batch, 0
        )

    snr = math.exp(-1.4)
    x = loss(weighting="x").value
    assert loss(weighting="eps").value.item() == pytest.approx(snr * x.item(), rel=1e-6)
    assert loss(weighting="truncated-snr").value.item() == pytest.approx(x.item())
    assert loss(weighting="min-snr", gamma=0.1).value.item() == pytest.approx(0.1 * x.item())


class Fixed(torch.nn.Module):
    """A backbone with one output."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x_t, t):
        return self.out
