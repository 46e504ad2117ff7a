"""Objectives against closed forms: Gaussian teacher N(0, 1), student m + r z, noise σ."""

import math

import pytest
import torch

from distill.config.objectives import DMD2, OBJECTIVES, SIM, FDistill, SiD, UniInstruct
from distill.objectives.base import Batch
from distill.objectives.distribution.fdistill import WEIGHTS
from distill.objectives.distribution.uni_instruct import SECOND
from distill.objectives.losses import generator_loss, surrogate
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Fitted

M, R, SIGMA = 0.7, 0.5, 0.8  # the test point; s = 1
D = torch.float64
AT = Karras().time(torch.tensor(SIGMA, dtype=D)).item()
ONLY = Uniform(AT, AT)
N = 1_000_000


def pair(m=M, r=R):
    network = Affine(torch.tensor([m], dtype=D), torch.tensor([[r]], dtype=D))
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    return teacher, Generator(network), network


def noise(n=N):
    half = torch.randn(n // 2, 1, dtype=D)
    return torch.cat([half, -half])


def gradient(objective, network, loss):
    """(∂m, ∂r) of an objective's student loss, averaged over four batches."""
    total = torch.zeros(2, dtype=D)
    for seed in range(4):
        torch.manual_seed(seed)
        network.zero_grad()
        loss(Batch(None, noise())).value.backward()
        total += torch.stack([network.m.grad[0], network.r.grad[0, 0]]) / 4
    return total.tolist()


def student_loss(objective):
    return lambda batch: objective.student_loss(batch, objective.student, 1)


class PlainDMD2(DMD2):
    def scale(self, x, real):
        return torch.ones_like(x)


class PlainSiD(SiD):
    def normaliser(self, x, real):
        return torch.ones_like(x)


def test_dmd2s_gradient_is_reverse_kl_weighted_by_the_noise():
    teacher, student, network = pair()
    objective = PlainDMD2(teacher=teacher, student=student, fake=Fitted(network), times=ONLY)
    m, r = gradient(objective, network, student_loss(objective))
    assert m == pytest.approx(0.27317, abs=2e-3)  # σ² times 0.42683
    assert r == pytest.approx(-0.16443, abs=2e-3)  # σ² times -0.25692


@pytest.mark.parametrize(
    ("alpha", "m", "r"),
    [
        (0.0, 0.01677, -0.12833),
        (0.5, 0.10660, -0.18241),  # half the true Fisher gradient
        (1.0, 0.19644, -0.23648),
        (1.2, 0.23237, -0.25811),
    ],
)
def test_sids_gradient_is_the_fisher_divergences(alpha, m, r):
    teacher, student, network = pair()
    objective = PlainSiD(
        teacher=teacher, student=student, fake=Fitted(network), alpha=alpha, scale=1, times=ONLY
    )
    found = gradient(objective, network, student_loss(objective))
    assert found[0] == pytest.approx(m, abs=2e-3)
    assert found[1] == pytest.approx(r, abs=2e-3)


@pytest.mark.parametrize(
    ("keys", "factor", "m", "r"),
    [
        ({"distance": "square"}, SIGMA**4, 0.95868, -1.15344),
        ({"distance": "huber", "huber_c": 0.3 * SIGMA**2}, SIGMA**2, 0.593, -0.587),
    ],
)
def test_sims_gradient_is_the_score_divergences(keys, factor, m, r):
    class PlainSIM(SIM):
        normaliser = PlainSiD.normaliser

    teacher, student, network = pair()
    objective = PlainSIM(
        teacher=teacher, student=student, fake=Fitted(network), scale=1, times=ONLY, **keys
    )
    found = gradient(objective, network, student_loss(objective))
    assert found[0] / factor == pytest.approx(m, abs=5e-3)  # in units of the score, c = 0.3
    assert found[1] / factor == pytest.approx(r, abs=5e-3)


class Ratio(torch.nn.Module):
    """The optimal critic: log p_t/q_t of the teacher N(0, 1) against the student N(m, r²)."""

    def forward(self, x_t, t, cond=None):
        p, q = 1 + SIGMA**2, R**2 + SIGMA**2
        x = x_t[:, 0]
        return 0.5 * ((x - M).square() / q - x.square() / p + math.log(q / p))


class RatioMean(Ratio):
    """The optimal critic in the place of one that reads features: a logit, and the fake's x̂."""

    def __init__(self, fake):
        super().__init__()
        self._fake = (fake,)

    def denoise(self, x_t, t, cond=None):
        return self._fake[0](x_t, t, cond), self(x_t, t)[:, None]


def by_quadrature(h, second):
    """Uni-Instruct's gradient (∂m, ∂r) without ω: integrals over x_t and over z given x_t."""
    p, q = 1 + SIGMA**2, R**2 + SIGMA**2
    m, r = (torch.tensor(v, dtype=D, requires_grad=True) for v in (M, R))
    z = torch.linspace(-8, 8, 801, dtype=D)[:, None]
    eps = z.T
    weight = (-(z**2 + eps**2) / 2).exp() / (2 * math.pi) * 0.02**2
    x = m + r * z
    x_t = x + SIGMA * eps
    fake, real = M + (x_t - M) * R**2 / q, x_t / p
    log_r = 0.5 * ((x_t - M) ** 2 / q - x_t**2 / p + math.log(q / p))
    ratio, y = log_r.exp().detach(), (real - fake).detach()
    value = h(ratio) * (real - fake) * (fake - x) + second(ratio) * y.abs() * y * x
    return [g.item() for g in torch.autograd.grad((weight * value).sum(), (m, r))]


@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", "jensen-shannon", "neyman"])
def test_uni_instructs_gradient_is_the_weighted_score_divergences(divergence):
    class PlainUni(UniInstruct):
        normaliser = PlainSiD.normaliser

    teacher, student, network = pair()
    fake = Fitted(network)
    objective = PlainUni(
        teacher=teacher, student=student, fake=fake, critic=RatioMean(fake), scale=2, times=ONLY,
        divergence=divergence, ratio_min=1e-6, ratio_max=1e6, gan_weight=0,
    )  # fmt: skip
    found = gradient(objective, network, student_loss(objective))
    second = SECOND.get(divergence, torch.zeros_like)
    expected = by_quadrature(WEIGHTS[divergence], second)
    assert found == pytest.approx(expected, abs=5e-3)
    if divergence == "reverse-kl":  # SiD's own, at α = 1
        assert expected == pytest.approx([0.19644, -0.23648], abs=1e-4)


def test_sid_above_one_repels_a_student_that_is_far_too_wide():
    found = {}
    for alpha in (1.0, 1.2):
        teacher, student, network = pair(0.0, 4.0)
        objective = PlainSiD(
            teacher=teacher, student=student, fake=Fitted(network), alpha=alpha, scale=1, times=ONLY
        )
        found[alpha] = gradient(objective, network, student_loss(objective))[1]
    assert found[1.0] == pytest.approx(0.108, abs=5e-3)
    assert found[1.2] == pytest.approx(-0.090, abs=5e-3)


@pytest.mark.parametrize(
    ("divergence", "m", "r"),
    [
        ("reverse-kl", 0.42683, -0.25692),
        ("softened-reverse-kl", 0.19367, -0.09768),
        ("jensen-shannon", 0.23316, -0.15924),
        ("squared-hellinger", 0.12880, -0.09535),
        ("forward-kl", 0.78652, -0.78273),
        ("jeffreys", 1.21335, -1.03965),
        ("neyman", 0.80857, -0.36829),
    ],
)
def test_f_divergences_have_their_own_gradients(divergence, m, r):
    class Plain(FDistill):
        scale = PlainDMD2.scale

    teacher, student, network = pair()
    objective = Plain(
        teacher=teacher, student=student, fake=Fitted(network), critic=Ratio(), times=ONLY,
        divergence=divergence, ratio_min=1e-6, ratio_max=1e6, gan_weight=0,
    )  # fmt: skip
    found = gradient(objective, network, student_loss(objective))
    # the mean of h under the student undoes the normalisation
    x_t = M + math.sqrt(R**2 + SIGMA**2) * noise(4 * N)
    mean = WEIGHTS[divergence](Ratio()(x_t, None).exp()).mean().item()
    assert found[0] * mean / SIGMA**2 == pytest.approx(m, rel=0.02)
    assert found[1] * mean / SIGMA**2 == pytest.approx(r, rel=0.02)


def test_reverse_kl_is_dmd2_whatever_the_critic_says():
    grads = []
    for kind, extra in ((DMD2, {}), (FDistill, {"divergence": "reverse-kl"})):
        teacher, student, network = pair()
        torch.manual_seed(0)
        kind(
            teacher=teacher,
            student=student,
            fake=Fitted(network),
            critic=Ratio(),
            gan_weight=0,
            **extra,
        ).student_loss(Batch(None, noise(1000)), student, 1).value.backward()
        grads.append(network.r.grad)
    torch.testing.assert_close(*grads)


def test_ratio_bins_settle_on_the_mean_ratio_of_their_times():
    teacher, student, network = pair()
    objective = FDistill(
        teacher=teacher,
        student=student,
        fake=Fitted(network),
        critic=Ratio(),
        ratio_ema=0,
        times=ONLY,
        ratio_min=1e-3,
        ratio_max=1e3,
    )
    turn = next(turns := objective.turns(0))
    turn.loss(Batch(None, noise()))
    next(turns)  # what follows the student's turn
    where = int(AT * objective.bins)
    assert objective.means[where].item() == pytest.approx(1.0, abs=0.02)  # E_q[p/q] = 1, clipped
    assert (objective.means[:where] == 1).all()


@pytest.mark.parametrize("kind", [DMD2, SiD])
def test_a_fake_score_equal_to_the_teacher_leaves_no_gradient(kind):
    teacher, student, network = pair()
    objective = kind(teacher=teacher, student=student, fake=teacher)
    objective.student_loss(Batch(None, noise(1000)), student, 1).value.backward()
    assert network.r.grad.abs().max() < 1e-12
    assert network.m.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", [DMD2, SiD])
def test_a_perfect_student_feels_no_force_on_average(kind):
    teacher, student, network = pair(0.0, 1.0)
    objective = kind(teacher=teacher, student=student, fake=Fitted(network), times=ONLY)
    m, r = gradient(objective, network, student_loss(objective))
    assert abs(m) < 2e-3
    assert abs(r) < 2e-3


def test_the_non_saturating_gradient_is_the_softened_reverse_kl():
    m = torch.tensor(0.8, dtype=D, requires_grad=True)
    x = m + noise()
    logits = -0.8 * x + 0.32  # the optimal critic of N(0, 1) against N(0.8, 1), held fixed
    generator_loss(logits).backward()
    assert m.grad.item() == pytest.approx(0.45583, abs=2e-3)


def test_the_surrogates_gradient_is_the_direction_over_its_size():
    x, g = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    surrogate(x, g).backward()
    torch.testing.assert_close(x.grad, g / x.numel())


@pytest.mark.parametrize("kind", [DMD2, SiD])
def test_duplicating_the_batch_changes_no_gradient(kind):
    grads = []
    for copies in (1, 2):
        teacher, student, network = pair()

        class Same(kind):  # the same noise for each copy
            pass

        objective = Same(teacher=teacher, student=student, fake=Fitted(network), times=ONLY)
        torch.manual_seed(1)
        z, eps = torch.randn(2, 64, 1, dtype=D)
        z, eps = z.repeat(copies, 1), eps.repeat(copies, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x, eps=eps: eps)
            objective.student_loss(Batch(None, z), student, 1).value.backward()
        grads.append(network.r.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("kind", "alpha"), [("dmd2", None), ("sid", 0.5), ("sid", 1.0), ("sid", 1.2)]
)
def test_a_linear_student_ends_in_the_teachers_law(kind, alpha):
    cov = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=D)
    teacher = Gaussian(torch.zeros(2, dtype=D), cov)
    network = Affine(torch.tensor([1.0, -1.0], dtype=D), 0.5 * torch.eye(2, dtype=D))
    student = Generator(network)
    keys = {} if alpha is None else {"alpha": alpha}
    objective = OBJECTIVES[kind](teacher=teacher, student=student, fake=Fitted(network), **keys)
    optimizer = torch.optim.Adam(network.parameters(), 0.02, (0.0, 0.999))
    steps = 1200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.02 ** (step / steps)
        level = 0.8 * torch.rand(()).item()
        objective.times = Uniform(level, level)
        optimizer.zero_grad()
        batch = Batch(None, torch.randn(512, 2, dtype=D))
        objective.student_loss(batch, student, 1).value.backward()
        optimizer.step()
    assert network.m.norm() < 0.03
    assert (network.r @ network.r.T - cov).norm() < 0.04


