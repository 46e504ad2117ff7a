"""Where matching ends: a Gaussian student of two modes, and a fake score that lags behind."""

import math

import pytest
import torch
from torch import nn

from distill.config.objectives import DMD2, FDistill
from distill.objectives.base import Batch
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.analytic import Gaussian, Mixture
from teachers.denoiser import Denoiser
from teachers.process import Karras
from tests.helpers.toys import Affine, Fitted

D = torch.float64


def only(sigma):
    """Times that are all at one noise level."""
    at = Karras().time(torch.tensor(sigma, dtype=D)).item()
    return Uniform(at, at)


def affine(m, r):
    return Affine(torch.tensor([m], dtype=D), torch.tensor([[r]], dtype=D))


# ---- a Gaussian student of ½ N(-4, 1) + ½ N(4, 1)


class LogRatio(nn.Module):
    """The optimal critic: log p/q of the two modes and the student N(m, r²), noised to σ."""

    def __init__(self, student, sigma):
        super().__init__()
        self._student, self.sigma = (student,), sigma

    def forward(self, x_t, t, cond=None):
        (student,), x = self._student, x_t[:, 0]
        p = 1 + self.sigma**2
        q = student.r.detach()[0, 0] ** 2 + self.sigma**2
        modes = torch.stack([-((x - c).square()) / (2 * p) for c in (-4.0, 4.0)])
        log_p = modes.logsumexp(0) - math.log(2) - 0.5 * math.log(p)
        return log_p + (x - student.m.detach()[0]).square() / (2 * q) + 0.5 * q.log()


class PlainFDistill(FDistill):
    """Without the division by each sample's own error, which has other optima."""

    def scale(self, x, real):
        return torch.ones_like(x)


def optimum(divergence, m, r, sigma=0.05):
    """(|m|, standard deviation) that descent on the objective's own loss ends at, from m and r."""
    network = affine(m, r)
    teacher = Mixture(torch.tensor([[-4.0], [4.0]], dtype=D), 1.0)
    objective = PlainFDistill(
        teacher=teacher, student=Generator(network), fake=Fitted(network), times=only(sigma),
        critic=LogRatio(network, sigma), divergence=divergence, ratio_min=1e-9, ratio_max=1e9,
        gan_weight=0,
    )  # fmt: skip
    share = (torch.arange(4000, dtype=D) + 0.5) / 4000
    z = torch.special.ndtri(share)[:, None]  # quantiles of the noise, in place of draws
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    torch.manual_seed(0)
    for _ in range(250):
        optimizer.zero_grad()
        objective.student_loss(Batch(None, z), objective.student).value.backward()
        optimizer.step()
        schedule.step()
    return abs(network.m.item()), abs(network.r.item())


WIDE = {  # from 0.5 ± 3: optima over both modes, which integrating the divergences gives as well
    "reverse-kl": 3.47, "softened-reverse-kl": 3.42, "jensen-shannon": 4.09,
    "squared-hellinger": 4.01, "jeffreys": 3.56, "forward-kl": 4.12,
}  # fmt: skip


@pytest.mark.parametrize("divergence", WIDE)
def test_a_student_that_sees_both_modes_covers_both(divergence):
    """Whatever the divergence: for the first two this is a local minimum, a mode has less."""
    m, found = optimum(divergence, 0.5, 3.0)
    assert m == pytest.approx(0, abs=0.03)
    assert found == pytest.approx(WIDE[divergence], abs=0.03)


@pytest.mark.parametrize("divergence", WIDE)
def test_from_between_the_modes_only_forward_kl_and_jeffreys_reach_both(divergence):
    """From 2.5 ± 1.2: their weights grow without bound where the student lacks mass."""
    m, found = optimum(divergence, 2.5, 1.2)
    if divergence in ("forward-kl", "jeffreys"):
        assert (m, found) == pytest.approx((0, WIDE[divergence]), abs=0.1)
    else:
        assert (m, found) == pytest.approx((4.0, 1.0), abs=0.02)


@pytest.mark.parametrize("divergence", ["jensen-shannon", "forward-kl"])
def test_no_divergence_finds_a_mode_that_its_samples_miss(divergence):
    """f-distill weighs samples of the student: from one mode, the other one is never seen."""
    m, found = optimum(divergence, 4.2, 0.7)
    assert (m, found) == pytest.approx((4.0, 1.0), abs=0.05)


# ---- a fake score that lags


S, R, SIGMA = 1.0, 0.5, 0.8  # of the teacher, the student and the noise
V, W = S**2 + SIGMA**2, R**2 + SIGMA**2


