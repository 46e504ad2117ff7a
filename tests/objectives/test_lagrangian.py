"""Lagrangian self-matching against exact flow maps, in any process."""

import random

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.flow_maps.lagrangian import Lagrangian
from distill.objectives.flow_maps.rectified import flow_time, process_time
from students.generator import Generator
from teachers.process import Cosine, Karras, Linear, Trig, expand
from tests.helpers.flow_maps import MAPS, D, Shifted

PROCESSES = [Linear(), Linear(3.0), Karras(), Trig(0.5), Cosine()]
N = 12


def made(process=None, name="mixture", shift=0.0, steps=1, renoise=False, **keys):
    exact = MAPS[name](process or Linear())
    times = [0.95 * (1 - k / steps) for k in range(steps)]  # where no process has lost its data
    student = Generator(Shifted(exact, shift), times, renoise=renoise)
    return Lagrangian(teacher=exact.denoiser, student=student.keep(steps), **keys)


def batch(n=N):
    return Batch(None, torch.linspace(-1.5, 1.5, n, dtype=D)[:, None])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_an_exact_flow_map_has_no_error(process, name, steps):
    objective = made(process, name, steps=steps)
    torch.manual_seed(0)
    random.seed(0)
    loss = objective.loss(batch(), 0)
    assert loss.logs["error"].item() < 1e-12
    loss.value.backward()
    assert objective.student.denoiser.shift.grad.abs() < 1e-4  # weights grow up to 100


@pytest.mark.parametrize("name", MAPS)
def test_the_error_is_that_of_the_landings_velocity(name):
    """σ (dx_s/dσ - v(x_s)) of a student off by 0.1, with the landing moved by differences."""
    process = Karras()
    objective, x_t = made(process, name, shift=0.1), 3 * batch().noise
    f, t, s = (
        objective.student.denoiser, torch.full((N,), 0.6, dtype=D), torch.full((N,), 0.3, dtype=D)
    )  # fmt: skip
    tau = flow_time(process, s).tau

    def landing(r):
        """The state of the rectified flow."""
        return process.step(x_t, f(x_t, t, None, r), t, r) / sum(process.at(r, x_t))

    with torch.no_grad():
        ahead, behind = (landing(process_time(process, tau + h)) for h in (1e-5, -1e-5))
        z, x_s = landing(s), process.step(x_t, f(x_t, t, None, s), t, s)
        velocity = (z - objective.teacher(x_s, s)) / expand(tau, z)
        wrong = expand(tau, z) * ((ahead - behind) / 2e-5 - velocity)
        found = objective.error(x_t, t, s, batch())[1]
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, wrong, atol=1e-6, rtol=1e-5)


def test_without_a_jump_it_learns_the_denoiser():
    objective, x_t = made(shift=0.1), batch().noise
    t = torch.linspace(0.1, 0.9, N, dtype=D)
    x, error = objective.error(x_t, t, t, batch())
    torch.testing.assert_close((x + error).detach(), objective.teacher(x_t, t))


def test_descent_moves_a_wrong_student_towards_the_map():
    """A constant on x̂ shrinks: a loss with the opposite sign would let it grow."""
    objective = made(name="gaussian", shift=0.3, power=0.0)
    shift = objective.student.denoiser.shift
    optimizer = torch.optim.SGD([shift], lr=0.02)
    torch.manual_seed(0)
    for k in range(200):
        optimizer.zero_grad()
        objective.loss(batch(), k).value.backward()
        optimizer.step()
    assert shift.abs() < 0.03


@pytest.mark.parametrize(("renoise", "lowest"), [(False, [0.475, 0.0]), (True, [0.0, 0.0])])
def test_landings_lie_between_a_step_and_the_next_one(renoise, lowest):
    objective = made(steps=2, renoise=renoise, equal=0.25)
    torch.manual_seed(0)
    noise = torch.zeros(4000, 1, dtype=D)
    t = objective.student.ends(noise, 0)
    s = objective.landings(objective.student, noise, 0)
    assert (s <= t).all()
    assert (s == t).double().mean().item() == pytest.approx(0.25, abs=0.03)
    for start, low in zip((0.95, 0.475), lowest, strict=True):
        found = s[(t - start).abs() < 1e-6]
        assert found.min().item() == pytest.approx(low, abs=0.01)
        assert found.min() >= low - 1e-9
