"""Consistency training (CT, iCT, iLCT) against closed forms and the papers' tables."""

import math

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.consistency.consistency_training import ConsistencyTraining
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Slopes

D = torch.float64
CT = {"curriculum": "square-root", "index": "uniform", "distance": "square", "gaps": "even"}


def training(network=None, process=None, **keys):
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([0.25], dtype=D), process)
    network = network or Affine(torch.zeros(1, dtype=D), torch.ones(1, 1, dtype=D), process)
    return ConsistencyTraining(teacher=teacher, student=Generator(network), **keys)


# ---- curricula


def test_icts_intervals_double_until_the_last():
    objective = training(stage_steps=50_000)
    found = [objective.intervals(k) for k in range(0, 400_000, 50_000)]
    assert found == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert objective.intervals(49_999) == 10
    assert objective.intervals(10**9) == 1280


def test_cts_intervals_grow_by_the_root_from_one_to_the_last():
    objective = training(**CT, first=2, last=150, stage_steps=800_000)
    assert [objective.intervals(k) for k in (0, 800_000, 10**9)] == [1, 150, 150]
    middle = math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1)  # N(k) - 1 of the paper
    assert objective.intervals(400_000) == middle == 106


def test_cts_target_keeps_more_as_the_grid_gets_finer():
    objective = training(**CT, first=2, last=150, stage_steps=100, target_ema=0.9)
    assert objective.kept(0) == pytest.approx(0.81)  # as in the authors' code
    assert objective.kept(100) == pytest.approx(0.9 ** (2 / 150))


def test_a_last_below_the_first_is_refused():
    with refused("objective.last", "5", "10"):
        training(first=10, last=5)


# ---- pairs of times


def test_the_grid_is_karras_own_and_the_same_noise_levels_on_any_process():
    x = torch.zeros(1, 1, dtype=D)
    times = training(process=Karras()).grid(17, x)
    torch.testing.assert_close(times, torch.linspace(0, 1, 18, dtype=D))
    linear = training(process=Linear())
    levels = linear.ratio(linear.grid(17, x))
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    expected = (low + torch.linspace(0, 1, 18, dtype=D) * (high - low)) ** 7
    torch.testing.assert_close(levels[1:], expected[1:])
    assert levels[0] == 0  # where the path ends


def test_icts_noise_levels_are_log_normal():
    objective = training(first=40, last=40)
    torch.manual_seed(0)
    t, r = objective.sample_times(torch.zeros(200_000, 1, dtype=D), 0)
    grid = objective.ratio(objective.grid(40, t))
    cdf = 0.5 * (1 + torch.erf((grid.log() + 1.1) / (2 * math.sqrt(2))))
    mass = cdf.diff() / (cdf[-1] - cdf[0])
    cell = torch.searchsorted(objective.grid(40, t), r.contiguous())
    share = torch.bincount(cell, minlength=40) / len(r)
    torch.testing.assert_close(share.to(D), mass, atol=2e-3, rtol=0)
    later = torch.searchsorted(objective.grid(40, t), t.contiguous())
    assert (later == cell + 1).all()  # neighbours


def test_cts_intervals_are_drawn_evenly():
    objective = training(**{**CT, "curriculum": "doubling"}, first=10, last=10)
    torch.manual_seed(0)
    _, r = objective.sample_times(torch.zeros(50_000, 1, dtype=D), 0)
    share = torch.bincount((r * 10).round().long(), minlength=10) / len(r)
    assert (share - 0.1).abs().max() < 0.01


# ---- losses: data N(0, c²), c = ½, students of slopes


def slopes_of(levels):
    """The exact minimiser of CT on the grid: x̂ = k x_t."""
    sigma = training().ratio(torch.linspace(0, 1, levels, dtype=D))
    slopes = [torch.ones((), dtype=D)]
    for low, high in zip(sigma, sigma[1:], strict=False):
        slopes.append(slopes[-1] * (0.25 + low * high) / (0.25 + high**2))
    return sigma, torch.stack(slopes)


