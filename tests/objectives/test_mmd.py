"""MMD in frozen features: closed forms of Gaussians, gradients by differences, and their reach."""

import math
from copy import deepcopy

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.features.base import others, pooled
from distill.objectives.features.drift import Drift
from distill.objectives.features.fd_loss import FDLoss
from distill.objectives.features.mmd import MMD
from students.generator import Generator
from teachers import load
from teachers.analytic import Gaussian
from teachers.denoiser import Guided
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine

D = torch.float64
LABELS = {"class_labels": torch.arange(10) % 3}


def made(d=1, m=0.0, r=1.0, steps=(1.0,), **keys):
    """An objective of raw samples of d dimensions: a teacher N(0, 1), a student m + r z."""
    network = Affine(torch.full((d,), m, dtype=D), r * torch.eye(d, dtype=D))
    teacher = Gaussian(torch.zeros(d, dtype=D), torch.eye(d, dtype=D))
    student = Generator(network, steps)
    return MMD(teacher=teacher, student=student, **{"blocks": (), **keys}), network


def draws(n, mean=0.0, d=1, seed=0):
    return mean + torch.randn(n, d, dtype=D, generator=torch.Generator().manual_seed(seed))


def estimates(objective, fake, real, size):
    pairs = others(None, size, fake.device, False)
    parts = zip(fake.split(size), real.split(size), strict=True)
    return torch.stack([objective.discrepancy(f, r, pairs) for f, r in parts])


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def test_the_cubic_discrepancy_of_two_gaussians_is_the_closed_form():
    """N(0, 1) and N(μ, 1): 3μ² + 3μ⁴ + (μ³ + 3μ)²."""
    objective, _ = made(kernel="cubic")
    mean, error = mean_and_error(
        estimates(objective, draws(200_000, 0.5, seed=1), draws(200_000, seed=2), 200)
    )
    mu = 0.5
    assert mean == pytest.approx(3 * mu**2 + 3 * mu**4 + (mu**3 + 3 * mu) ** 2, abs=4 * error)
    assert error < 0.1


def test_the_linear_discrepancy_is_the_squared_difference_of_means():
    objective, _ = made(kernel="linear", d=2)
    mean, error = mean_and_error(
        estimates(objective, draws(40_000, 0.5, 2, 1), draws(40_000, 0.0, 2, 2), 40)
    )
    assert mean == pytest.approx(0.5**2, abs=4 * error)  # 2 · ½² over 2 dimensions
    assert error < 0.01


def test_the_gaussian_discrepancy_of_two_gaussians_is_the_closed_form(monkeypatch):
    """σ = 1, means ½ apart: 2 (1 - exp(-½² / 6)) / √3 = 0.047124."""
    monkeypatch.setattr(
        "distill.objectives.features.mmd.median_distance", lambda x: x.new_tensor(2.0)
    )
    objective, _ = made(kernel="gaussian", bandwidth=0.5)
    mean, error = mean_and_error(
        estimates(objective, draws(200_000, 0.5, seed=1), draws(200_000, seed=2), 200)
    )
    assert mean == pytest.approx(0.047124, abs=4 * error)
    assert error < 1e-3


def test_the_median_distance_is_of_all_pairs_of_different_points():
    from distill.objectives.features.mmd import median_distance

    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], dtype=D)
    assert median_distance(x).item() == pytest.approx(math.sqrt(18))  # of 1, √18 and 5
    assert median_distance(torch.zeros(3, 2)) > 0


@pytest.mark.parametrize("kernel", ["cubic", "linear", "gaussian"])
@pytest.mark.parametrize("by_label", [True, False])
def test_two_halves_of_one_set_differ_by_nothing_on_average(kernel, by_label):
    """Also where samples depend on a label that both halves share."""
    objective, _ = made(kernel=kernel, by_label=by_label, d=2)
    labels = torch.arange(8) % 3
    pairs = others({"class_labels": labels}, 8, labels.device, by_label)
    place = labels.to(D)[:, None]
    values = [
        objective.discrepancy(*(place + draws(8, 0, 2, 2 * i + k) for k in (0, 1)), pairs)
        for i in range(4000)
    ]
    mean, error = mean_and_error(torch.stack(values))
    assert abs(mean) < 4 * error
    assert error < 0.3 * place.square().mean()


