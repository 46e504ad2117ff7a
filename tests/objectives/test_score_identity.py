"""SiDA, SIM and Uni-Instruct against the published formulas, typed here again, and their limits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.config.objectives import OBJECTIVES
from distill.objectives.base import Batch
from distill.objectives.distribution.fdistill import WEIGHTS
from distill.objectives.distribution.sid import SiD
from distill.objectives.distribution.sim import SIM
from distill.objectives.distribution.uni_instruct import SECOND
from students.critic import FeatureMean
from students.generator import Generator
from teachers.denoiser import Denoiser
from teachers.process import Karras
from tests.helpers.noise_predictors import NULL, guided, labels, predictor
from tests.helpers.refusals import refused

D = torch.float64
B, SHAPE = 5, (2, 4, 4)


class Small(Denoiser):
    """A network of one hidden map, whose x̂ and features follow from it."""

    def __init__(self, seed, flat=False):
        super().__init__()
        torch.manual_seed(seed)
        self.process = Karras()
        self.mid = nn.Conv2d(2, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)
        if flat:
            nn.init.zeros_(self.mid.weight)

    def forward(self, x_t, t, cond=None, s=None):
        sigma = self.process.at(t, x_t)[1]
        return self.out(torch.tanh(self.mid(x_t / (sigma**2 + 1).sqrt())))

    def weight(self, t):
        sigma = self.process.scales(t)[1]
        return (sigma**2 + 0.25) / (sigma * 0.5) ** 2


def made(name, flat=False, **keys):
    """The objective, and its networks: teacher, student and fake."""
    teacher, student, fake = Small(1).requires_grad_(False), Small(2), Small(3, flat)
    if name not in ("sid", "sim"):
        keys["critic"] = FeatureMean(fake, SHAPE, blocks=("mid",))
    for network in (teacher, student, fake):
        network.double()  # after the critic, which runs its network once in float32
    return OBJECTIVES[name](teacher=teacher, student=Generator(student), fake=fake, **keys)


def batch():
    torch.manual_seed(7)
    return Batch(torch.randn(B, *SHAPE, dtype=D), torch.randn(B, *SHAPE, dtype=D))


def played(objective, player, step=0):
    """The loss and the gradients of a player's turn."""
    turn = next(t for t in objective.turns(step) if t.players == (player,))
    given = batch()
    torch.manual_seed(11)
    loss = turn.loss(given)
    network = objective.fake if player == "fake" else objective.student.denoiser
    loss.value.backward()
    grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    objective.fake.zero_grad()
    objective.student.zero_grad()
    return loss.value.detach(), grads


def levels(u):
    """EDM's σ at the place u of its grid, 0 at σ_min: float32, as times are."""
    return (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def wide(sigma):
    return sigma.to(D)[:, None, None, None]


def seen(network, x_t, sigma):
    """x̂ and the mean over channels of the hidden map."""
    hidden = network.mid(x_t / (wide(sigma) ** 2 + 1).sqrt())
    return network.out(torch.tanh(hidden)), hidden.mean(1)


def published_student(objective, ratio=None, gan=0.01):
    """SiDA's student loss as its authors' code has it, after the warm-up, and its gradients."""
    network = objective.student.denoiser
    z = batch().noise
    torch.manual_seed(11)
    x = seen(network, z * 80, torch.full((B,), 80.0))[0]
    sigma = levels(torch.rand(B) * 0.8)
    x_t = x + wide(sigma) * torch.randn_like(x)
    real, (fake, logits) = seen(objective.teacher, x_t, sigma)[0], seen(objective.fake, x_t, sigma)
    omega = (x - real).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5).detach()
    sid = (real - fake) * (fake - x) / omega
    if ratio is not None:
        sid = ratio(sid, logits, x, (real - fake).detach())
    bce = F.binary_cross_entropy_with_logits(logits.clamp(-10, 10), torch.ones_like(logits))
    loss_gan = (bce / omega).mean((1, 2, 3)) * x[0].numel()
    value = 0.5 * sid.sum() * 100 / B + 0.5 * loss_gan.sum() * gan / B
    value.backward()
    grads = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    objective.fake.zero_grad()
    return value.detach(), grads


