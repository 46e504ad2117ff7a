"""Diff-Instruct and SwiftBrush against closed forms and the published formulas, typed again."""

import pytest
import torch
import torch.nn.functional as F

from distill.objectives.base import Batch
from distill.objectives.distribution.diff_instruct import DiffInstruct
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras
from tests.helpers.noise_predictors import NULL, guided, labels, predictor
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Fitted

D = torch.float64
M, R, SIGMA = 0.7, 0.5, 0.8  # student m + r z, noise σ; the teacher is N(0, 1)
AT = Karras().time(torch.tensor(SIGMA, dtype=D)).item()
ONLY = Uniform(AT, AT)


def gradient(m=M, r=R, **fields):
    """(∂m, ∂r) of the student's loss on a million samples, with an exact fake score."""
    network = Affine(torch.tensor([m], dtype=D), torch.tensor([[r]], dtype=D))
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    student = Generator(network)
    made = DiffInstruct(
        teacher=teacher, student=student, fake=Fitted(network), times=ONLY, **fields
    )
    total = torch.zeros(2, dtype=D)
    for seed in range(4):
        torch.manual_seed(seed)
        half = torch.randn(250_000, 1, dtype=D)
        network.zero_grad()
        made.student_loss(Batch(None, torch.cat([half, -half])), student).value.backward()
        total += torch.stack([network.m.grad[0], network.r.grad[0, 0]]) / 4
    return total.tolist()


@pytest.mark.parametrize(
    ("weighting", "m", "r"),
    [
        ("kl", 0.42683, -0.25692),  # of KL(student ‖ teacher), both noised
        ("denoiser", 0.27317, -0.16443),  # times σ²
        ("noise", 0.27317 * SIGMA, -0.16443 * SIGMA),  # times σ³
    ],
)
def test_the_gradient_is_reverse_kls_at_its_weight(weighting, m, r):
    found = gradient(weighting=weighting)
    assert found[0] == pytest.approx(m, abs=3e-3)
    assert found[1] == pytest.approx(r, abs=3e-3)


def test_a_student_like_the_teacher_feels_no_force_on_average():
    assert max(map(abs, gradient(0.0, 1.0))) < 3e-3


# ---- the published formulas


def both(n=64, **fields):
    """An objective on networks that predict noise, with a batch."""
    teacher, fake, network = (predictor(seed) for seed in (1, 2, 3))
    student = Generator(network)
    made = DiffInstruct(teacher=guided(teacher, 4.5), student=student, fake=fake, **fields)
    torch.manual_seed(0)
    return made, student, Batch(None, torch.randn(n, 3, dtype=D), labels(n))


def predicted(network, x_t, t, cond):
    return network.backbone(x_t, t, cond)


def test_swiftbrushs_loss_is_the_published_one():
    made, student, batch = both(
        weighting="noise", reduction="mean", guide_fake=True, times=Uniform(0.02, 0.98)
    )
    torch.manual_seed(5)
    loss = made.student_loss(batch, student)
    (found,) = torch.autograd.grad(loss.value, loss.samples)
    # SwiftBrush's training step: both guided, w = 1 - ᾱ, half of the mean square
    torch.manual_seed(5)
    latents = student(batch.noise, batch.cond).detach().requires_grad_()
    t = made.times.sample(latents, made.teacher.process)
    noise = torch.randn_like(latents)
    alphas_cumprod = made.teacher.process.scales(t.double())[0].square()[:, None]
    noisy = alphas_cumprod.sqrt() * latents + (1 - alphas_cumprod).sqrt() * noise
    null = {"class_labels": torch.full((64,), NULL)}
    with torch.no_grad():
        guided_noise = []
        for network in (made.teacher.denoiser, made.fake):
            text, uncond = (predicted(network, noisy, t, c) for c in (batch.cond, null))
            guided_noise.append(uncond + 4.5 * (text - uncond))
        grad = (1 - alphas_cumprod) * (guided_noise[0] - guided_noise[1])
    target = (latents - grad).detach()
    expected = 0.5 * F.mse_loss(latents, target, reduction="mean")
    torch.testing.assert_close(loss.value, expected, rtol=1e-5, atol=0)
    expected.backward()
    torch.testing.assert_close(found, latents.grad, rtol=1e-5, atol=1e-9)


