"""MeanFlow, improved MeanFlow and AYF against exact flow maps, in any process."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.flow_maps.meanflow import AYF, Jump, MeanFlow
from distill.objectives.flow_maps.rectified import flow_time, process_time
from distill.objectives.noise_levels import LogNormal, Uniform
from students.generator import Generator
from teachers.process import Cosine, Karras, Linear, Tabulated, Trig, expand
from tests.helpers.flow_maps import MAPS, D, Shifted

PROCESSES = [Linear(), Linear(3.0), Karras(), Trig(0.5), Cosine()]
N = 12


def made(kind=MeanFlow, process=None, name="mixture", shift=0.0, **keys):
    exact = MAPS[name](process or Linear())
    keys = {"times": Uniform(0.1, 0.9), "equal": 0.25, **keys}
    return kind(teacher=exact.denoiser, student=Generator(Shifted(exact, shift)), **keys)


def data(n=N):
    rng = torch.Generator().manual_seed(1)
    x = torch.where(torch.rand(n, 1, generator=rng) < 0.3, -1.0, 0.8)
    x, noise = x + 0.2 * torch.randn(n, 1, generator=rng), torch.randn(n, 1, generator=rng)
    return Batch(x.to(D), noise.to(D))


def error(objective, batch, t, s, step=0):
    """The identity's error in u, of the student's own x̂."""
    process = objective.student.denoiser.process
    jump = Jump(process.noise(batch.data, t, batch.noise), t, s)
    with torch.no_grad():
        found = objective.predicted(jump, batch, step)[1].detach()
    return found / expand(flow_time(process, t).tau, found)


@pytest.mark.parametrize("process", [*PROCESSES, Tabulated.linear()], ids=str)
def test_flow_time_is_that_of_a_rectified_flow_with_its_rate(process):
    t = torch.linspace(0.1, 0.9, 7, dtype=D)
    tau, rate = flow_time(process, t)
    alpha, sigma = process.scales(t)
    torch.testing.assert_close(tau, sigma / (alpha + sigma))
    torch.testing.assert_close(process_time(process, tau), t, atol=1e-9, rtol=0)
    ahead = (flow_time(process, t + 1e-6).tau - flow_time(process, t - 1e-6).tau) / 2e-6
    torch.testing.assert_close(rate, ahead, rtol=1e-4, atol=0)
    ends = process_time(process, torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [MeanFlow, AYF])
@pytest.mark.parametrize("direction", ["velocity", "own"])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_an_exact_flow_map_has_no_error(process, name, direction, kind):
    keys = {"limit": 1.0} if kind is AYF else {}
    objective = made(kind, process, name, direction=direction, **keys)
    torch.manual_seed(0)
    loss = objective.loss(data(), 10)
    assert loss.logs["error"].item() < 1e-12
    loss.value.backward()
    assert objective.student.denoiser.shift.grad.abs() < 1e-4  # weights grow up to 100


@pytest.mark.parametrize("name", MAPS)
def test_the_error_is_that_of_finite_differences_on_a_wrong_student(name):
    """u - v + (t - s) du/dt of a student off by 0.1, by differences along the exact path."""
    objective, batch = made(process=Karras(), name=name, shift=0.1), data()
    f, process = objective.student.denoiser, Karras()
    t, s = torch.full((N,), 0.6, dtype=D), torch.full((N,), 0.3, dtype=D)
    objective.equal = 0.0
    x_t, tau = process.noise(batch.data, t, batch.noise), flow_time(process, t).tau

    def u(x_t, t):
        time = expand(flow_time(process, t).tau, x_t)
        return (x_t / sum(process.at(t, x_t)) - f(x_t, t, None, s)) / time

    near = [process_time(process, tau + h) for h in (1e-5, -1e-5)]
    flow = f.denoiser.flow
    values = [u(flow(x_t, t, r), r) for r in near]
    slope = (values[0] - values[1]) / 2e-5
    velocity = (x_t / sum(process.at(t, x_t)) - objective.teacher(x_t, t)) / expand(tau, x_t)
    gap = expand(tau - flow_time(process, s).tau, x_t)
    expected = u(x_t, t) - velocity + gap * slope
    torch.testing.assert_close(error(objective, batch, t, s), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [MeanFlow, AYF])
def test_without_a_jump_it_is_flow_matching_and_calls_no_derivative(kind):
    objective = made(kind, shift=0.1, equal=1.0)
    batch, t = data(), torch.linspace(0.1, 0.9, N, dtype=D)
    calls = objective.student.denoiser.denoiser.calls
    found = error(objective, batch, t, t)
    assert calls == [N]
    process = Linear()
    x_t = process.noise(batch.data, t, batch.noise)
    wrong = x_t.sub(objective.student.denoiser(x_t, t, None, t)).div(expand(t, x_t))
    right = x_t.sub(objective.teacher(x_t, t)).div(expand(t, x_t))  # v of the rectified flow
    torch.testing.assert_close(found, wrong - right)


@pytest.mark.parametrize("process", [Linear(), Karras(), Trig(0.5)], ids=str)
def test_landing_at_the_end_it_is_scms_tangent(process):
    """At s = 0 the error of u is -dx̂/dτ along the teacher's path, x̂ being a consistency model."""
    objective, batch = made(AYF, process, shift=0.1, limit=1.0, equal=0.0), data()
    f, exact = objective.student.denoiser, objective.student.denoiser.denoiser
    # a process may end with some noise; a consistency model of the point τ = 0 needs s at τ = 0
    t, s = torch.full((N,), 0.6, dtype=D), torch.zeros(N, dtype=D)
    x_t, (tau, rate) = process.noise(batch.data, t, batch.noise), flow_time(process, t)
    paths = [(exact.flow(x_t, t, t + h), t + h) for h in (1e-5, -1e-5)]
    ends = [f(x, r, None, s) for x, r in paths]
    slope = (ends[0] - ends[1]) / 2e-5 / expand(rate, x_t)
    landing = expand(flow_time(process, s).tau, x_t)
    expected = -slope * (1 - landing / expand(tau, x_t))
    found = error(objective, batch, t, s)
    pull = (objective.teacher(x_t, t) - f(x_t, t, None, s)) * landing / expand(tau, x_t) ** 2
    torch.testing.assert_close(found, expected + pull, atol=1e-6, rtol=1e-5)


