"""Turns of objectives on networks that answer one number, against values by hand."""

import math

import pytest
import torch
from torch import nn

from distill.config.objectives import DMD2, Consistency, FDistill, SiD
from distill.objectives.base import Batch
from distill.objectives.diffusion import Diffusion
from distill.objectives.noise_levels import LogNormal, Uniform
from students.generator import Generator
from teachers.denoiser import Denoiser
from teachers.process import Karras
from tests.helpers.toys import Affine

D = torch.float64


class Says(Denoiser):
    """x̂ is one number, or each dimension's; it notes what it was given, and its own loss is 2."""

    def __init__(self, x):
        super().__init__()
        self.process, self.x, self.given = Karras(), torch.as_tensor(x, dtype=D), []

    def forward(self, x_t, t, cond=None, s=None):
        self.called = (t, cond)
        return self.x.expand_as(x_t)

    def weight(self, t):
        return torch.ones_like(t)

    def loss(self, x, t, cond=None):
        self.given.append((t, cond))
        return 2 + 0 * x.sum()


class Slope(nn.Module):
    """A critic whose logit is w times the mean of x_t; it notes the times."""

    def __init__(self, w):
        super().__init__()
        self.w, self.times = nn.Parameter(torch.tensor(w, dtype=D)), []

    def forward(self, x_t, t, cond=None):
        self.times.append(t)
        return self.w * x_t.mean(1)


class Level(Slope):
    """A critic whose logit is w everywhere."""

    def forward(self, x_t, t, cond=None):
        return self.w.expand(len(x_t))


def student(m, r=0.0, d=1):
    network = Affine(torch.full((d,), m, dtype=D), r * torch.eye(d, dtype=D))
    return Generator(network), network


def played(objective, players, batch, step=0):
    """The loss of the turn of these players."""
    turn = next(t for t in objective.turns(step) if t.players == players)
    return turn.loss(batch)


def noise(*values, d=1):
    return torch.tensor(values, dtype=D)[:, None].expand(-1, d)


CLEAN = Uniform(0, 0)  # of Karras: σ = 0.002

# the critic's side


@pytest.mark.parametrize(("w", "right"), [(0.5, 0.0), (-0.5, 1.0)])
def test_the_rivals_loss_is_the_fakes_and_a_share_of_the_critics(w, right):
    generator, _ = student(3.0)  # fakes are at 3, data at -3
    critic = Slope(w)
    objective = DMD2(
        teacher=Says(0.0), student=generator, fake=Says(0.0), critic=critic, critic_weight=0.25,
        critic_times=CLEAN,
    )  # fmt: skip
    batch = Batch(-noise(3.0, 3.0, 3.0), noise(0.0, 0.0, 0.0))
    loss = played(objective, ("fake", "critic"), batch)
    telling = 2 * math.log1p(math.exp(3 * w))
    assert loss.logs["critic"].item() == pytest.approx(telling, abs=0.01)
    assert loss.value.item() == pytest.approx(2 + 0.25 * telling, abs=0.01)
    assert loss.logs["accuracy"].item() == right
    loss.value.backward()
    assert critic.w.grad > 0  # down is where data have the higher logits


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_critic_pulls_the_student_to_where_logits_are_high(weight):
    generator, network = student(0.0)
    teacher = Says(0.0)  # the fake is the teacher: there is no other force
    objective = DMD2(
        teacher=teacher, student=generator, fake=teacher, critic=Slope(2.0), gan_weight=weight,
        critic_times=CLEAN,
    )  # fmt: skip
    batch = Batch(noise(0.0, 0.0), noise(0.0, 0.0))
    loss = played(objective, ("student",), batch)
    loss.value.backward()
    assert network.m.grad.item() == pytest.approx(-weight * 2.0 / 2, rel=0.01)
    expected = loss.logs["matching"] + weight * math.log(2)
    assert loss.value.item() == pytest.approx(expected.item(), abs=0.01)


# times