def heard(reuse):
    """What the rivals of two shards saw, and what the student had made of each shard's noise."""
    teacher, student, network = pair()
    seen = []

    class Listening(Fitted):
        def loss(self, x, t, cond=None):
            seen.append((x, cond["label"]))
            return x.sum()

    objective = DMD2(
        teacher=teacher, student=student, fake=Listening(network), times=ONLY, fake_times=ONLY,
        student_every=2, share_samples=reuse,
    )  # fmt: skip

    def batch(label):
        return Batch(None, torch.randn(4, 1, dtype=D), {"label": torch.full((4,), label)})

    batches = [batch(label) for label in range(8)]
    coming = iter(batches)
    for step in range(2):
        for turn in objective.turns(step):
            for _ in range(2):
                turn.loss(next(coming))
    with torch.no_grad():
        return seen, [(student(b.noise), b.cond["label"]) for b in batches]


@pytest.mark.parametrize(("reuse", "places"), [(True, [0, 1, 4, 5]), (False, [2, 3, 4, 5])])
def test_rivals_reuse_what_the_student_was_judged_on_in_that_step(reuse, places):
    seen, made = heard(reuse)
    for (x, label), place in zip(seen, places, strict=True):
        torch.testing.assert_close(x, made[place][0])
        assert (label == place).all()
        assert not x.requires_grad


