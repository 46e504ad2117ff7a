"""AnyFlow's first stage against its published loss, and exact flow maps."""

import pytest
import torch

from distill.objectives.flow_maps.anyflow import AnyFlow
from distill.objectives.flow_maps.meanflow import Jump, MeanFlow
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.process import Karras, Linear
from tests.helpers.flow_maps import MAPS, D, Shifted
from tests.helpers.refusals import refused
from tests.objectives.test_meanflow import N, data, error


@pytest.fixture(autouse=True)
def _times_of_double_precision():
    """Differences of small steps would hold little but the rounding of float32's times."""
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def made(process=None, name="mixture", shift=0.0, **keys):
    exact = MAPS[name](process or Linear())
    keys = {"times": Uniform(0.1, 0.9), **keys}
    return AnyFlow(teacher=exact.denoiser, student=Generator(Shifted(exact, shift)), **keys)


@pytest.mark.parametrize(("step", "rounding"), [(5e-3, 2e-3), (1e-4, 1e-6)])
def test_its_loss_and_gradient_are_the_published_ones(step, rounding):
    """Typed from the paper's formulas, for a rectified flow and the velocity F = (x_t - x̂) / t."""
    objective, batch = made(shift=0.1, derivative_step=step), data()
    f = objective.student.denoiser
    torch.manual_seed(0)
    found = objective.loss(batch, 0)
    torch.manual_seed(0)
    t, r = (v[:, None] for v in objective.sample_times(batch.data))
    x_t, v = (1 - t) * batch.data + t * batch.noise, batch.noise - batch.data

    def velocity(x_t, t):
        return (x_t - f(x_t, t[:, 0], None, r[:, 0])) / t

    with torch.no_grad():
        ahead, behind = (velocity(x_t + h * v, t + h) for h in (step, -step))
        target = v - (t - r) * (ahead - behind) / (2 * step)
    loss = (velocity(x_t, t) - target).square().mean(1) * (t * (1 - t).sqrt())[:, 0] * 15 / 4
    with torch.no_grad():
        scale = loss[: N // 2].mean() / (loss + 1e-5)
        scale[: N // 2] = 1
    expected = (loss * scale).mean()
    torch.testing.assert_close(found.value, expected, atol=rounding, rtol=rounding)
    slopes = [torch.autograd.grad(v, f.shift)[0] for v in (found.value, expected)]
    assert slopes[1].abs() > 0.01
    torch.testing.assert_close(*slopes, atol=10 * rounding, rtol=10 * rounding)


@pytest.mark.parametrize("process", [Linear(), Karras()], ids=str)
def test_small_differences_are_meanflows_derivative(process):
    batch = data()
    t, s = torch.full((N,), 0.6, dtype=D), torch.full((N,), 0.2, dtype=D)
    exact = MAPS["mixture"](process)
    keys = {"teacher": exact.denoiser, "student": Generator(Shifted(exact, 0.1)), "equal": 0.0}
    plain = error(MeanFlow(velocity="data", **keys), batch, t, s)
    gaps = [
        (error(AnyFlow(derivative_step=step, **keys), batch, t, s) - plain).abs().max().item()
        for step in (4e-3, 2e-3, 1e-3)
    ]
    assert gaps[2] < 0.01
    for wide, narrow in zip(gaps, gaps[1:], strict=False):
        assert wide / narrow == pytest.approx(4, rel=0.1)  # of second order


@pytest.mark.parametrize("process", [Linear(), Karras()], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_an_exact_flow_map_on_its_teachers_path_has_no_error(process, name):
    objective = made(process, name, velocity="teacher", derivative_step=1e-5)
    torch.manual_seed(0)
    assert objective.loss(data(), 0).logs["error"] < 1e-12


def test_on_data_an_exact_velocity_has_the_floor_of_the_datum():
    """Where s = t the error is the datum's own velocity less its mean, as in flow matching."""
    objective, batch = made(equal=1.0, ending=0.0), data()
    t = torch.linspace(0.1, 0.9, N, dtype=D)
    x_t = Linear().noise(batch.data, t, batch.noise)
    expected = (batch.data - objective.teacher(x_t, t)) / t[:, None]
    torch.testing.assert_close(error(objective, batch, t, t), expected)


def test_velocities_are_weighted_by_their_time_and_jumps_count_as_much():
    objective = made(equal=0.5, ending=0.25)
    tau = torch.tensor([0.1, 0.5, 0.3, 0.9], dtype=D)
    gap = torch.tensor([[1.0, 2.0], [0.5, 0.0], [30.0, 1.0], [0.02, 0.03]], dtype=D)
    loss = objective.weight(gap, tau) * gap.square().sum(1)
    plain = 15 / 4 * tau * (1 - tau).sqrt() * gap.square().mean(1)
    torch.testing.assert_close(loss[:2], plain[:2])
    torch.testing.assert_close(loss[2:], plain[:2].mean() * plain[2:] / (plain[2:] + 1e-5))
    even = torch.linspace(0, 1, 100_001, dtype=D)
    alone = made(equal=1.0, ending=0.0).weight(torch.ones(len(even), 1, dtype=D), even)
    assert alone.mean().item() == pytest.approx(1, abs=1e-4)


def test_a_batch_without_velocities_is_balanced_by_itself():
    objective = made(equal=0.0, ending=1.0)
    gap, tau = torch.tensor([[1.0], [3.0]], dtype=D), torch.full((2,), 0.5, dtype=D)
    loss = objective.weight(gap, tau) * gap.square().sum(1)
    torch.testing.assert_close(loss[0], loss[1], rtol=1e-4, atol=0)


def test_half_of_the_samples_are_velocities_and_a_quarter_lands_at_0():
    torch.manual_seed(0)
    t, s = made(times=Uniform()).sample_times(torch.zeros(4000, 1, dtype=D))
    assert torch.equal(s[:2000], t[:2000]) and not s[2000:3000].any()
    assert (s[3000:] < t[3000:]).all() and (s[3000:] > 0).all()
    assert t.mean().item() == pytest.approx(2 / 3, abs=0.02)  # the larger of two


def test_one_step_lands_on_the_exact_end():
    """x̂ of a jump to 0 is the end of the exact path, so training has it as its fixed point."""
    objective, batch = made(velocity="teacher", equal=0.0, ending=1.0), data()
    t, s = torch.full((N,), 0.8, dtype=D), torch.zeros(N, dtype=D)
    jump = Jump(Linear().noise(batch.data, t, batch.noise), t, s)
    objective.derivative_step = 1e-5
    x, lacking = objective.predicted(jump, batch, 0)
    torch.testing.assert_close(x, objective.student.denoiser.denoiser.flow(jump.x_t, t, s))
    assert lacking.abs().max() < 1e-6


def test_shares_of_more_than_a_batch_are_refused():
    with refused("objective.ending", 0.75, 0.5):
        made(equal=0.5, ending=0.75)
