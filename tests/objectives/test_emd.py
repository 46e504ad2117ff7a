"""EM distillation: Gaussian teacher N(0, 1), student m + r z, noise σ, in closed form."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.distribution.diff_instruct import DiffInstruct
from distill.objectives.distribution.emd import EMD, Walk
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear
from tests.helpers.noise_predictors import guided, labels, predictor
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Fitted

M, R, SIGMA = 0.7, 0.5, 0.8
D = torch.float64
AT = Karras().time(torch.tensor(SIGMA, dtype=D)).item()
ONLY = Uniform(AT, AT)


def toy(n, seed=0, kind=EMD, **fields):
    """(∂m, ∂r) of the student's loss on n samples in the plain weighting, and its loss."""
    network = Affine(torch.tensor([M], dtype=D), torch.tensor([[R]], dtype=D))
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    student = Generator(network)
    made = kind(
        teacher=teacher, student=student, fake=Fitted(network), times=ONLY, weighting="kl", **fields
    )
    torch.manual_seed(seed)
    half = torch.randn(n // 2, 1, dtype=D)
    loss = made.student_loss(Batch(None, torch.cat([half, -half])), student)
    loss.value.backward()
    return [network.m.grad.item(), network.r.grad.item()], loss


def expected(noise_step, latent_step, steps, cancel="none"):
    """(∂m, ∂r) without sampling: the walk is linear, so its first two moments are exact.

    The state is (ε, z, ε', 1), ε' being what `cancel` subtracts.
    """
    a, v, s2 = 1 / (1 + SIGMA**2), R**2 + SIGMA**2, SIGMA**2
    # u = (T - F) / σ², linear in x_t = m + r z + σ ε
    slope = (a - R**2 / v) / s2
    rest = slope * M - (M - R**2 / v * M) / s2
    h, k = noise_step**2 / 2, latent_step**2 / 2
    kept = 1 if cancel == "drawn" else 1 - h
    move = torch.tensor([
        [1 - h + h * SIGMA * slope * SIGMA, h * SIGMA * slope * R, 0, h * SIGMA * rest],
        [k * R * slope * SIGMA, 1 - k + k * R * slope * R, 0, k * R * rest],
        [0, 0, kept, 0],
        [0, 0, 0, 1],
    ], dtype=D)  # fmt: skip
    injected = torch.zeros(4, 4, dtype=D)
    injected[0, 0] = injected[2, 2] = injected[0, 2] = injected[2, 0] = noise_step**2
    injected[1, 1] = latent_step**2
    second = torch.zeros(4, 4, dtype=D)  # E of the state times itself
    second[0, 0] = second[2, 2] = second[0, 2] = second[2, 0] = second[1, 1] = second[3, 3] = 1
    for _ in range(steps):
        second = move @ second @ move.T + injected
    less = cancel in ("drawn", "decayed")
    noise = second[0] - second[2] if less else second[0]
    return [-noise[3].item() / SIGMA, -noise[1].item() / SIGMA]


def test_one_step_without_its_noise_is_diff_instructs_gradient_times_half_the_step():
    walked, _ = toy(1000, inner_steps=1, latent_step=0.0, noise_step=0.4)
    plain, _ = toy(1000, kind=DiffInstruct)  # the same draws
    assert walked == pytest.approx([0.4**2 / 2 * g for g in plain], rel=1e-12)
    assert plain == pytest.approx([0.42683, -0.25692], abs=0.05)


@pytest.mark.parametrize("weighting", ["denoiser", "noise", "kl"])
@pytest.mark.parametrize("process", [Karras(), Linear()], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_so_it_is_for_networks_at_each_weighting(weighting, process, reduction):
    found = []
    for kind, fields in (
        (DiffInstruct, {}),
        (EMD, {"inner_steps": 1, "latent_step": 0.0, "noise_step": 0.2}),
    ):
        teacher, fake, network = (predictor(seed, process, "flow") for seed in (1, 2, 3))
        student = Generator(network)
        made = kind(
            teacher=guided(teacher, 2.0), student=student, fake=fake, weighting=weighting,
            reduction=reduction, guide_fake=True, times=Uniform(0.3, 0.8), **fields,
        )  # fmt: skip
        torch.manual_seed(0)
        batch = Batch(None, torch.randn(16, 3, dtype=D), labels(16))
        loss = made.student_loss(batch, student)
        found.append(torch.autograd.grad(loss.value, loss.samples)[0])
    assert found[0].abs().mean() > 1e-4
    torch.testing.assert_close(found[1], 0.02 * found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cancel", ["none", "drawn", "decayed", "paired"])
def test_the_gradient_is_that_of_the_walks_exact_moments(cancel):
    fields = {"noise_step": 0.3, "latent_step": 0.3, "inner_steps": 20}
    found, _ = toy(200_000, cancel=cancel, **fields)
    wanted = expected(0.3, 0.3, 20, cancel)
    tolerance = 0.015 if cancel == "none" else 6e-3
    assert found == pytest.approx(wanted, abs=tolerance)


def test_what_is_cancelled_at_a_latent_of_its_own_has_no_bias():
    """The table of the docstring: γ of 0.2 and 256 steps."""
    table = {c: expected(0.2, 0.2, 256, c)[1] for c in ("none", "paired", "decayed", "drawn")}
    assert table == pytest.approx(
        {"none": -0.744, "paired": -0.744, "decayed": -0.578, "drawn": 0.114}, abs=1e-3
    )


def test_a_walk_that_has_mixed_gives_forward_kls_gradient():
    forward = [0.78652, -0.78273]
    assert expected(0.02, 0.02, 60_000) == pytest.approx(forward, abs=2e-3)
    found, loss = toy(20_000, noise_step=0.1, latent_step=0.1, inner_steps=1200)
    assert found == pytest.approx(expected(0.1, 0.1, 1200), abs=0.025)
    assert found == pytest.approx(forward, abs=0.05)
    # z has its posterior's spread: E z² under the teacher's law of x_t
    v = R**2 + SIGMA**2
    square = 1 - R**2 / v + (R / v) ** 2 * (1 + SIGMA**2 + M**2)
    assert loss.logs["latent"].item() == pytest.approx(square, abs=0.03)


def test_where_the_latent_hardly_moves_the_direction_stays_reverse_kls():
    m, r = expected(0.4, 0.004, 16)
    assert r / m == pytest.approx(-0.25692 / 0.42683, abs=0.03)
    m, r = expected(0.2, 0.2, 64)
    assert r / m < -0.9  # forward KL's is -0.995


def test_a_step_of_the_walk_is_langevins_on_the_joint_law():
    """Of two noised Gaussians in closed form: the gradient of log p_t - log q_t at x_t(ε, z)."""
    process, n = Linear(), 8
    teacher = Gaussian(
        torch.tensor([0.3, -0.2], dtype=D), torch.tensor([1.0, 0.5], dtype=D), process
    )
    fake = Gaussian(torch.tensor([0.1, 0.4], dtype=D), torch.tensor([0.3, 0.7], dtype=D), process)
    mixing = torch.tensor([[0.6, 0.2], [-0.1, 0.5]], dtype=D)
    student = Generator(Affine(torch.tensor([0.2, 0.1], dtype=D), mixing, process))
    made = EMD(
        teacher=teacher, student=student, fake=fake, noise_step=0.3, latent_step=0.2,
        times=Uniform(0.4, 0.4),
    )  # fmt: skip
    torch.manual_seed(0)
    eps, z = (torch.randn(n, 2, dtype=D).requires_grad_() for _ in range(2))
    t, (alpha, sigma) = torch.full((n,), 0.4, dtype=D), (0.6, 0.4)
    x_t = alpha * student(z) + sigma * eps

    def log_density(law):
        spread = alpha**2 * law.values + sigma**2
        return -((((x_t - alpha * law.mean) @ law.vectors) ** 2 / spread).sum() / 2)

    total = log_density(teacher) - log_density(fake) - (eps**2 + z**2).sum() / 2
    wanted = torch.autograd.grad(total, (eps, z))
    start = Walk(eps.detach(), z.detach(), eps.detach(), z.detach())
    force, pull, _ = made.forces(start, t, Batch(None, z.detach()), student, None)
    torch.manual_seed(1)
    found = made.moved(start, sigma * force, pull)
    torch.manual_seed(1)
    noises = torch.randn(n, 2, dtype=D), torch.randn(n, 2, dtype=D)
    for end, free, begin, slope, noise, step in (
        (found.eps, found.free_eps, eps, wanted[0], noises[0], 0.3),
        (found.z, found.free_z, z, wanted[1], noises[1], 0.2),
    ):
        torch.testing.assert_close(end, begin + step**2 / 2 * slope + step * noise)
        torch.testing.assert_close(free, (1 - step**2 / 2) * begin + step * noise)


def test_pairs_lower_the_gradients_spread_and_not_its_mean():
    fields = {"noise_step": 0.2, "latent_step": 0.2, "inner_steps": 16}
    spread = {}
    for cancel in ("none", "paired"):
        draws = torch.tensor([toy(2000, seed, cancel=cancel, **fields)[0] for seed in range(20)])
        spread[cancel] = draws.std(0)
        error = 4 * spread[cancel] / 20**0.5
        assert ((draws.mean(0) - torch.tensor(expected(0.2, 0.2, 16))).abs() < error).all()
    assert (spread["paired"] < spread["none"] / 4).all()


def test_a_student_like_the_teacher_feels_no_force_and_its_latents_stay_normal():
    network = Affine(torch.zeros(1, dtype=D), torch.ones(1, 1, dtype=D))
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    student = Generator(network)
    made = EMD(teacher=teacher, student=student, fake=Fitted(network), times=ONLY, inner_steps=3)
    made.student_loss(Batch(None, torch.randn(64, 1, dtype=D)), student).value.backward()
    assert abs(network.m.grad.item()) < 1e-12 and abs(network.r.grad.item()) < 1e-12


def test_the_walk_asks_each_network_as_often_as_it_has_steps_and_moves_no_weights():
    teacher, fake, network = (predictor(seed, Karras()) for seed in (1, 2, 3))
    calls = {}
    for name, module in (("teacher", teacher), ("fake", fake), ("student", network)):

        def count(m, args, name=name):
            calls.setdefault(name, []).append(len(args[0]))

        module.register_forward_pre_hook(count)
    student = Generator(network)
    made = EMD(teacher=teacher, student=student, fake=fake, inner_steps=5, latent_step=0.1)
    batch = Batch(None, torch.randn(4, 3, dtype=D), labels(4))
    made.student_loss(batch, student).value.backward()
    assert calls == {"teacher": [4] * 5, "fake": [4] * 5, "student": [4] * 5 + [8]}
    assert all(p.grad is None for p in (*teacher.parameters(), *fake.parameters()))
    assert all(p.grad is not None for p in network.parameters())


def test_a_latent_that_stays_takes_one_pass_of_the_student():
    teacher, fake, network = (predictor(seed, Karras()) for seed in (1, 2, 3))
    calls = []
    network.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    student = Generator(network)
    made = EMD(teacher=teacher, student=student, fake=fake, inner_steps=5, latent_step=0.0)
    batch = Batch(None, torch.randn(4, 3, dtype=D), labels(4))
    made.student_loss(batch, student).value.backward()
    assert calls == [4]


def test_the_fake_learns_from_uncorrected_samples():
    made = EMD(
        teacher=predictor(1, Karras()), student=Generator(predictor(3, Karras())),
        fake=predictor(2, Karras()),
    )  # fmt: skip
    seen = []
    made.fake.loss = lambda x, t, cond: seen.append(x) or x.sum()
    batch = Batch(None, torch.randn(4, 3, dtype=D), labels(4))
    made.fake_loss(batch, made.student)
    assert torch.equal(seen[0], made.student(batch.noise, batch.cond))


def test_a_student_of_several_steps_is_refused():
    with refused("student.steps", "diff-instruct"):
        EMD(teacher=predictor(1), student=Generator(predictor(3), (1.0, 0.5)), fake=predictor(2))