class Lagging(Denoiser):
    """The denoiser of N(m, R²), whose mean learns; loss weight 1."""

    def __init__(self):
        super().__init__()
        self.process, self.mean = Karras(), nn.Parameter(torch.tensor([0.7], dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        return self.mean + (x_t - self.mean) * R**2 / W

    def weight(self, t):
        return torch.ones_like(t)


class PlainDMD2(DMD2):
    def scale(self, x, real):
        return torch.ones_like(x)


def lagged(**keys):
    network = affine(0.7, R)
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    objective = PlainDMD2(
        teacher=teacher, student=Generator(network), fake=Lagging(), times=only(SIGMA),
        fake_times=only(SIGMA), **keys,
    )  # fmt: skip
    return objective, network


def noise(n=2000):
    z = torch.special.ndtri((torch.arange(n, dtype=D) + 0.5) / n)[:, None]
    return Batch(None, z)


def slopes(objective, network):
    """How the student's gradient changes with its mean m and the fake's, and the fake's with m."""

    def gradients(m, mean):
        with torch.no_grad():
            network.m.fill_(m)
            objective.fake.mean.fill_(mean)
        found = []
        for loss, weight in (
            (lambda b: objective.student_loss(b, objective.student), network.m),
            (lambda b: objective.fake_and_critic_loss(b, objective.student), objective.fake.mean),
        ):
            torch.manual_seed(0)
            found.append(torch.autograd.grad(loss(noise()).value, weight)[0].item())
        return found

    base, moved, lagging = gradients(0.0, 0.0), gradients(1.0, 0.0), gradients(0.0, 1.0)
    return [
        [(moved[k] - base[k]), (lagging[k] - base[k])] for k in (0, 1)
    ]  # by m and by the fake's mean


def test_the_students_and_the_fakes_gradients_are_those_of_the_two_variables():
    """dm/dτ = (m - m̂)/v - m/V, times σ², and m̂ follows m."""
    student, fake = slopes(*lagged())
    assert student == pytest.approx([SIGMA**2 * (1 / V - 1 / W), SIGMA**2 / W], rel=1e-6)
    k = 2 * (SIGMA**2 / W) ** 2
    assert fake == pytest.approx([-k, k], rel=1e-6)


@pytest.mark.parametrize(("k", "roots"), [
    (0.1, [0.207 + 0.135j, 0.207 - 0.135j]), (0.514, [0.56j, -0.56j]),
    (1.0, [-0.243 + 0.742j, -0.243 - 0.742j]), (5.0, [-0.835, -3.65]),
])  # fmt: skip
def test_it_is_stable_where_the_fake_is_faster_than_the_threshold(k, roots):
    """Of the matrix that the objective's own gradients make, at the fake's rate k."""
    (a, b), (c, d) = slopes(*lagged())
    scale = k / d  # the fake's rate over the student's
    matrix = -torch.tensor([[a / SIGMA**2, b / SIGMA**2], [c * scale, d * scale]], dtype=D)
    found = torch.linalg.eigvals(matrix).tolist()
    order = lambda v: (v.real, v.imag)  # noqa: E731
    for got, want in zip(sorted(found, key=order), sorted(map(complex, roots), key=order)):
        assert got == pytest.approx(want, abs=0.01)
    assert (max(v.real for v in found) < -1e-3) == (k > 1 / W - 1 / V + 1e-2)


@pytest.mark.parametrize(("every", "falls"), [(1, False), (5, True)])
def test_a_student_in_every_fifth_step_is_stable_where_one_in_every_step_is_not(every, falls):
    """The fake's rate is 0.3 of the student's at equal turns, and the threshold 0.514."""
    objective, network = lagged(student_every=every)
    fake = objective.fake
    rate = 0.1  # of the student, in τ
    moves = {
        ("student",): (network.m, rate / SIGMA**2),
        ("fake",): (fake.mean, 0.3 * rate / (2 * (SIGMA**2 / W) ** 2)),
    }
    with torch.no_grad():
        network.m.fill_(0.3)
        fake.mean.fill_(0.0)
    for step in range(400 * every):
        for turn in objective.turns(step):
            weight, lr = moves[turn.players]
            (grad,) = torch.autograd.grad(turn.loss(noise(200)).value, weight)
            with torch.no_grad():
                weight -= lr * grad
    size = math.hypot(network.m.item(), network.m.item() - fake.mean.item())
    assert (size < 0.05) == falls and (size > 3) != falls
