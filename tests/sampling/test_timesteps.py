"""Schedules, against published times, brute force, and the samples that they lead to."""

import math
from itertools import combinations
from random import Random

import pytest
import torch

from distill.sampling.timesteps import (
    Truncated,
    align_your_steps,
    cheapest_path,
    energy_distance,
    evolve,
    gits,
    initial_state,
    offspring,
    searched,
    truncated,
)
from teachers import load
from teachers.analytic import Gaussian, Mixture, ring
from teachers.solver import SOLVERS, ddim, dpmpp_2m
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def shapes():
    return load("shapes")


def test_align_your_steps_are_the_published_noise_levels(shapes):
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]

    def sigma(times):
        alpha, sigma = shapes.denoiser.process.scales(times)
        return (sigma / alpha).tolist()

    assert sigma(align_your_steps(shapes, 10)) == pytest.approx(published, rel=2e-3)
    # other counts: log σ linear between them, with the same ends
    nineteen = sigma(align_your_steps(shapes, 19))
    assert nineteen[::2] == pytest.approx(published, rel=2e-3)
    assert nineteen[3] == pytest.approx((6.475 * 3.861) ** 0.5, rel=1e-3)
    assert sigma(align_your_steps(shapes, 1)) == pytest.approx(published[:1], rel=2e-3)


@pytest.mark.parametrize(("steps", "levels", "rho", "last"), [(5, 8, 5, 6), (8, 12, 7, 9)])
def test_truncated_times_are_the_published_ones(shapes, steps, levels, rho, last):
    # in indices of 1,000, from the first to that of the grid's last level, even in index^(1/1.2)
    bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    sigma = ((1 - bar) / bar).sqrt()
    ends = sigma[[-1, 0]] ** (1 / rho)
    level = (ends[0] + last / (levels - 1) * (ends[1] - ends[0])) ** rho
    above = int((sigma < level).sum())
    share = (level / sigma[above - 1]).log() / (sigma[above] / sigma[above - 1]).log()
    final = above - 1 + share.item()
    roots = torch.linspace(999 ** (1 / 1.2), final ** (1 / 1.2), steps + 1, dtype=torch.float64)
    torch.testing.assert_close(truncated(shapes, steps) * 999, roots**1.2, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("solver", [ddim, dpmpp_2m])
def test_a_truncated_chain_calls_no_network_at_its_last_level(solver):
    teacher, calls = Gaussian(torch.zeros(1), torch.ones(1)), []
    teacher.register_forward_hook(lambda m, args, out: calls.append(args[1][0].item()))
    solver(Truncated(teacher, 0.4), torch.ones(2, 1), torch.tensor([1.0, 0.7, 0.4]))
    assert calls == pytest.approx([1.0, 0.7])


def test_a_truncated_chain_stays_at_its_last_level():
    teacher, times = Gaussian(torch.zeros(1), torch.ones(1)), torch.tensor([1.0, 0.7, 0.4])
    high, middle, low = teacher.process.scales(times)[1].tolist()
    x = ddim(Truncated(teacher, times[2].item()), torch.full((1, 1), high), times)
    gain = 1.0  # of a step from a to b: b/a + (1 - b/a) / (1 + a²)
    for a, b in ((high, middle), (middle, low)):
        gain *= b / a + (1 - b / a) / (1 + a**2)
    assert x.item() == pytest.approx(high * gain, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_cheapest_path_is_the_one_that_trying_all_finds(steps):
    n = 8
    cost = torch.rand(n, n + 1, dtype=torch.float64)
    cost[torch.ones(n, n + 1).tril().bool()] = torch.inf  # nowhere back, nor to itself
    paths = [(0, *inner, n) for inner in combinations(range(1, n), steps - 1)]
    best = min(paths, key=lambda p: sum(cost[i, j] for i, j in zip(p, p[1:], strict=False)))
    assert cheapest_path(cost, steps) == list(best[:-1])


def test_all_times_are_taken_where_there_are_as_many_steps():
    teacher = Gaussian(torch.zeros(2), torch.tensor([1.0, 0.25]))
    found = gits(teacher, torch.randn(8, 2), 12, fine_steps=12)
    torch.testing.assert_close(found, teacher.process.grid(12))


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_found_times_land_nearer_to_the_true_path_than_the_teachers_own(steps):
    teacher = Gaussian(torch.zeros(2), torch.tensor([1.0, 0.25]))
    z = torch.randn(64, 2)
    x_t = initial_state(teacher, z, torch.tensor([1.0]))
    one = torch.ones(64)
    end = teacher.flow(x_t, one, torch.full_like(one, -0.0))

    def error(times):
        return (ddim(teacher, x_t, times) - end).norm(dim=1).mean().item()

    times = gits(teacher, z, steps)
    assert times[0] == 1 and (times.diff() < 0).all() and len(times) == steps
    assert error(times) < 0.8 * error(teacher.process.grid(steps))


def sampled(solver, teacher, z, times):
    torch.manual_seed(0)
    return solver(teacher, initial_state(teacher, z, times), times)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "ancestral"])
