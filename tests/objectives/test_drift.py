"""Drifting: the field by hand, its bias, where it leads, and what gradients reach."""

import math

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.features.base import others
from distill.objectives.features.drift import Drift, mean_distance
from students.generator import Generator
from teachers.analytic import Gaussian
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine

D = torch.float64


def made(d=2, m=0.0, r=1.0, **keys):
    """An objective of raw samples of d dimensions: a teacher N(0, 1), a student m + r z."""
    network = Affine(torch.full((d,), m, dtype=D), r * torch.eye(d, dtype=D))
    teacher = Gaussian(torch.zeros(d, dtype=D), torch.eye(d, dtype=D))
    return Drift(teacher=teacher, student=Generator(network), **{"blocks": (), **keys}), network


def draws(n, d=2, seed=0):
    return torch.randn(n, d, dtype=D, generator=torch.Generator().manual_seed(seed))


def groups(size, count):
    """The pairs of `count` groups of `size`."""
    labels = torch.arange(count).repeat_interleave(size)
    return others({"class_labels": labels}, len(labels), labels.device, True)


def test_the_field_of_two_samples_is_by_hand():
    """Sample 0 has one other sample and, at each radius, weights of two data."""
    objective, _ = made(d=1, radii=(0.5, 2.0), data="all")
    z, real = (torch.tensor(v, dtype=D)[:, None] for v in ([0.0, 1.0], [0.2, 0.9]))
    field, _ = objective.field(z, real, groups(2, 1))
    expected = 0.0
    for radius in (0.5, 2.0):
        near, far = math.exp(-0.2 / radius), math.exp(-0.9 / radius)
        expected += ((0.2 * near + 0.9 * far) / (near + far) - 1.0) / 2
    assert field[0].item() == pytest.approx(expected)


def test_a_samples_own_datum_is_left_out_unless_all_count():
    z, real = draws(6, seed=1), draws(6, seed=2)
    pairs, moved = groups(6, 1), draws(6, seed=2)
    moved[0] += 1
    changed = {}
    for data in ("others", "all"):
        objective, _ = made(data=data, radii=(1.0,))
        change = objective.field(z, moved, pairs)[0] - objective.field(z, real, pairs)[0]
        changed[data] = (change.abs().sum(1) > 0).tolist()
    assert changed["others"] == [False, *[True] * 5]
    assert changed["all"] == [True] * 6


def slope(data, size, rounds=40, count=100):
    """How much the field of one distribution on both sides points outward, and its error."""
    objective, _ = made(data=data, radii=(0.5,))
    pairs, found = groups(size, count), []
    for i in range(rounds):
        z, real = draws(size * count, seed=2 * i), draws(size * count, seed=2 * i + 1)
        field, _ = objective.field(z, real, pairs)
        found.append((field * z).sum() / z.square().sum())
    found = torch.stack(found)
    return found.mean().item(), found.std().item() / math.sqrt(rounds)


@pytest.mark.parametrize("size", [4, 8])
def test_the_field_has_no_bias_with_one_datum_fewer_than_samples(size):
    mean, error = slope("others", size)
    assert abs(mean) < 4 * error
    assert error < 0.01
    mean, error = slope("all", size)
    assert mean > 4 * error  # outward: the student would get too wide


def test_samples_move_within_their_label_and_one_alone_stays():
    objective, _ = made(radii=(1.0,))
    labels = {"class_labels": torch.tensor([0, 0, 1, 1, 2])}
    pairs = others(labels, 5, torch.device("cpu"), True)
    z, real = draws(5, seed=1), draws(5, seed=2)
    field, _ = objective.field(z, real, pairs)
    torch.testing.assert_close(field[0], real[1] - z[1])
    torch.testing.assert_close(field[2], real[3] - z[3])
    assert (field[4] == 0).all()


def test_the_loss_is_the_mean_square_of_the_field_in_units_of_the_datas_distance():
    objective, network = made(m=0.5, r=0.5, by_label=False)
    batch = Batch(3 * draws(8, seed=1), draws(8, seed=2))
    loss = objective.student_loss(batch, objective.student)
    pairs = groups(8, 1)
    scale = mean_distance(batch.data, pairs)
    z = 0.5 + 0.5 * batch.noise
    field, near = objective.field(z / scale, batch.data / scale, pairs)
    torch.testing.assert_close(loss.value, field.square().mean())
    torch.testing.assert_close(loss.logs["neighbours"], near)
    loss.value.backward()
    expected = -2 * (field / scale).sum(0) / field.numel()
    torch.testing.assert_close(network.m.grad, expected)
    apart = torch.stack([a - b for i, a in enumerate(batch.data) for b in batch.data[:i]])
    torch.testing.assert_close(scale, apart.norm(dim=1).mean())


def test_neighbours_of_a_wide_radius_are_all_and_of_a_narrow_one_is_one():
    z, real = draws(9, seed=1), draws(9, seed=2)
    for radius, count in ((1e4, 8.0), (1e-4, 1.0)):
        objective, _ = made(radii=(radius, 1e4))
        near = objective.field(z, real, groups(9, 1))[1]
        assert near.item() == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize("m", [pytest.param(-0.5, marks=pytest.mark.slow), 0.5])
def test_a_linear_student_ends_in_the_distribution_of_the_data(m):
    """From a mean on either side, a linear student drifts to the data's mean and spread."""
    objective, network = made(m=m, r=0.5, radii=(0.2, 0.5))
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.02 ** (step / 400)
        optimizer.zero_grad()
        batch = Batch(draws(256, seed=3 * step), draws(256, seed=3 * step + 1))
        objective.student_loss(batch, objective.student).value.backward()
        optimizer.step()
    assert network.m.norm() < 0.08
    assert (network.r @ network.r.T - torch.eye(2, dtype=D)).norm() < 0.2


def test_no_radius_is_refused():
    with refused("objective.radii", "empty"):
        made(radii=())


def test_without_a_pair_nothing_moves():
    """A part may hold no two samples of one label."""
    objective, _ = made(m=0.5, r=0.5)
    x = torch.randn(3, 1, dtype=torch.float64)
    none = torch.zeros(3, 3, dtype=torch.bool)
    assert mean_distance(x, none) == 1 == mean_distance(torch.ones(3, 1), ~torch.eye(3).bool())
    field, _ = objective.field(x, x + 1, none)
    assert not field.any() and field.isfinite().all()