def test_improved_meanflows_prediction_of_v_does_not_depend_on_the_datum():
    """Its floor is Var(v | z): with the exact map, the error is the datum's own velocity's."""
    batch, t, s = data(), torch.full((N,), 0.7, dtype=D), torch.full((N,), 0.2, dtype=D)
    x_t = Linear().noise(batch.data, t, batch.noise)
    for direction, same in (("own", True), ("velocity", False)):
        objective = made(velocity="data", direction=direction, equal=0.0)
        expected = (objective.teacher(x_t, t) - batch.data) / -0.7
        gap = (error(objective, batch, t, s) - expected).abs().max()
        assert (gap < 1e-6) == same


def test_the_adaptive_weight_bounds_each_samples_gradient():
    square = torch.tensor([0.0, 1e-4, 1.0, 1e4], dtype=D)
    objective = made(power=0.75, offset=1e-3)
    size, tau = square.sqrt(), torch.full((4,), 0.5, dtype=D)
    torch.testing.assert_close(objective.weight(size[:, None], tau), (square + 1e-3) ** -0.75)
    tangent = made(AYF)
    torch.testing.assert_close(tangent.weight(size[:, None], tau) * size, size / (size + 0.1))


def test_ayfs_derivative_warms_up_to_its_limit():
    objective = made(AYF, warmup=100)
    assert [objective.share(k) for k in (0, 50, 100, 900)] == [0, 0.495, 0.99, 0.99]
    assert made(AYF).share(0) == 0.99 and made().share(0) == 1


def test_times_are_sorted_and_equal_in_the_share_that_was_asked_for():
    objective = made(times=LogNormal(-0.4, 1.0), landings=LogNormal(-4.0, 1.6), equal=0.25)
    torch.manual_seed(0)
    t, s = objective.sample_times(torch.zeros(4000, 1, dtype=D))
    assert (s <= t).all() and (s == t)[:1000].all() and not (s == t)[1000:].any()
    logits = torch.logit(t[:1000].double())
    first, second = torch.randn(2, 100_000)
    expected = torch.maximum(-0.4 + first, -4 + 1.6 * second).mean()
    assert logits.mean().item() == pytest.approx(expected.item(), abs=0.1)


@pytest.mark.parametrize(("velocity", "direction", "calls"), [
    ("teacher", "velocity", [3, 9]), ("data", "own", [3, 9, 9]),
])  # fmt: skip
def test_its_forwards_are_those_of_its_docstring(velocity, direction, calls):
    objective = made(velocity=velocity, direction=direction)
    objective.loss(data(), 0)
    assert objective.student.denoiser.denoiser.calls == calls  # the last one with a derivative


@pytest.mark.parametrize("steps", [1, 3])
def test_chains_of_an_exact_map_end_at_the_exact_end(steps):
    process = Karras()
    exact = MAPS["mixture"](process)
    times = [1 - k / steps for k in range(steps)]
    z = torch.linspace(-1.5, 1.5, 7, dtype=D)[:, None]
    found = Generator(exact, times, renoise=False)(z)
    one = torch.ones(7, dtype=D)
    end = process.end(80 * z, exact.flow(80 * z, one, 0 * one), one, 0 * one)
    torch.testing.assert_close(found, end, atol=5e-3, rtol=0)  # it ends at σ_min