def test_diff_instructs_loss_is_the_published_one():
    made, student, batch = both(guide_fake=False)
    made.teacher = made.teacher.denoiser  # unguided
    torch.manual_seed(5)
    loss = made.student_loss(batch, student)
    (found,) = torch.autograd.grad(loss.value, loss.samples)
    torch.manual_seed(5)
    x = student(batch.noise, batch.cond).detach().requires_grad_()
    t = made.times.sample(x, made.teacher.process)
    x_t = made.teacher.process.noise(x, t, torch.randn_like(x))
    with torch.no_grad():
        gap = made.fake(x_t, t, batch.cond) - made.teacher(x_t, t, batch.cond)
    ((gap * x).sum() / len(x)).backward()  # summed over dimensions, a mean over the batch
    torch.testing.assert_close(found, x.grad, rtol=1e-5, atol=1e-9)


def test_the_fakes_loss_is_the_error_of_its_noise_times_alpha_squared():
    made, student, batch = both(fake_weighting="alpha2", guide_fake=False)
    torch.manual_seed(5)
    found = made.fake_loss(batch, student).value
    torch.manual_seed(5)
    x = student(batch.noise, batch.cond)
    t = made.fake_times.sample(x, made.fake.process)
    noise = torch.randn_like(x)
    alpha = made.fake.process.scales(t.double())[0][:, None]
    noisy = made.fake.process.noise(x, t, noise)
    expected = F.mse_loss(alpha * predicted(made.fake, noisy, t, batch.cond), alpha * noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_sum_over_dimensions_is_that_many_times_the_mean():
    values = {}
    for reduction in ("sum", "mean"):
        made, student, batch = both(reduction=reduction)
        torch.manual_seed(5)
        values[reduction] = made.student_loss(batch, student).value
    torch.testing.assert_close(values["sum"], 3 * values["mean"])


# ---- guidance on both sides


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_a_share_of_the_fakes_samples_has_no_condition(drop):
    made, student, batch = both(2000, guide_fake=True, drop=drop)
    seen = []

    def loss(x, t, cond):
        seen.append(cond["class_labels"])
        return x.sum()

    made.fake.loss = loss
    made.fake_loss(batch, student)
    dropped = seen[0] == NULL
    assert dropped.double().mean().item() == pytest.approx(drop, abs=0.04 * (0 < drop < 1))
    assert torch.equal(seen[0][~dropped], batch.cond["class_labels"][~dropped])


def test_conditions_stay_where_the_fake_is_not_guided():
    made, student, batch = both(guide_fake=False, drop=1.0)
    found = []
    made.fake.loss = lambda x, t, cond: found.append(cond) or x.sum()
    made.fake_loss(batch, student)
    assert found == [batch.cond]


def test_each_samples_own_scale_guides_both_sides():
    made, _, batch = both(guide_fake=True)
    x_t, t = torch.randn(64, 3, dtype=D), torch.full((64,), 0.5, dtype=D)
    scales = torch.linspace(1, 3, 64, dtype=D)
    found = made.fake_x(x_t, t, {**batch.cond, "guidance_scale": scales})
    null = {"class_labels": torch.full((64,), NULL)}
    text, uncond = made.fake(x_t, t, batch.cond), made.fake(x_t, t, null)
    torch.testing.assert_close(found, uncond + scales[:, None] * (text - uncond))


def test_a_fake_cannot_be_guided_as_a_teacher_that_is_not():
    with refused("objective.guide_fake", "guidance"):
        DiffInstruct(
            teacher=predictor(1), student=Generator(predictor(3)), fake=predictor(2),
            guide_fake=True,
        )  # fmt: skip


def test_the_fake_learns_before_the_student_which_moves_every_kth_step():
    made, *_ = both(student_every=2)
    players = [[t.players for t in made.turns(step)] for step in range(2)]
    assert players == [[("fake",), ("student",)], [("fake",)]]