def test_the_fake_of_dmd2_learns_at_its_own_times_and_the_critic_at_its_own():
    generator, _ = student(1.0, 1.0)
    fake, critic = Says(0.0), Slope(1.0)
    objective = DMD2(
        teacher=Says(0.0), student=generator, fake=fake, critic=critic, times=Uniform(0.1, 0.2),
        fake_times=Uniform(0.4, 0.5), critic_times=Uniform(0.7, 0.8),
    )  # fmt: skip
    batch = Batch(torch.randn(64, 1, dtype=D), torch.randn(64, 1, dtype=D))
    for turn in objective.turns(0):
        turn.loss(batch)
    ((t, _),) = fake.given
    assert len(t) == 64 and 0.4 <= t.min() < 0.42 and 0.48 < t.max() <= 0.5
    assert [len(t) for t in critic.times] == [64, 128]  # the student's samples; fakes and data
    for t in critic.times:
        assert 0.7 <= t.min() < 0.72 and 0.78 < t.max() <= 0.8


def test_the_fake_of_sid_learns_at_its_own_times():
    generator, _ = student(1.0, 1.0)
    fake = Says(0.0)
    objective = SiD(
        teacher=Says(0.0), student=generator, fake=fake, times=Uniform(0.1, 0.2),
        fake_times=Uniform(0.4, 0.5),
    )  # fmt: skip
    played(objective, ("fake",), Batch(None, torch.randn(64, 1, dtype=D)))
    ((t, _),) = fake.given
    assert len(t) == 64 and 0.4 <= t.min() < 0.42 and 0.48 < t.max() <= 0.5


@pytest.mark.parametrize("kind", [DMD2, SiD])
def test_teacher_and_fake_are_compared_at_the_objectives_times(kind):
    class Listens(Says):
        def forward(self, x_t, t, cond=None, s=None):
            self.given.append(t)
            return super().forward(x_t, t)

    generator, _ = student(1.0, 1.0)
    teacher, fake = Listens(0.0), Listens(1.0)
    objective = kind(
        teacher=teacher, student=generator, fake=fake, times=Uniform(0.1, 0.2),
        fake_times=Uniform(0.4, 0.5),
    )  # fmt: skip
    played(objective, ("student",), Batch(None, torch.randn(64, 1, dtype=D)))
    assert torch.equal(teacher.given[0], fake.given[0])
    assert 0.1 <= teacher.given[0].min() < 0.12 and 0.18 < teacher.given[0].max() <= 0.2


# gradients


def test_dmd2s_gradient_is_the_gap_over_each_samples_own_error():
    generator, network = student(0.5, 1.0)
    objective = DMD2(teacher=Says(2.0), student=generator, fake=Says(1.0))
    batch = Batch(None, noise(0.0, 4.0))  # samples at 0.5 and 4.5: errors of 1.5 and 2.5
    played(objective, ("student",), batch).value.backward()
    assert network.m.grad.item() == pytest.approx(-(1 / 1.5 + 1 / 2.5) / 2)


def test_sids_gradient_is_summed_over_dimensions_and_flows_not_through_its_weight():
    generator, network = student(0.5, d=2)
    objective = SiD(
        teacher=Says([2.0, 3.0]), student=generator, fake=Says([1.0, 1.0]), alpha=1.2, scale=10
    )
    loss = played(objective, ("student",), Batch(None, noise(0.0, 0.0, d=2)))
    normaliser = (1.5 + 2.5) / 2
    value = 1 * (1.5 - 1.2 * 1) + 2 * (2.5 - 1.2 * 2)
    assert loss.value.item() == pytest.approx(10 * value / normaliser)
    loss.value.backward()
    assert network.m.grad.tolist() == pytest.approx([-10 * 1 / normaliser, -10 * 2 / normaliser])


# f-divergences: the running means of the ratio, and when they begin to count


def divergence(w, **keys):
    generator, network = student(0.5, 1.0)
    keys = {"divergence": "forward-kl", "gan_weight": 0, "student_every": 1, **keys}
    objective = FDistill(
        teacher=Says(2.0), student=generator, fake=Says(1.0), critic=w, times=Uniform(0.35, 0.35),
        **keys,
    )  # fmt: skip
    return objective, network


