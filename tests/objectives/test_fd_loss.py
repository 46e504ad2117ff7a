"""FD-loss: closed forms of Gaussians, gradients by differences, and what the memory holds."""

import math

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.features.fd_loss import FDLoss, centred, frechet, sums_of
from eval.metrics.fid import Moments
from eval.metrics.fid import frechet as measured
from students.generator import Generator
from teachers.analytic import Gaussian
from tests.helpers.toys import Affine

D = torch.float64


def made(d=2, m=0.0, r=1.0, **keys):
    """An objective of raw samples of d dimensions: a teacher N(0, 1), a student m + r z."""
    network = Affine(torch.full((d,), m, dtype=D), r * torch.eye(d, dtype=D))
    teacher = Gaussian(torch.zeros(d, dtype=D), torch.eye(d, dtype=D))
    keys = {"blocks": (), "fill": 0, **keys}
    return FDLoss(teacher=teacher, student=Generator(network), **keys), network


def draws(n, d=2, seed=0):
    return torch.randn(n, d, dtype=D, generator=torch.Generator().manual_seed(seed))


def play(objective, step, *batches):
    """A step whose parts are these batches; their losses."""
    losses = []
    for turn in objective.turns(step):
        losses += [turn.loss(batch) for batch in batches]
    return losses


def moments(mean, cov):
    mean, cov = (torch.tensor(v, dtype=D) for v in (mean, cov))
    square = cov + mean[:, None] * mean
    top = torch.cat([torch.ones(1, dtype=D), mean])
    return torch.cat([top[None], torch.cat([mean[:, None], square], 1)])


def test_the_distance_of_two_gaussians_is_the_closed_form():
    """N(m, s²) in each dimension: Σ (m_a - m_b)² + (s_a - s_b)²."""
    a = moments([0.7, -0.2], [[0.25, 0.0], [0.0, 4.0]])
    b = moments([0.0, 0.3], [[1.0, 0.0], [0.0, 9.0]])
    assert frechet(a, b).item() == pytest.approx(0.49 + 0.25 + 0.25 + 1.0)


def test_the_distance_is_the_evaluations_of_any_covariances():
    a, b = draws(500, 5, 1) @ draws(5, 5, 2), 0.4 + draws(400, 5, 3)
    found = frechet(sums_of(a) / 500, sums_of(b) / 400)
    expected = measured(*(Moments(f.mean(0), torch.cov(f.T, correction=0), len(f)) for f in (a, b)))
    assert found.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(centred(sums_of(a) / 500), torch.cov(a.T, correction=0))


def test_samples_on_a_line_have_a_finite_distance_and_gradient():
    points = draws(50, 1).expand(-1, 3).clone().requires_grad_()
    distance = frechet(sums_of(points) / 50, moments([0.0] * 3, torch.eye(3).tolist()))
    distance.backward()
    assert distance.item() == pytest.approx(
        points.mean(0).square().sum().item() + 3 + 3 * points[:, 0].var(correction=0).item()
        - 2 * math.sqrt(3) * points[:, 0].std(correction=0).item(), rel=1e-4
    )  # fmt: skip
    assert points.grad.isfinite().all()


@pytest.mark.parametrize("memory", ["queue", "ema"])
def test_the_gradient_is_that_of_differences(memory):
    objective, network = made(m=0.4, r=0.6, memory=memory)
    for step in range(3):
        play(objective, step, Batch(draws(20, seed=step), draws(20, seed=10 + step)))
    batch = Batch(draws(20, seed=20), draws(20, seed=21))

    def distance():
        return objective.student_loss(batch, objective.student).logs["fd0"]

    value = objective.student_loss(batch, objective.student).value
    value.backward()
    whole = distance().item()
    for weight in (network.m, network.r):
        for i in range(weight.numel()):
            flat, step = weight.data.view(-1), 1e-5
            flat[i] += step
            above = distance().item()
            flat[i] -= 2 * step
            below = distance().item()
            flat[i] += step
            slope = (above - below) / (2 * step) / (whole + objective.eps)
            assert weight.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_queue_is_the_distance_of_its_samples_as_one_set():
    objective, _ = made(queue=3, m=0.3, r=0.7)
    noises = [draws(8, seed=10 + step) for step in range(5)]
    for step, noise in enumerate(noises):
        (loss,) = play(objective, step, Batch(draws(8, seed=step), noise))
    samples = 0.3 + 0.7 * torch.cat(noises[2:])  # two earlier steps and the present one
    data = torch.cat([draws(8, seed=step) for step in range(4)])  # of the steps before
    expected = frechet(sums_of(samples) / 24, sums_of(data) / 32)
    torch.testing.assert_close(loss.logs["fd0"], expected)
    assert len(objective.past) == 2