def same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0, check_dtype=False)
    assert len(found[1]) == len(expected[1]) > 0
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# SiDA


def test_sidas_student_loss_is_the_published_one():
    objective = made("sida")
    same(played(objective, "student"), published_student(objective))


def test_sidas_fake_learns_from_the_published_loss():
    objective = made("sida", critic_weight=0.7)
    found = played(objective, "fake")
    given = batch()
    torch.manual_seed(11)
    with torch.no_grad():
        x = objective.student(given.noise)
    sigma = (torch.randn(B) * 1.2 - 1.2).exp()
    n = wide(sigma) * torch.randn_like(x)  # of both: fakes and data
    denoised, fake = seen(objective.fake, x + n, sigma)
    _, real = seen(objective.fake, given.data + n, sigma)
    weight = (wide(sigma) ** 2 + 0.25) / (wide(sigma) * 0.5) ** 2
    bce = F.binary_cross_entropy_with_logits
    telling = (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2
    published = (weight * (denoised - x) ** 2).sum() / B + 0.7 * (weight * telling).sum() / B
    published.backward()
    grads = [p.grad / x[0].numel() for p in objective.fake.parameters()]
    same(found, (published.detach() / x[0].numel(), grads))


@pytest.mark.parametrize("alpha", [1.0, 1.2])
@pytest.mark.parametrize("player", ["fake", "student"])
def test_sida_without_its_critic_is_sid_bit_for_bit(alpha, player):
    found = played(made("sida", alpha=alpha, gan_weight=0), player)
    expected = played(made("sid", alpha=alpha), player)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert not torch.equal(played(made("sida", alpha=alpha), player)[0], expected[0])


def test_constant_features_give_the_student_no_gradient_of_the_critic():
    without = played(made("sida", flat=True, gan_weight=1e-12), "student")[1]
    found = played(made("sida", flat=True, gan_weight=100.0), "student")[1]
    for a, b in zip(found, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    other = played(made("sida", gan_weight=100.0), "student")[1]
    assert (other[0] - played(made("sida", gan_weight=1e-12), "student")[1][0]).abs().max() > 1e-3


def test_sidas_student_waits_then_learns_from_sid_then_from_both():
    objective = made("sida", frozen_steps=2, gan_start=4)
    turns = [[t.players for t in objective.turns(step)] for step in range(3)]
    assert turns == [[("fake",)], [("fake",)], [("fake",), ("student",)]]
    plain = made("sid", alpha=1.0)
    assert torch.equal(played(objective, "student", 3)[0], played(plain, "student")[0])
    assert not torch.equal(played(objective, "student", 4)[0], played(plain, "student")[0])


# a critic without weights


def test_a_feature_means_logits_are_the_means_over_channels():
    network = Small(1)
    critic = FeatureMean(network, SHAPE, blocks=("mid", "out"))
    network.double()
    x_t, t = torch.randn(3, *SHAPE, dtype=D), torch.rand(3)
    logits = critic(x_t, t)
    sigma = network.process.scales(t)[1]
    hidden = network.mid(x_t / (wide(sigma) ** 2 + 1).sqrt())
    x = network(x_t, t)
    expected = torch.cat([hidden.mean(1).flatten(1), x.mean(1).flatten(1)], 1)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-6)
    denoised, again = critic.denoise(x_t, t)
    assert torch.equal(denoised, x) and torch.equal(again, logits)
    assert not list(critic.parameters())


def test_a_feature_mean_averages_the_channels_of_tokens_and_not_the_tokens():
    class Tokens(nn.Module):
        def forward(self, x):
            return x.flatten(2).transpose(1, 2)

    network = Small(1)
    network.mid = nn.Sequential(Tokens(), nn.Linear(2, 2), nn.Flatten(1), nn.Unflatten(1, SHAPE))
    network.out = nn.Identity()
    critic = FeatureMean(network, SHAPE, blocks=("mid.0",))
    x_t, t = torch.randn(3, *SHAPE), torch.ones(3)
    expected = x_t.mean(1).flatten(1) / (80**2 + 1) ** 0.5
    torch.testing.assert_close(critic(x_t, t), expected)


# SIM


def published_sim(objective, c):
    """The pseudo-Huber SIM loss in units of x̂, with its gradients."""
    network = objective.student.denoiser
    z = batch().noise
    torch.manual_seed(11)
    x = seen(network, z * 80, torch.full((B,), 80.0))[0]
    sigma = levels(torch.rand(B) * 0.8)
    x_t = x + wide(sigma) * torch.randn_like(x)
    real, fake = seen(objective.teacher, x_t, sigma)[0], seen(objective.fake, x_t, sigma)[0]
    y = real - fake
    slope = y / ((y**2).sum((1, 2, 3), keepdim=True) + c**2).sqrt()
    value = (slope * (fake - x)).sum() / B
    value.backward()
    grads = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    objective.fake.zero_grad()
    return value.detach(), grads


@pytest.mark.parametrize("c", [None, 0.3])
def test_sims_loss_is_the_published_one(c):
    objective = made("sim", huber_c=c, scale=1)
    same(played(objective, "student"), published_sim(objective, c or 0.00054 * 32**0.5))


def test_sim_with_the_square_is_twice_sid_at_alpha_one():
    found = played(made("sim", distance="square"), "student")
    value, grads = played(made("sid", alpha=1.0), "student")
    same(found, (2 * value, [2 * g for g in grads]), 1e-10)


def test_with_a_large_constant_the_huber_distance_is_the_square():
    class Plain(OBJECTIVES["sim"]):
        def normaliser(self, x, real):
            return torch.ones_like(x)

    made_square = made("sim", distance="square", scale=1)
    made_square.__class__ = Plain
    value, grads = played(made_square, "student")
    found = played(made("sim", huber_c=1e6, scale=2e6), "student")
    same(found, (value, grads), 1e-6)


# Uni-Instruct

PUBLISHED = {
    "forward-kl": (lambda r: r, lambda r: 0 * r),
    "reverse-kl": (lambda r: 0 * r + 1, lambda r: 0 * r),
    "jeffreys": (lambda r: 1 + r, lambda r: 0 * r),
    "jensen-shannon": (lambda r: r / (1 + r), lambda r: 2 * r**2 / (1 + r) ** 3),
}


@pytest.mark.parametrize("divergence", PUBLISHED)
def test_uni_instructs_loss_is_the_published_one_with_a_true_ratio(divergence):
    objective = made("uni-instruct", divergence=divergence)
    first, second = PUBLISHED[divergence]

    def ratio(sid, logits, x, y):
        r = wide(logits.detach().flatten(1).mean(1).exp().clamp(0.1, 20))
        norm = (y**2).sum((1, 2, 3), keepdim=True).sqrt()
        return first(r) * sid + second(r) * norm * y * x

    same(played(objective, "student"), published_student(objective, ratio))


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
@pytest.mark.parametrize("player", ["fake", "student"])
def test_uni_instruct_with_a_ratio_of_one_is_sida(divergence, player):
    keys = {"ratio_min": 1 - 1e-12, "ratio_max": 1.0}
    found = played(made("uni-instruct", divergence=divergence, **keys), player)
    same(found, played(made("sida"), player), 1e-10)


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_the_second_weight_is_that_of_the_expanded_divergences_gradient(divergence):
    u = torch.linspace(-2, 2, 9, dtype=D).requires_grad_()
    h = WEIGHTS[divergence](u.exp()) + 0 * u**3  # by log r; the sum has two derivatives
    slope = torch.autograd.grad(h.sum(), u, create_graph=True)[0]
    expected = slope - torch.autograd.grad(slope.sum(), u)[0]
    found = SECOND[divergence](u.exp()) if divergence in SECOND else 0 * u
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_ratios_that_cannot_be_are_refused():
    with refused("objective.ratio_min"):
        made("uni-instruct", ratio_min=3.0, ratio_max=2.0)


# ---- SiD-LSG: long and short guidance


def both(kind=SiD, scale=2.5, **keys):
    """An objective on networks that predict noise, guided on both sides, with a batch."""
    teacher, fake, network = (predictor(seed) for seed in (1, 2, 3))
    student = Generator(network)
    keys = {"guide_fake": True, "drop": 0.0, **keys}
    objective = kind(teacher=guided(teacher, scale), student=student, fake=fake, **keys)
    torch.manual_seed(0)
    return objective, student, Batch(None, torch.randn(64, 3, dtype=D), labels(64))


def mixed(network, x_t, t, cond, scale=2.5):
    """x̂ by the guided noise, as the published code has it."""
    null = {"class_labels": torch.full((len(x_t),), NULL)}
    eps, negative = network.backbone(x_t, t, cond), network.backbone(x_t, t, null)
    alpha, sigma = (v[:, None] for v in network.process.scales(t.double()))
    return (x_t - sigma * (negative + scale * (eps - negative))) / alpha


def test_with_lsg_the_loss_is_sids_of_two_guided_scores():
    objective, student, batch = both(alpha=1.0)
    torch.manual_seed(5)
    loss = objective.student_loss(batch, student)
    (found,) = torch.autograd.grad(loss.value, loss.samples)
    torch.manual_seed(5)
    x = student(batch.noise, batch.cond).detach().requires_grad_()
    t = objective.times.sample(x, objective.teacher.process)
    x_t = objective.teacher.process.noise(x, t, torch.randn_like(x))
    real = mixed(objective.teacher.denoiser, x_t, t, batch.cond)
    fake = mixed(objective.fake, x_t, t, batch.cond)
    omega = (x - real).abs().mean(1, keepdim=True).detach()
    expected = 100 * ((real - fake) * (fake - x) / omega).sum(1).mean()
    torch.testing.assert_close(loss.value, expected, rtol=1e-5, atol=0)
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [SiD, SIM])
def test_with_lsg_the_fake_learns_guided(kind):
    objective, student, batch = both(kind)
    torch.manual_seed(5)
    found = objective.fake_loss(batch, student).value
    torch.manual_seed(5)
    x = student(batch.noise, batch.cond)
    t = objective.fake_times.sample(x, objective.fake.process)
    x_t = objective.fake.process.noise(x, t, torch.randn_like(x))
    error = (mixed(objective.fake, x_t, t, batch.cond) - x).square().mean(1)
    torch.testing.assert_close(found, (objective.fake.weight(t) * error).mean())


def test_with_lsg_a_dropped_condition_makes_the_guided_fake_the_unconditional_one():
    objective, student, batch = both(drop=1.0)
    torch.manual_seed(5)
    found = objective.fake_loss(batch, student).value
    plain, _, _ = both(guide_fake=False)
    null = batch._replace(cond={"class_labels": torch.full((64,), NULL)})
    x = student(batch.noise, batch.cond)
    torch.manual_seed(5)
    torch.rand(64)  # which of them are dropped
    t = plain.fake_times.sample(x, plain.fake.process)
    torch.testing.assert_close(found, plain.fake.loss(x, t, null.cond))


@pytest.mark.parametrize("name", ["sida", "uni-instruct"])
def test_a_discriminator_on_the_fakes_own_pass_has_no_lsg(name):
    assert {"guide_fake", "drop"} <= set(OBJECTIVES[name].unused)
