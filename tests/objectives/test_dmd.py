"""DMD against the paper's formulas and closed forms, and against DMD2 where they are the same."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.distribution.dmd import DMD
from distill.objectives.distribution.dmd2 import DMD2
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras
from tests.helpers.noise_predictors import labels, predictor
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine

D = torch.float64


def made(kind=DMD, n=32, **fields):
    """An objective on networks that predict noise, with a batch of pairs."""
    teacher, fake, network = (predictor(seed) for seed in (1, 2, 3))
    student = Generator(network)
    torch.manual_seed(0)
    batch = Batch(torch.randn(n, 3, dtype=D), torch.randn(n, 3, dtype=D), labels(n))
    return kind(teacher=teacher, student=student, fake=fake, **fields), student, batch


def test_the_gradient_is_the_papers():
    """w α (s_F - s_T), w = σ²/α · CHW / |D_T - x|₁, of scores s = -ε / σ."""
    objective, student, batch = made(regression=0.0)
    torch.manual_seed(5)
    loss = objective.student_loss(batch, student)
    (found,) = torch.autograd.grad(loss.value, loss.samples)
    torch.manual_seed(5)
    x = student(torch.randn_like(batch.noise), batch.cond).detach()
    t = objective.times.sample(x, objective.teacher.process)
    alpha, sigma = (v[:, None] for v in objective.teacher.process.scales(t.double()))
    x_t = alpha * x + sigma * torch.randn_like(x)
    with torch.no_grad():
        eps = objective.teacher.backbone(x_t, t, batch.cond)
        eps_fake = objective.fake.backbone(x_t, t, batch.cond)
    denoised = (x_t - sigma * eps) / alpha
    weight = sigma**2 / alpha * 3 / (denoised - x).abs().sum(1, keepdim=True)
    expected = weight * alpha * (-eps_fake / sigma + eps / sigma)
    torch.testing.assert_close(found, expected / x.numel(), rtol=1e-5, atol=1e-9)


def test_as_in_the_code_without_regression_it_is_dmd2_on_fresh_noise():
    objective, student, batch = made(regression=0.0, weighting="code")
    plain, same, _ = made(DMD2)
    torch.manual_seed(5)
    found = objective.student_loss(batch, student).value
    torch.manual_seed(5)
    fresh = batch._replace(noise=torch.randn_like(batch.noise))
    assert abs(found - plain.student_loss(fresh, same).value) < 1e-12


def test_regression_adds_its_weight_times_the_distance_to_the_pairs():
    objective, student, batch = made(regression=0.0)
    torch.manual_seed(5)
    without = objective.student_loss(batch, student).value
    objective.regression = 0.25
    torch.manual_seed(5)
    loss = objective.student_loss(batch, student)
    distance = (student(batch.noise, batch.cond) - batch.data).square().mean()
    torch.testing.assert_close(loss.value, without + 0.25 * distance)
    torch.testing.assert_close(loss.logs["regression"], distance)


@pytest.mark.parametrize("distance", ["square", "huber"])
def test_regression_alone_leads_to_the_pairs_own_map(distance):
    """Of pairs x = 2 + 3 z it pulls m and r to 2 and 3, and there it has no gradient."""
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    z = torch.randn(64, 1, dtype=D)
    for m, r, sign in ((2.0, 3.0, 0), (1.0, 2.0, -1), (3.0, 4.0, 1)):
        network = Affine(torch.tensor([m], dtype=D), torch.tensor([[r]], dtype=D))
        student = Generator(network)
        objective = DMD(  # the fake is the teacher: there is no other force
            teacher=teacher, student=student, fake=teacher, distance=distance
        )
        pairs = Batch(2 + 3 * torch.cat([z, -z]), torch.cat([z, -z]))
        objective.student_loss(pairs, student).value.backward()
        for grad in (network.m.grad, network.r.grad):
            assert abs(grad.item()) < 1e-9 if sign == 0 else grad.item() * sign > 0


def test_student_and_fake_see_other_noise_than_the_pairs():
    objective, student, batch = made()
    seen, scale = [], student.scale(batch.noise)
    student.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0] / scale))
    for turn in objective.turns(0):
        turn.loss(batch)
    matched, regressed, judged = seen
    torch.testing.assert_close(regressed, batch.noise)
    assert not torch.isclose(matched, batch.noise).any()
    assert not torch.isclose(judged, batch.noise).any()
    assert abs(judged.std() - 1) < 0.3


def test_student_and_fake_learn_in_every_step():
    objective, *_ = made()
    for step in range(3):
        assert [t.players for t in objective.turns(step)] == [("student",), ("fake",)]


def test_students_of_several_steps_are_refused():
    network = Affine(torch.zeros(1), torch.ones(1, 1))
    teacher = Gaussian(torch.zeros(1), torch.ones(1), Karras())
    with refused("student.steps", "dmd2"):
        DMD(teacher=teacher, student=Generator(network, (1.0, 0.5)), fake=teacher)


def test_lpips_is_for_images_in_colour():
    objective, *_ = made(distance="lpips")
    objective.check_batch((2, 3, 64, 64))
    with refused("objective.distance", "lpips"):
        objective.check_batch((2, 1, 8, 8))


def test_before_the_matching_the_student_regresses_alone():
    """The turn's gradient is that of the unweighted distance, and the fake has no turn."""
    objective, student, batch = made(regression=0.25, matching_from=2)
    assert objective.last_stage == 2
    weights = list(student.denoiser.parameters())
    distance = (student(batch.noise, batch.cond) - batch.data).square().mean()
    expected = torch.autograd.grad(distance, weights)
    for step in (0, 1):
        (turn,) = objective.turns(step)
        assert turn.players == ("student",)
        loss = turn.loss(batch)
        for found, wanted in zip(torch.autograd.grad(loss.value, weights), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    plain, _, _ = made(regression=0.25)
    for step in (2, 3):
        turns = [turn.players for turn in objective.turns(step)]
        assert turns == [turn.players for turn in plain.turns(step)] == [("student",), ("fake",)]
