import pytest
import torch
from diffusers import DDPMScheduler

from teachers.process import Cosine, Karras, Linear, Tabulated, Trig

PROCESSES = {
    "linear": Linear(),
    "shifted": Linear(3.0),
    "trig": Trig(),
    "trig half": Trig(0.5),
    "cosine": Cosine(),
    "cosine at 256": Cosine(256 / 64),
    "cosine from 256 to 32": Cosine(512 / 32, 512 / 256),
    "karras": Karras(),
    "ddpm": Tabulated.linear(),
    "sd": Tabulated.scaled_linear(),
}


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def draws(n=64):
    x, eps = torch.randn(2, n, 3, dtype=torch.double)
    return x, eps, torch.rand(n, dtype=torch.double).clamp(0.05, 0.95)


def test_time_inverts_the_noise_to_signal_ratio(process):
    t = torch.linspace(0.01, 0.99, 97, dtype=torch.double)
    alpha, sigma = process.scales(t)
    torch.testing.assert_close(process.time(sigma / alpha), t, atol=1e-9, rtol=0)


def test_eps_is_what_noise_put_in(process):
    x, eps, t = draws()
    torch.testing.assert_close(process.eps(process.noise(x, t, eps), x, t), eps)


def test_a_step_moves_along_the_line_of_x_and_eps(process):
    x, eps, t = draws()
    s = t * 0.5
    torch.testing.assert_close(
        process.step(process.noise(x, t, eps), x, t, s), process.noise(x, s, eps)
    )


def test_end_inverts_step(process):
    x, eps, t = draws()
    s, x_t = t * 0.5, process.noise(x, t, eps)
    torch.testing.assert_close(process.end(x_t, process.step(x_t, x, t, s), t, s), x)


def test_velocity_is_the_time_derivative_of_the_path(process):
    x, eps, t = draws()
    h = 1e-7
    rise = process.noise(x, t + h, eps) - process.noise(x, t - h, eps)
    torch.testing.assert_close(
        process.velocity(process.noise(x, t, eps), x, t), rise / (2 * h), rtol=1e-4, atol=1e-5
    )


def test_karras_spans_its_levels_and_matches_edm_at_the_middle():
    t = torch.tensor([0.0, 0.8, 1.0], dtype=torch.double)
    _, sigma = Karras().scales(t)
    expected = torch.tensor([0.002, 24.41, 80.0], dtype=torch.double)  # SiD's truncation is at 0.8
    torch.testing.assert_close(sigma, expected, rtol=1e-3, atol=0)


def test_stable_diffusions_noise_levels_are_the_published_ones():
    process = Tabulated.scaled_linear()
    index = torch.tensor([0, 1, 19, 499, 999], dtype=torch.double)
    alpha, sigma = process.scales(index / 999)
    expected = torch.tensor([0.02917, 0.0413, 0.1345, 1.6129, 14.615], dtype=torch.double)
    torch.testing.assert_close(sigma / alpha, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_table_is_diffusers_own_at_every_index(schedule):
    bar = DDPMScheduler(beta_schedule=schedule).alphas_cumprod
    process = Tabulated(bar)
    alpha, sigma = process.scales(torch.arange(1000, dtype=torch.double) / 999)
    torch.testing.assert_close(alpha.float(), bar.sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sigma.float(), (1 - bar).sqrt(), rtol=1e-5, atol=1e-5)


def test_linear_betas_span_the_published_range():
    alpha, sigma = Tabulated.linear().scales(torch.tensor([0.0, 1.0], dtype=torch.double))
    expected = torch.tensor([0.010, 157.4], dtype=torch.double)
    torch.testing.assert_close(sigma / alpha, expected, rtol=1e-3, atol=1e-5)


def test_scales_at_a_time_are_worked_out_in_float64():
    process, x = Karras(), torch.zeros(1, 1)
    sigma = process.at(torch.ones(1), x)[1]
    assert sigma.item() == 80.0
    assert sigma.dtype == torch.float32
    assert process.at(torch.ones(1), x.half())[1].dtype == torch.float32