def test_by_label_pairs_of_other_labels_count_for_nothing():
    objective, _ = made(kernel="linear", by_label=True)
    cond = {"class_labels": torch.tensor([0, 0, 1])}
    pairs = others(cond, 3, torch.device("cpu"), True)
    fake, real = (torch.tensor(v, dtype=D)[:, None] for v in ([1.0, 2.0, 9.0], [3.0, 5.0, 8.0]))
    found = objective.discrepancy(fake, real, pairs)
    assert found.item() == pytest.approx((2 * 2 + 2 * 15 - 2 * (1 * 5 + 2 * 3)) / 6)


@pytest.mark.parametrize("kernel", ["cubic", "linear", "gaussian"])
def test_the_gradient_is_that_of_differences(kernel, monkeypatch):
    """At one σ, which is held fixed."""
    monkeypatch.setattr(
        "distill.objectives.features.mmd.median_distance", lambda x: x.new_tensor(1.3)
    )
    objective, network = made(d=2, m=0.4, r=0.6, kernel=kernel)
    batch = Batch(draws(12, 0, 2, 1), draws(12, 0, 2, 2))

    def value():
        return objective.student_loss(batch, objective.student).value

    value().backward()
    for weight in (network.m, network.r):
        for i in range(weight.numel()):
            flat, step = weight.data.view(-1), 1e-5
            flat[i] += step
            above = value().item()
            flat[i] -= 2 * step
            below = value().item()
            flat[i] += step
            assert weight.grad.view(-1)[i].item() == pytest.approx(
                (above - below) / (2 * step), rel=1e-5, abs=1e-9
            )


