import math

import pytest
import torch

from teachers.analytic import Gaussian
from teachers.process import Karras, Linear, Tabulated, Trig
from teachers.solver import SOLVERS, heun_step, solve
from tests.helpers.refusals import refused

C = 0.5


def gaussian(process):
    return Gaussian(
        torch.zeros(1, dtype=torch.double), torch.tensor([C**2], dtype=torch.double), process
    )


def error(method, process, steps):
    """How far the slope of n steps lies from the true flow's, from t = 1 to near data."""
    teacher, x = gaussian(process), torch.ones(1, 1, dtype=torch.double)
    times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.double)
    # a last time just below: its x̂ is undone by landing on it as a step
    t, s = times[:1], times[-1:]
    seen = {}

    def record(x_t, at, cond=None):
        seen["x"] = x_t
        return teacher(x_t, at)

    record.process = process
    SOLVERS[method](record, x, times)
    return (seen["x"] - teacher.flow(x, t, s)).abs().item()


@pytest.mark.parametrize(
    "process", [Karras(0.01, 10), Linear(), Trig(), Tabulated.linear()], ids=repr
)
@pytest.mark.parametrize(
    ("method", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)]
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(method, order, process):
    coarse, fine = error(method, process, 256), error(method, process, 512)
    assert 0.75 * order < math.log2(coarse / fine) < 1.35 * order


@pytest.mark.parametrize(("n", "slope"), [(2, 0.2), (4, 0.33344), (8, 0.41138), (16, 0.45393)])
def test_ddim_on_uniform_angles_has_the_published_slopes(n, slope):
    one = torch.ones(1, 1, dtype=torch.double)
    assert solve(gaussian(Trig()), one, n, "ddim").item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("method", sorted(SOLVERS.keys() - {"renoise"}))
@pytest.mark.parametrize("process", [Karras(), Linear(), Tabulated.linear()], ids=repr)
def test_every_solver_ends_in_the_datas_law(method, process):
    z = torch.randn(20000, 1, dtype=torch.double)
    x = solve(gaussian(process), z, 400, method)
    assert x.std().item() == pytest.approx(C, rel=0.06)
    assert abs(x.mean().item()) < 0.02


def test_renoising_keeps_the_law_under_an_exact_consistency_function():
    teacher = gaussian(Karras())

    class Consistent(Gaussian):
        def forward(self, x_t, t, cond=None, s=None):
            return teacher.flow(x_t, t, torch.zeros_like(t))

    model = Consistent(torch.zeros(1).double(), torch.ones(1).double(), Karras())
    x = solve(model, torch.randn(20000, 1, dtype=torch.double), 5, "renoise")
    assert x.std().item() == pytest.approx(C, rel=0.02)


def test_solvers_call_their_network_as_often_as_they_say():
    for method in SOLVERS:
        teacher, calls = gaussian(Karras()), []
        teacher.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        solve(teacher, torch.ones(1, 1, dtype=torch.double), 5, method)
        assert len(calls) == (9 if method == "heun" else 5), method  # Heun's last is Euler's


def test_an_unknown_solver_is_refused_by_name():
    with refused("solver 'huen'", "heun"):
        solve(gaussian(Karras()), torch.ones(1, 1), 2, "huen")


def test_a_heun_step_from_noise_or_onto_data_is_a_ddim_step_and_others_are_not():
    process = Linear()
    teacher, x_t = gaussian(process), torch.tensor([[1.0], [0.7], [0.4]], dtype=torch.double)
    t, s = torch.tensor([[1.0, 0.6, 0.5], [0.5, 0.0, 0.45]], dtype=torch.double)
    got = heun_step(teacher, x_t, t, s)
    first = process.noise(teacher(x_t, t), s, process.eps(x_t, teacher(x_t, t), t))
    torch.testing.assert_close(got[:2], first[:2], rtol=0, atol=0)
    assert (got[2] - first[2]).abs() > 1e-3
    exact = teacher.flow(x_t, t, s)
    assert (got[2] - exact[2]).abs() < 0.3 * (first[2] - exact[2]).abs()


@pytest.mark.parametrize("process", [Tabulated.linear(), Karras(0.01, 10)], ids=repr)
def test_an_ancestral_step_has_the_posteriors_mean_and_variance(process):
    """q(x_s | x_t, x̂) of the Markov chain (arXiv:2006.11239, equations 6 and 7)."""
    n = 400_000
    times = torch.tensor([0.6, 0.5], dtype=torch.double)
    x, x_t = torch.tensor(0.3).double(), torch.full((n, 1), 1.2).double()
    seen = []

    def known(x_t, t, cond=None):
        seen.append(x_t)
        return x.expand_as(x_t)

    known.process = process
    SOLVERS["ancestral"](known, x_t, times)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = process.scales(times)
    ratio = alpha_t / alpha_s
    beta = sigma_t**2 - ratio**2 * sigma_s**2  # of the noise that the chain adds from s to t
    mean = (ratio * sigma_s**2 * 1.2 + alpha_s * beta * x) / sigma_t**2
    std = (beta * sigma_s**2 / sigma_t**2).sqrt()
    assert seen[1].mean().item() == pytest.approx(mean.item(), abs=4 * std.item() / n**0.5)
    assert seen[1].std().item() == pytest.approx(std.item(), rel=0.01)