def test_the_running_average_is_a_plain_mean_until_its_decay():
    objective, _ = made(memory="ema", decay=0.75)
    noises = [draws(8, seed=10 + step) for step in range(5)]
    for step, noise in enumerate(noises):
        play(objective, step, Batch(draws(8, seed=step), noise))
    weights = [1 / 4 * 0.75] * 3 + [1 / 4 * 0.75, 1 / 4]  # four in the mean, then one more
    expected = sum(w * sums_of(z) / 8 for w, z in zip(weights, noises, strict=True))
    torch.testing.assert_close(objective.past[0][0], expected)


def test_parts_of_a_batch_enter_the_memory_together():
    parts = [Batch(draws(8, seed=k), draws(8, seed=10 + k)) for k in range(2)]
    whole = Batch(*(torch.cat([getattr(p, k) for p in parts]) for k in ("x", "noise")))
    states = []
    for batches in (parts, [whole]):
        objective, _ = made()
        play(objective, 0, *batches)
        states.append(objective.state_dict())
    torch.testing.assert_close(*states)


def test_the_first_steps_move_nothing_and_fill_the_memory():
    objective, network = made(m=0.5, fill=2)
    for step in range(3):
        network.zero_grad()
        for turn in objective.turns(step):
            turn.loss(Batch(draws(8, seed=step), draws(8, seed=10 + step))).value.backward()
        assert (network.m.grad.abs().max() > 0) == (step == 2)
    assert len(objective.past) == 3


def test_data_are_read_in_the_first_steps_alone():
    objective, _ = made(reference_steps=2)
    for step in range(3):
        play(objective, step, Batch(draws(8, seed=step), draws(8, seed=10 + step)))
    data = torch.cat([draws(8, seed=step) for step in range(2)])
    torch.testing.assert_close(objective.data[0], sums_of(data))


def test_a_resumed_memory_is_the_same():
    objective, _ = made()
    for step in range(3):
        play(objective, step, Batch(draws(8, seed=step), draws(8, seed=10 + step)))
    other, _ = made()
    other.load_state_dict(objective.state_dict())
    batch = Batch(draws(8, seed=5), draws(8, seed=6))
    (a,), (b,) = play(objective, 3, batch), play(other, 3, batch)
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=0)


def test_the_distance_of_a_batch_of_the_datas_own_distribution_is_far_less_with_a_queue():
    """The reason for the queue: 16 samples of 8 unit Gaussians are far from 8 unit Gaussians."""
    found = {}
    for queue in (1, 64):
        objective, _ = made(d=8, queue=queue)
        for step in range(64):
            (loss,) = play(objective, step, Batch(draws(16, 8, step), draws(16, 8, 100 + step)))
        found[queue] = loss.logs["fd0"].item()
    assert found[1] > 1 and found[64] < 0.1


def test_a_linear_student_ends_in_the_distribution_of_the_data():
    objective, network = made(m=0.8, r=0.5, queue=8, fill=8)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.02 ** (step / 500)
        optimizer.zero_grad()
        for turn in objective.turns(step):
            batch = Batch(draws(128, seed=3 * step), draws(128, seed=3 * step + 1))
            turn.loss(batch).value.backward()
        optimizer.step()
    assert network.m.norm() < 0.06
    assert (network.r @ network.r.T - torch.eye(2, dtype=D)).norm() < 0.12