@pytest.mark.parametrize("kernel", ["cubic", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_a_linear_student_ends_in_the_distribution_of_the_data(kernel):
    """A linear student of samples ends in the data's mean and covariance, by either kernel."""
    objective, network = made(d=2, m=0.8, r=0.5, kernel=kernel, bandwidth=1.0)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.02 ** (step / 500)
        optimizer.zero_grad()
        batch = Batch(draws(256, 0, 2, 3 * step), draws(256, 0, 2, 3 * step + 1))
        objective.student_loss(batch, objective.student).value.backward()
        optimizer.step()
    assert network.m.norm() < 0.06
    assert (network.r @ network.r.T - torch.eye(2, dtype=D)).norm() < 0.12


def reached(gradient, first):
    """The gradient to the first step's and to the last step's part of a student of two steps."""

    class Steps(Affine):
        """x̂ = m[k] + ½ x_t at the k-th step."""

        def forward(self, x_t, t, cond=None, s=None):
            return self.m[int(t[0] < 0.9)] + 0.5 * x_t / self.process.at(t, x_t)[1]

    network = Steps(torch.tensor([0.3, 0.2], dtype=D), torch.eye(1, dtype=D))
    student = Generator(network, (1.0, 0.5), renoise=False)
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    objective = MMD(teacher=teacher, student=student, blocks=(), gradient=gradient)
    batch = Batch(draws(16, seed=1), draws(16, seed=2))
    loss = objective.student_loss(batch, student, first)
    loss.value.backward()
    return loss.samples.detach(), (network.m.grad != 0).tolist(), student, batch


def test_each_place_has_its_turn_to_be_the_last():
    for first, expected in ((0, [True, False]), (1, [False, True])):
        x, moved, student, batch = reached("last", first)
        assert moved == expected
        torch.testing.assert_close(x, student(batch.noise, steps=first + 1).detach())


@pytest.mark.parametrize("first", [0, 1])
def test_gradients_reach_all_of_the_chain_where_it_is_asked_for(first):
    x, moved, student, batch = reached("chain", first)
    assert moved == [True, True]
    torch.testing.assert_close(x, student(batch.noise).detach())


def test_a_whole_chain_has_no_graph_where_gradients_are_off():
    objective, _ = made(steps=(1.0, 0.5))
    with torch.no_grad():
        assert not objective.student(draws(4), whole_chain=True).requires_grad
    assert objective.student(draws(4)).requires_grad


def gradient_in_parts(kind, parts, gradient):
    """The loss and the gradient of a student of two steps that starts as its teacher."""
    torch.manual_seed(0)
    batch = Batch(torch.randn(10, 1, 8, 8), torch.randn(10, 1, 8, 8), LABELS)
    teacher = load("digits").denoiser.requires_grad_(False)
    denoiser = deepcopy(teacher).requires_grad_(True)
    student = Generator(denoiser, (1.0, 0.5), renoise=False)
    fill = {"fill": 0} if kind is FDLoss else {}
    objective = kind(teacher=teacher, student=student, noise_level=0.0, gradient=gradient,
                     parts=parts, **fill)  # fmt: skip
    loss = objective.student_loss(batch, student, 1)
    loss.value.backward()
    used = [p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]
    return loss.value.detach(), torch.cat(used)


@pytest.mark.parametrize("gradient", ["last", "chain"])
@pytest.mark.parametrize("kind", [MMD, Drift, FDLoss])
def test_parts_leave_the_loss_and_the_gradient_of_the_whole_batch(kind, gradient):
    """No mean of losses of the parts: those are other estimates."""
    whole, slope = gradient_in_parts(kind, 1, gradient)
    cut, same = gradient_in_parts(kind, 3, gradient)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=0)
    assert (same - slope).norm() < 1e-3 * slope.norm()


def test_parts_hold_the_graph_of_one_at_a_time():
    """Each part's samples are taken again for the gradient, and draw the noise that they had."""
    objective, _ = made(d=2, m=0.4, parts=4, blocks=())
    noises, samples = [], objective.samples

    def watched(batch, student, first):
        noises.append(torch.randn_like(batch.noise))
        return samples(batch, student, first) * noises[-1]

    objective.samples = watched
    loss = objective.student_loss(Batch(draws(8, 0, 2, 1), draws(8, 0, 2, 2)), objective.student)
    assert [len(n) for n in noises] == [2] * 4
    loss.value.backward()
    assert [len(n) for n in noises] == [2] * 8
    for first in noises[:4]:
        assert any(torch.equal(first, again) for again in noises[4:])


# features


def test_features_are_the_teachers_at_the_level_and_reach_the_samples():
    teacher = load("digits").denoiser.requires_grad_(False)
    names = ("backbone.mid_block", "backbone.down_blocks.0")
    objective = MMD(
        teacher=Guided(teacher, 2.0, {"class_labels": torch.tensor([10])}),
        student=Generator(teacher), blocks=names, pool=2, noise_level=0.3,
    )  # fmt: skip
    seen = []
    hook = teacher.backbone.mid_block.register_forward_hook(lambda m, a, y: seen.append(y))
    levels = []
    before = teacher.register_forward_pre_hook(lambda m, a: levels.append(a[1]))
    x = torch.randn(3, 1, 8, 8, requires_grad=True)
    mid, down = objective.features(x, {"class_labels": torch.tensor([1, 2, 3])})
    hook.remove(), before.remove()
    assert mid.shape == (3, 64 * 4) and down.shape == (3, 32 * 4)
    sigma = teacher.process.scales(levels[0].double())[1]
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.3), rtol=1e-4, atol=0)
    expected = seen[0].unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(mid, expected)
    (mid.sum() + down.sum()).backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_tokens_and_sequences_are_averaged_over_their_places():
    x = torch.arange(24.0).view(2, 3, 4)
    torch.testing.assert_close(pooled("b", x, 2, False), x.mean(1))
    torch.testing.assert_close(pooled("b", x, 2, True), x.mean(2))
    torch.testing.assert_close(pooled("b", x[:, 0], 2, False), x[:, 0])
    assert pooled("b", torch.ones(2, 3, 1, 5), 4, False).shape == (2, 12)


def test_what_has_no_features_is_refused():
    with refused("objective.blocks", "nosuch"):
        made(blocks=("nosuch",))
    with refused("objective.blocks"):
        pooled("b", None, 1, False)
    teacher = load("digits").denoiser
    with refused("objective.blocks", "twice"):
        MMD(teacher=teacher, student=Generator(teacher), blocks=("backbone.mid_block",) * 2)
    with refused("train.batch"):
        made()[0].check_batch((1, 1))