def test_a_bins_mean_keeps_its_memory_and_takes_the_rest_from_the_turn():
    objective, _ = divergence(Level(math.log(2.0)), ratio_ema=0.9)
    batch = Batch(noise(0.0, 1.0), noise(0.0, 1.0))
    for step, expected in enumerate((1.1, 1.19)):  # 0.9 · 1 + 0.1 · 2, and once more
        for turn in objective.turns(step):
            turn.loss(batch)
        assert objective.means[3].item() == pytest.approx(expected, rel=1e-5)
    assert (objective.means[:3] == 1).all() and (objective.means[4:] == 1).all()


def test_the_first_steps_are_plain_dmd2_and_not_one_more():
    class ByPlace(Slope):
        """A ratio of 2 for samples above 2, of ½ for others."""

        def forward(self, x_t, t, cond=None):
            return torch.where(x_t[:, 0] > 2, self.w, -self.w)

    objective, network = divergence(ByPlace(math.log(2.0)), warmup=2, ratio_ema=1.0)
    objective.times = CLEAN
    batch = Batch(noise(0.0, 4.0), noise(0.0, 4.0))
    plain = -(1 / 1.5 + 1 / 2.5) / 2
    weighted = -(0.5 / 1.5 + 2 / 2.5) / 2 / 1.25
    for step, expected in enumerate((plain, plain, weighted, weighted)):
        network.zero_grad()
        played(objective, ("student",), batch, step).value.backward()
        assert network.m.grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("ratio", "trusted"), [(100.0, 20.0), (1e-3, 0.1), (3.0, 3.0)])
def test_ratios_are_trusted_within_their_limits(ratio, trusted):
    objective, _ = divergence(Level(math.log(ratio)), ratio_ema=0.0)
    for turn in objective.turns(0):
        turn.loss(Batch(noise(0.0, 1.0), noise(0.0, 1.0)))
    assert objective.means[3].item() == pytest.approx(trusted, rel=1e-5)


# consistency


@pytest.mark.parametrize(("distance", "d"), [("huber", 4), ("huber", 9), ("square", 4)])
def test_consistencys_distance_is_of_the_whole_sample(distance, d):
    generator = Generator(Says(3.0))
    objective = Consistency(
        teacher=Says(0.0), student=generator, pairs="grid", levels=10**6,
        distance=distance, huber_c=0.5, target_ema=0.5,
    )  # fmt: skip
    generator.denoiser.x += 2.0  # and the network that makes targets is where it was
    zeros = torch.zeros(6, d, dtype=D)
    loss = played(objective, ("student",), Batch(zeros, zeros))
    c = 0.5
    expected = 4 * d if distance == "square" else (4 * d + c**2) ** 0.5 - c
    assert loss.value.item() == pytest.approx(expected)


# plain diffusion training


def trained(drop, n=4000):
    network = Says(0.0)
    objective = Diffusion(
        teacher=network, student=Generator(network), times=LogNormal(0.5, 0.1), drop=drop,
        null_label=10,
    )  # fmt: skip
    labels = torch.arange(n) % 10
    x = torch.zeros(n, 1, dtype=D)
    objective.loss(Batch(x, x, {"class_labels": labels}), 0)
    t, cond = network.called
    return t, labels, cond["class_labels"]


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.8, 1.0])
def test_that_share_of_labels_becomes_the_null_class_and_the_others_stay(drop):
    _, before, after = trained(drop)
    dropped = after == 10
    assert dropped.float().mean().item() == pytest.approx(drop, abs=0.03 * (0 < drop < 1))
    assert torch.equal(after[~dropped], before[~dropped])


def test_plain_diffusion_learns_at_its_own_noise_levels():
    t, *_ = trained(0.0)
    levels = Karras().scales(t.double())[1].log()
    assert levels.mean().item() == pytest.approx(0.5, abs=0.02)
    assert levels.std().item() == pytest.approx(0.1, rel=0.1)