@pytest.mark.parametrize("kind", [DMD2, SiD])
@pytest.mark.parametrize("see", ["last", "places"])
def test_rivals_see_the_end_of_the_chain_unless_told_to_see_every_place(kind, see):
    teacher, _, network = pair()
    student = Generator(network, (1.0, 0.7, 0.4), renoise=False)
    seen = []

    class Listening(Fitted):
        def loss(self, x, t, cond=None):
            seen.append(x)
            return x.sum()

    objective = kind(
        teacher=teacher, student=student, fake=Listening(network), fake_times=ONLY, fake_sees=see
    )
    batch = Batch(None, torch.randn(6, 1, dtype=D))
    (objective.fake_and_critic_loss if kind is DMD2 else objective.fake_loss)(batch, student, 1)
    last, places = student(batch.noise), student.rollout(batch.noise, first=1)
    assert not torch.allclose(last, places)
    torch.testing.assert_close(seen[0], last if see == "last" else places)


def test_samples_of_every_place_are_not_reused_where_rivals_see_the_last():
    teacher, _, network = pair()
    with refused("objective.share_samples", "objective"):
        DMD2(
            teacher=teacher, student=Generator(network, (1.0, 0.5)), fake=Fitted(network),
            share_samples=True,
        )  # fmt: skip
