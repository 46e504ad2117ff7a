"""Shortcut models against exact flow maps: lengths, half jumps, velocities."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.flow_maps.rectified import flow_time
from distill.objectives.flow_maps.shortcut import Shortcut
from students.generator import Generator
from teachers.process import Karras, Linear, Trig, expand
from tests.helpers.flow_maps import MAPS, D, Shifted
from tests.helpers.refusals import refused

N = 16
PROCESSES = [Linear(), Karras(), Trig(0.5)]


def made(process=None, name="mixture", shift=0.0, **keys):
    exact = MAPS[name](process or Linear())
    return Shortcut(teacher=exact.denoiser, student=Generator(Shifted(exact, shift)), **keys)


def data(n=N):
    rng = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(n, 1, generator=rng).to(D) for _ in range(2))
    return Batch(0.5 * x, noise)


def test_times_are_apart_by_powers_of_two_on_multiples_of_themselves():
    objective = made(levels=16, bootstrap=0.75)
    torch.manual_seed(0)
    t, s = objective.sample_times(torch.zeros(40_000, 1, dtype=D))
    jump = t > s
    assert jump[:30_000].all() and not jump[30_000:].any()
    steps = ((t - s) * 16)[:30_000]
    share = [(steps == k).double().mean().item() for k in (2, 4, 8, 16)]
    assert share == pytest.approx([0.25] * 4, abs=0.02)  # never the finest, 1
    start = t[:30_000] * 16
    assert (start % steps == 0).all() and (start <= 16).all() and (start >= steps).all()
    grid = torch.bincount((t[30_000:] * 16).long(), minlength=17) / 10_000
    assert grid[0] == 0 and (grid[1:] - 1 / 16).abs().max() < 0.01


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_an_exact_flow_map_is_its_own_target_above_the_finest_length(process, name):
    objective, batch = made(process, name, levels=32), data()
    for t, s in ((1.0, 0.0), (0.75, 0.5), (0.125, 0.0)):
        t, s = (torch.full((N,), v, dtype=D) for v in (t, s))
        x_t = process.noise(batch.data, t, batch.noise)
        target = objective.two_halves(x_t, t, s, None)
        found = objective.student.denoiser(x_t, t, None, s)
        torch.testing.assert_close(target, found, atol=1e-6, rtol=0)


def test_the_target_on_a_rectified_flow_is_the_mean_of_the_halves_velocities():
    objective, batch = made(shift=0.3, levels=32), data()
    f, t, s = objective.student.denoiser, torch.full((N,), 0.5, dtype=D), torch.zeros(N, dtype=D)
    x_t, middle = Linear().noise(batch.data, t, batch.noise), (t + s) / 2
    with torch.no_grad():
        first = (x_t - f(x_t, t, None, middle)) / 0.5
        x_m = x_t - 0.25 * first
        second = (x_m - f(x_m, middle, None, s)) / 0.25
        target = objective.two_halves(x_t, t, s, None)
    torch.testing.assert_close((x_t - target) / 0.5, (first + second) / 2)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_below_the_finest_length_half_jumps_follow_the_velocity(process):
    objective, batch = made(process, levels=8), data()
    t, s = torch.full((N,), 0.75, dtype=D), torch.full((N,), 0.5, dtype=D)
    x_t, m, teacher = process.noise(batch.data, t, batch.noise), (t + s) / 2, objective.teacher
    x_m = process.step(x_t, teacher(x_t, t), t, m)
    x_s = process.step(x_m, teacher(x_m, m), m, s)
    target = objective.two_halves(x_t, t, s, None)
    torch.testing.assert_close(process.step(x_t, target, t, s), x_s)


@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_without_half_jumps_it_is_flow_matching(velocity):
    objective, batch = made(Karras(), shift=0.1, bootstrap=0.0, velocity=velocity), data()
    torch.manual_seed(0)
    t, _ = objective.sample_times(batch.data)
    torch.manual_seed(0)
    value = objective.loss(batch, 0).value
    x_t, tau = Karras().noise(batch.data, t, batch.noise), flow_time(Karras(), t).tau
    end = objective.teacher(x_t, t) if velocity == "teacher" else batch.data
    z = x_t / (1 + expand(Karras().scales(t.double())[1], x_t))
    mine = (z - objective.student.denoiser(x_t, t, None, t)) / expand(tau, z)
    expected = (mine - (z - end) / expand(tau, z)).square().mean()
    torch.testing.assert_close(value, expected)


def test_targets_and_states_are_clipped():
    objective, batch = made(shift=9.0, levels=32, clip=4.0), data()
    t, s = torch.ones(N, dtype=D), torch.full((N,), 0.5, dtype=D)
    x_t = Linear().noise(batch.data, t, batch.noise)
    assert objective.two_halves(x_t, t, s, None).abs().max() <= 4


def test_its_target_network_follows_and_its_forwards_are_those_of_its_docstring():
    objective = made(bootstrap=0.25, target_ema=0.5)
    objective.loss(data(), 0)
    own, target = (n.denoiser.calls for n in (objective.student.denoiser, objective.target))
    assert (own, target) == ([N], [N // 4, N // 4])
    turns = objective.turns(0)
    next(turns)
    with torch.no_grad():
        objective.student.denoiser.shift.add_(1.0)
    assert next(turns, None) is None
    assert objective.target.shift.item() == 0.5


def test_levels_that_are_no_power_of_two_are_refused():
    with refused("objective.levels", "100", "64"):
        made(levels=100)