@pytest.mark.parametrize(("levels", "scale"), [(18, 0.4230), (40, 0.4649), (150, 0.4905)])
def test_cts_minimiser_has_the_published_slope_and_floor(levels, scale, monkeypatch):
    sigma, slopes = slopes_of(levels)
    assert 80 * slopes[-1].item() == pytest.approx(scale, abs=1e-4)
    times, n = torch.linspace(0, 1, levels, dtype=D), levels - 1
    network = Slopes(times, slopes.clone(), Karras())
    objective = training(network, **{**CT, "curriculum": "doubling"}, first=n, last=n)
    # ±c and ±1 are exact for the second moments; every interval with each of the four
    data = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=D).repeat(n)[:, None]
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=D).repeat(n)[:, None]
    cell = torch.arange(n).repeat_interleave(4)
    monkeypatch.setattr(
        ConsistencyTraining, "sample_times", lambda *_: (times[cell + 1], times[cell])
    )
    loss = objective.loss(Batch(data, noise), 0).value
    loss.backward()
    assert network.slopes.grad.abs().max() < 1e-10 * sigma[-1] ** 2
    floor = slopes[:-1] ** 2 * 0.25 * sigma.diff() ** 2 / (0.25 + sigma[1:] ** 2)
    assert loss.item() == pytest.approx(floor.mean().item(), rel=1e-9)
    with torch.no_grad():
        network.slopes[-1] *= 1.01
        network.slopes.grad = None
    objective.loss(Batch(data, noise), 0).value.backward()
    assert network.slopes.grad[-1] > 0


def test_icts_weight_is_one_over_the_gap():
    objective = training()
    t, r = (Karras().time(torch.tensor([v], dtype=D)) for v in (2.0, 1.5))
    assert objective.weight(t, r).item() == pytest.approx(2.0)
    assert training(gaps="even").weight(t, r).item() == 1


def test_ilcts_scale_shrinks_as_published():
    objective, x = training(distance="cauchy"), torch.zeros(1, 100, dtype=D)
    for n, c in ((20, 0.0136), (40, 0.0061), (80, 0.0028), (160, 0.0012), (640, 0.00025)):
        y = torch.full_like(x, math.sqrt(2) * c)  # m = 2c², where the loss is log 2
        assert objective.cauchy(x, y, n).item() == pytest.approx(
            math.log(2), rel=0.07
        )  # of c to two digits
    y = torch.full_like(x, math.sqrt(2) * 0.0054)  # in the first stage iCT's 0.00054 √d
    assert objective.cauchy(x, y, 10).item() == pytest.approx(math.log(2))


def test_ilcts_gradient_falls_again_for_large_errors():
    objective, c = training(distance="cauchy"), 0.00054 * 10
    slopes = []
    for size in (0.5, 1.0, 2.0):  # of |Δ| = c √(2d), where the gradient is largest
        x = torch.full((1, 100), size * math.sqrt(2) * c, dtype=D, requires_grad=True)
        objective.cauchy(x, torch.zeros_like(x), 10).sum().backward()
        slopes.append(x.grad.norm().item())
    assert slopes[1] > slopes[0] and slopes[1] > slopes[2]
    assert slopes[0] == pytest.approx(slopes[2])  # the same at half and twice of it


def test_the_diffusion_loss_is_added_in_the_lowest_quarter_of_intervals_alone(monkeypatch):
    n, found = 8, []
    times = torch.linspace(0, 1, n + 1, dtype=D)
    monkeypatch.setattr(ConsistencyTraining, "sample_times", lambda *_: (times[1:], times[:-1]))
    data, noise = torch.full((n, 1), 0.3, dtype=D), torch.full((n, 1), 0.7, dtype=D)
    for weight in (0.0, 5.0):
        network = Slopes(times, torch.full((n + 1,), 0.9, dtype=D), Karras())
        objective = training(network, first=n, last=n, diffusion_weight=weight)
        objective.loss(Batch(data, noise), 0).value.backward()
        found.append(network.slopes.grad)
    more = found[1] - found[0]
    assert (more[3:] == 0).all()
    for i in (1, 2):  # two of eight intervals
        sigma = objective.ratio(times)[i].item()
        x_t = 0.3 + 0.7 * sigma
        weight = 5 * (1 / sigma**2 + 4) / n
        assert more[i].item() == pytest.approx(weight * 2 * (0.9 * x_t - 0.3) * x_t, rel=1e-6)