@pytest.mark.parametrize("steps", [2, 5])
def test_a_searched_schedule_is_never_worse_than_the_own_and_gits(name, steps):
    teacher, z, solver = Mixture(ring(), 0.12), torch.randn(48, 2), SOLVERS[name]
    goal = sampled(solver, teacher, z, teacher.process.grid(64))

    def error(times):
        return energy_distance(sampled(solver, teacher, z, times), goal)

    found = searched(solver, teacher, z, steps)
    own, other = teacher.process.grid(steps), gits(teacher, z[:32], steps)
    assert error(found) <= min(error(own), error(other))
    assert error(found) < error(own)
    assert found[0] == 1 and (found.diff() < 0).all() and len(found) == steps
    assert torch.equal(found, searched(solver, teacher, z, steps))


def test_a_search_leaves_the_random_state_alone():
    teacher, z = Mixture(ring(), 0.12), torch.randn(8, 2)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    searched(SOLVERS["ancestral"], teacher, z, 2, fine_steps=8)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("find", [gits, lambda *a: searched(ddim, *a)])
def test_more_steps_than_times_are_refused(find):
    teacher = Gaussian(torch.zeros(2), torch.ones(2))
    with refused("baselines", "65", "64"):
        find(teacher, torch.randn(2, 2), 65)


def test_evolution_finds_the_best_where_distances_are_plain():
    best = (0, 11, 23, 42)
    calls = []

    def distance(nodes):
        calls.append(nodes)
        return sum((a - b) ** 2 for a, b in zip(nodes, best, strict=True))

    founders = [(0, 16, 32, 48), (0, 5, 20, 50)]
    found = evolve(distance, founders, 64)
    assert distance(found) <= 3 and distance(found) < min(map(distance, founders))
    assert len(calls[:-4]) <= 12 + 10 * 8
    assert len(set(calls[:-4])) == len(calls[:-4])  # none is measured twice


def test_offspring_is_a_subset_of_its_parents_nodes_but_for_one():
    rng, a, b = Random(1), (0, 3, 9, 14), (0, 4, 9, 12)
    for _ in range(200):
        nodes = offspring(a, b, 16, rng)
        assert nodes[0] == 0 and len(nodes) == 4
        assert list(nodes) == sorted(set(nodes)) and nodes[-1] < 16
        assert len(set(nodes) - {*a, *b}) <= 1


def test_the_energy_distance_by_hand():
    x, y = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [5.0]])
    # across, without a number's own: |0 - 5|, |3 - 1|; within: |0 - 3| and |1 - 5|
    assert energy_distance(x, y) == pytest.approx(2 * (5 + 2) / 2 - 3 - 4)
    assert energy_distance(x, x) == 0


def test_the_energy_distance_has_no_bias():
    """Of six standard normals and six at μ = 0 and 2, in the mean of many."""
    n, sets = 2000, torch.randn(2, 2000, 6, 1)
    for mu in (0.0, 2.0):
        found = torch.tensor([energy_distance(x, mu + y) for x, y in sets.unbind(1)])
        # |N(μ, 2)| has the mean 2 exp(-μ²/4) / √π + μ erf(μ/2)
        between = 2 * math.exp(-(mu**2) / 4) / math.pi**0.5 + mu * math.erf(mu / 2)
        want = 2 * (between - 2 / math.pi**0.5)
        assert abs(found.mean().item() - want) < 4 * found.std().item() / n**0.5
