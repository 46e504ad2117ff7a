"""IMM against exact flow maps and by hand: times, kernel, groups, weight."""

import math

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.flow_maps.imm import IMM
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.process import Karras, Linear, Trig
from tests.helpers.flow_maps import MAPS, D, Shifted
from tests.helpers.refusals import refused


def made(process=None, name="gaussian", shift=0.0, **keys):
    exact = MAPS[name](process or Linear())
    return IMM(teacher=exact.denoiser, student=Generator(Shifted(exact, shift)), **keys)


def data(n, seed=4):
    rng = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, 1, generator=rng).to(D) for _ in range(2))
    return Batch(0.3 + 0.5 * x, noise)  # N(0.3, ½²), the teacher's


def at(objective, t, s, r, monkeypatch):
    """The objective, with these times for every sample."""
    times = lambda self, x: tuple(torch.full((len(x),), v, dtype=D) for v in (t, s, r))  # noqa: E731
    monkeypatch.setattr(IMM, "sample_times", times)
    return objective


@pytest.mark.parametrize("process", [Linear(), Karras(), Trig(0.5)], ids=str)
@pytest.mark.parametrize("clock", ["ratio", "time"])
def test_groups_share_their_times_and_r_lies_between(process, clock):
    objective = made(process, clock=clock, gap=0.03)
    torch.manual_seed(0)
    t, s, r = objective.sample_times(torch.zeros(400, 1, dtype=D))
    for v in (t, s, r):
        assert (v.unflatten(0, (-1, 4)) == v[::4, None]).all()
    assert (s < t).all() and (s <= r).all() and (r < t).all()
    assert len(t.unique()) == 100
    free = (r > s) & (t > r + 1.01e-4)
    assert free.double().mean() > 0.3
    level = (
        (lambda v: (lambda a, b: b / a)(*process.scales(v))) if clock == "ratio" else lambda v: v
    )
    torch.testing.assert_close((level(t) - level(r))[free], torch.full_like(t[free], 0.03))


def test_the_authors_gap_is_their_range_of_noise_levels_in_4096_parts():
    assert made().gap == pytest.approx(0.0390625)


def test_landing_on_the_nearer_time_gives_data_noised_to_it(monkeypatch):
    objective = at(made(shift=0.1), 0.6, 0.4, 0.4, monkeypatch)
    batch, s = data(4), torch.full((4,), 0.4, dtype=D)
    x_s = Linear().noise(batch.data, s, batch.noise)
    torch.testing.assert_close(objective.jump(x_s, s, s, batch)[0], x_s)


def test_groups_of_one_are_a_consistency_loss_through_a_kernel(monkeypatch):
    objective = at(made(group=1, shift=0.2), 0.6, 0.1, 0.5, monkeypatch)
    batch = data(8)
    t, s, r = objective.sample_times(batch.data)
    y = objective.jump(Linear().noise(batch.data, t, batch.noise), t, s, batch)[0]
    z = objective.jump(Linear().noise(batch.data, r, batch.noise), r, s, batch)[0]
    kernel = torch.exp(-(y - z).abs()[:, 0] / (0.5 * 0.5))
    expected = (objective.weight(t) * (2 - 2 * kernel)).mean()
    torch.testing.assert_close(objective.loss(batch, 0).value, expected)


def test_an_exact_map_leaves_the_diagonal_and_nothing_on_average_without(monkeypatch):
    size, values = 40_000, {}
    batch = data(4 * size)
    for diagonal in (True, False):
        objective = at(made(diagonal=diagonal), 0.6, 0.1, 0.3, monkeypatch)
        t, s, r = objective.sample_times(batch.data)
        with torch.no_grad():
            y = objective.jump(Linear().noise(batch.data, t, batch.noise), t, s, batch)[0]
            z = objective.jump(Linear().noise(batch.data, r, batch.noise), r, s, batch)[0]
            values[diagonal] = objective.discrepancy(y, z, torch.full((size,), 4.0, dtype=D))
            own = (2 - 2 * torch.exp(-4 * (y - z).abs()[:, 0])).unflatten(0, (-1, 4)).mean(1)
    error = 4 * values[False].std().item() / math.sqrt(size)
    assert abs(values[False].mean().item()) < error
    assert error < 0.01 < values[True].mean()  # which would not pass for 0
    torch.testing.assert_close(values[True], 0.75 * values[False] + own / 4)


@pytest.mark.parametrize("shift", [-0.3, 0.3])
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_wrong_map_is_pulled_back(shift, diagonal, monkeypatch):
    """With r = s the target is data: the anchor of all jumps."""
    objective = at(made(shift=shift, diagonal=diagonal), 0.6, 0.3, 0.3, monkeypatch)
    objective.loss(data(4000), 0).value.backward()
    assert objective.student.denoiser.shift.grad * shift > 0


def test_the_kernel_is_laplaces_with_its_scale_over_the_dimensions():
    objective = made(group=2)
    y = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=D)
    found = objective.discrepancy(y, y + 100, torch.tensor([0.2], dtype=D))
    near = math.exp(-0.2 * 5 / 2)
    gaps = [(100, 100), (97, 96), (103, 104)]
    far = [math.exp(-0.2 * math.hypot(*g) / 2) for g in gaps]
    expected = 2 * (1 + near) / 2 - 2 * (2 * far[0] + far[1] + far[2]) / 4
    assert found.item() == pytest.approx(expected)


def test_the_weight_is_the_papers_at_a_half():
    weight = made().weight(torch.tensor([0.5], dtype=D)).item()
    assert weight == pytest.approx(0.5 / (1 + math.exp(-4)) * 8 * 0.5 / 0.5)


def test_it_costs_two_forwards_and_one_has_gradients():
    objective = made(times=Uniform(0.1, 0.9))
    loss = objective.loss(data(8), 0)
    assert objective.student.denoiser.denoiser.calls == [8, 8]
    assert loss.samples is not None and loss.samples.requires_grad


def test_a_batch_that_groups_do_not_divide_is_refused():
    with refused("objective.group", "6", "4"):
        made().loss(data(6), 0)
