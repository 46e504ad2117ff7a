"""TDM: one step is DMD2; the law of each state of a chain; the published code, typed again."""

import pytest
import torch
import torch.nn.functional as F

from distill.objectives.base import Batch
from distill.objectives.distribution.dmd2 import DMD2
from distill.objectives.distribution.tdm import TDM
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear, Tabulated
from tests.helpers.noise_predictors import NULL, guided, labels, predictor
from tests.helpers.refusals import refused
from tests.helpers.toys import Slopes

D = torch.float64
TIMES = (1.0, 0.75, 0.5, 0.25)


def made(chain=TIMES, process=None, scale=4.5, n=16, kind=TDM, **fields):
    """An objective with a guided teacher, a student of these times, and a batch."""
    process = process or Tabulated.scaled_linear()
    predicts = "eps" if isinstance(process, Tabulated) else "flow"
    teacher, fake, network = (predictor(seed, process, predicts) for seed in (1, 2, 3))
    student = Generator(network, chain, renoise=len(chain) == 1).keep(len(chain))
    torch.manual_seed(0)
    batch = Batch(None, torch.randn(n, 3, dtype=D), labels(n))
    return (
        kind(teacher=guided(teacher, scale), student=student, fake=fake, **fields),
        student,
        batch,
    )


def computed(objective, student, batch, first=1, seed=5):
    torch.manual_seed(seed)
    loss = objective.student_loss(batch, student, first)
    (grad,) = torch.autograd.grad(loss.value, loss.samples)
    return loss, grad


@pytest.mark.parametrize("process", [Linear(), Karras(), Tabulated.scaled_linear()], ids=str)
def test_a_student_of_one_step_has_dmd2s_loss(process):
    """Both draw times from 1/8 to 7/8, whose ends have no rounding."""
    ours = made((1.0,), process, low=0.125, high=0.875)
    theirs = made((1.0,), process, kind=DMD2, times=Uniform(0.125, 0.875))
    (loss, grad), (expected, expected_grad) = computed(*ours), computed(*theirs)
    assert abs(loss.value - expected.value) < 1e-12
    assert expected_grad.abs().max() > 1e-3
    assert (grad - expected_grad).abs().max() < 1e-12


def test_of_one_step_the_guidance_is_a_second_force():
    objective, student, batch = made((1.0,), Linear())
    _, grad = computed(objective, student, batch)
    torch.manual_seed(5)
    x = student(batch.noise, batch.cond).detach()
    t = 0.02 + 0.96 * torch.rand(16)
    x_t = Linear().noise(x, t, torch.randn_like(x))
    null = {"class_labels": torch.full((16,), NULL)}
    with torch.no_grad():
        real = objective.teacher.denoiser(x_t, t, batch.cond)
        uncond = objective.teacher.denoiser(x_t, t, null)
        ahead = real - objective.fake(x_t, t, batch.cond) + 3.5 * (real - uncond)
        size = (x - real - 3.5 * (real - uncond)).abs().mean(1, keepdim=True)
    torch.testing.assert_close(grad, -ahead / size / x.numel(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("target", ["state", "endpoint"])
def test_of_one_step_the_fake_learns_x(target):
    objective, student, batch = made((1.0,), Karras(), fake_target=target, snr_max=None)
    torch.manual_seed(5)
    found = objective.fake_loss(batch, student).value
    torch.manual_seed(5)
    x = student(batch.noise, batch.cond)
    t = 0.02 + 0.96 * torch.rand(16)
    expected = objective.fake.loss(x, t, batch.cond)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


# ---- the laws of a chain's states


S2 = 0.6  # the data's variance


def exact(process, times=TIMES):
    """A student of one-dimensional data whose chain is the teacher's flow, and the teacher."""
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([S2], dtype=D), process)
    slopes = []
    for t, s in zip(times, (*times[1:], 0.0), strict=True):
        t, s = (torch.tensor([v], dtype=D) for v in (t, s))
        one = torch.ones(1, 1, dtype=D)
        lands = teacher.flow(one, t, s)
        low, high = (process.step(one, k * one, t, s) for k in (0.0, 1.0))
        slopes.append(((lands - low) / (high - low)).flatten())
    network = Slopes(torch.tensor(times, dtype=D), torch.cat(slopes), process)
    std = (process.scales(torch.ones(1, dtype=D))[0] ** 2 * S2 + 1).sqrt().item()
    return Generator(network, times, renoise=False, start=std), teacher


def slopes_at(student, teacher, monkeypatch, place, share, target, n=400_000):
    """Of x_τ at a stage: its variance, and the slope of what the fake learns, and T's."""
    objective = TDM(teacher=teacher, student=student, fake=teacher, fake_target=target)
    monkeypatch.setattr(objective, "draw", lambda t, mid: mid + share * (t - mid))
    torch.manual_seed(0)
    noise = torch.randn(n, 1, dtype=D)
    stage = objective.stage(Batch(None, noise), student, place)
    kept = student.ends(noise, place) == student.times[place]
    x_tau, tau = stage.x_tau[kept], stage.tau[kept][:1]
    learnt, weight = (
        (stage.target, 1) if target == "state" else (stage.x.detach(), stage.ratio[:, None])
    )
    weight = weight if target == "state" else weight[kept]
    fitted = (weight * learnt[kept] * x_tau).sum() / (weight * x_tau**2).sum()
    alpha, sigma = student.denoiser.process.scales(tau)
    variance = (alpha**2 * S2 + sigma**2).item()
    return x_tau.var().item(), variance, fitted.item(), (alpha * S2 / variance).item()


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_fake_of_the_states_is_the_teacher_where_each_state_has_the_teachers_law(
    monkeypatch, place, share
):
    student, teacher = exact(Linear())
    var, expected, fitted, slope = slopes_at(student, teacher, monkeypatch, place, share, "state")
    assert var == pytest.approx(expected, rel=0.02)  # N(0, a² s² + b²), noised further
    assert fitted == pytest.approx(slope, abs=0.03)


def test_the_published_target_is_right_for_the_last_state_alone(monkeypatch):
    student, teacher = exact(Linear())
    found = [slopes_at(student, teacher, monkeypatch, k, 0.5, "endpoint")[2:] for k in range(4)]
    assert found[3][0] == pytest.approx(found[3][1], abs=0.02)
    for fitted, slope in found[:3]:
        assert fitted < slope - 0.05


def test_a_student_finds_the_teachers_law_at_each_state():
    """Gradient steps on the slopes of two steps, with the fake fitted by least squares."""
    process, times = Linear(), (1.0, 0.5)
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([S2], dtype=D), process)
    network = Slopes(torch.tensor(times, dtype=D), torch.tensor([0.3, 0.3], dtype=D), process)
    student = Generator(network, times, renoise=False)
    objective = TDM(teacher=teacher, student=student, fake=teacher)
    torch.manual_seed(0)
    for step in range(300):
        batch = Batch(None, torch.randn(2000, 1, dtype=D))
        share = torch.rand(1, dtype=D).item()
        objective.draw = lambda t, mid, share=share: mid + (0.1 + 0.8 * share) * (t - mid)
        stage = objective.stage(batch, student, 0)
        alpha, sigma = (expand[:, None] for expand in process.scales(stage.tau))
        grad = torch.zeros(2, dtype=D)
        for k in range(2):
            rows = (student.ends(batch.noise) == times[k])[:, None]
            x_tau = torch.where(rows, stage.x_tau, 0)
            fitted = (stage.target * x_tau).sum() / x_tau.square().sum()
            real = alpha * S2 / (alpha**2 * S2 + sigma**2)
            loss = (stage.x * ((fitted - real) * x_tau).detach()).sum() / rows.sum()
            grad[k] = torch.autograd.grad(loss, network.slopes, retain_graph=True)[0][k]
        with torch.no_grad():
            network.slopes -= (0.5 if step < 200 else 0.1) * grad
    x_t = student.step(torch.randn(200_000, 1, dtype=D), 0)
    assert x_t.std().item() == pytest.approx((0.25 * S2 + 0.25) ** 0.5, rel=0.02)
    assert student(torch.randn(200_000, 1, dtype=D)).std().item() == pytest.approx(
        S2**0.5, rel=0.02
    )


# ---- the published code


def published(objective, student, batch, first, seed=5):
    """train_tdm_demo.py's names: the state noised to `timesteps`, and what it is made of."""
    torch.manual_seed(seed)
    process = objective.fake.process
    x_t, t = student.inputs(batch.noise, batch.cond, first), student.ends(batch.noise, first)
    mid = student.landings(batch.noise, first)
    model_latents = student.denoiser(x_t, t, batch.cond).detach().requires_grad_()
    model_eps = process.eps(x_t, model_latents, t)
    upt = torch.minimum(t - 0.01, torch.full_like(t, 0.98)).float()
    low = mid.float().clamp(min=0.02)
    tau = low + (upt - low) * torch.rand(len(t))
    (a, s), (a_new, s_new) = process.at(mid, x_t), process.at(tau, x_t)
    ode = a * model_latents + s * model_eps
    rand_noise = torch.randn_like(ode)
    beta = (s_new**2 - (a_new / a * s) ** 2) ** 0.5
    noisy = (ode / a * a_new + beta * rand_noise).detach()
    mixed = (model_eps / a * a_new * s + beta * rand_noise) / s_new
    return model_latents, noisy, tau, rand_noise, mixed.detach()


def test_the_fakes_target_of_states_is_phased_dmds():
    """ψ = (a_s² b_t + a_t b_s²) / (a_s² b_t|s) n - x_s / a_s, a flow's velocity (2510.27684)."""
    objective, student, batch = made(process=Linear(), separate=False)
    objective.fake.process = Linear()
    torch.manual_seed(5)
    stage = objective.stage(batch, student, 1)
    s, t = student.landings(batch.noise, 1)[:, None], stage.tau[:, None].to(D)
    x_t, now = student.inputs(batch.noise, batch.cond, 1), student.ends(batch.noise, 1)
    x_s = (1 - s) * stage.x + s * student.denoiser.process.eps(x_t, stage.x, now)
    b = (t**2 - ((1 - t) * s / (1 - s)) ** 2).sqrt()  # b_t|s
    n = (stage.x_tau - (1 - t) / (1 - s) * x_s) / b
    psi = ((1 - s) ** 2 * t + (1 - t) * s**2) / ((1 - s) ** 2 * b) * n - x_s / (1 - s)
    torch.testing.assert_close((stage.x_tau - stage.target) / t, psi, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distance", ["square", "huber"])
def test_the_students_loss_is_the_published_one(distance):
    """Its square has no half."""
    objective, student, batch = made(process=Linear(), distance=distance)
    loss, grad = computed(objective, student, batch)
    x, noisy, tau, *_ = published(objective, student, batch, 1)
    null = {"class_labels": torch.full((16,), NULL)}
    with torch.no_grad():
        sd = objective.teacher.denoiser(noisy, tau, batch.cond)
        uncond = objective.teacher.denoiser(noisy, tau, null)
        coop = x + (sd - objective.fake(noisy, tau, batch.cond)) + 3.5 * (sd - uncond)
        weighting = (x - (sd + 3.5 * (sd - uncond))).abs().mean(1, keepdim=True)
    if distance == "huber":
        expected = (((x - coop) ** 2 + 1e-6).sqrt() - 1e-3) / weighting
    else:
        expected = F.mse_loss(x, coop, reduction="none") / weighting
    expected.mean().backward()
    factor = 1 if distance == "huber" else 2
    torch.testing.assert_close(factor * grad, x.grad, rtol=1e-4, atol=1e-8)
    if distance == "huber":
        torch.testing.assert_close(loss.value, expected.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("importance", [True, False])
def test_the_fakes_loss_is_the_published_one(importance):
    objective, student, batch = made(
        process=Linear(), fake_target="endpoint", importance=importance
    )
    torch.manual_seed(5)
    found = objective.fake_loss(batch, student, 1).value
    x, noisy, tau, noise, mixed = published(objective, student, batch, 1)
    weight = torch.exp(-0.5 * (mixed**2).mean(1)) / torch.exp(-0.5 * (noise**2).mean(1))
    assert weight.std() > 0.05
    snr = ((1 - tau) / tau).square().clamp(max=5)
    error = (objective.fake(noisy, tau, batch.cond) - x).square().mean(1) * snr
    expected = (error * weight if importance else error).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


# ---- times


def test_the_intervals_of_the_steps_do_not_overlap():
    objective, student, batch = made(n=4000)
    stage = objective.stage(batch, student, 0)
    ends, mid = student.ends(batch.noise), student.landings(batch.noise)
    assert (stage.tau >= mid.clamp(min=0.02) - 1e-6).all() and (stage.tau <= ends - 0.0099).all()
    for end in TIMES:
        width = stage.tau[ends == end]
        assert (
            width.max() > min(end - 0.01, 0.98) - 0.01
            and width.min() < max(end - 0.25, 0.02) + 0.01
        )


def test_or_they_all_reach_to_the_most_noise():
    objective, student, batch = made(n=4000, separate=False)
    stage = objective.stage(batch, student, 0)
    for end in TIMES:
        assert stage.tau[student.ends(batch.noise) == end].max() > 0.97


def test_a_state_may_be_between_two_times():
    objective, student, batch = made(n=4000, landing="random")
    seen = []
    objective.draw = lambda t, mid: seen.append((t, mid)) or TDM.draw(objective, t, mid)
    stage = objective.stage(batch, student, 0)
    (t, mid), least = seen[0], student.landings(batch.noise)
    assert (mid >= least).all() and (mid <= t - 0.0099).all() and (stage.tau >= mid.float()).all()
    assert (mid - least).mean().item() == pytest.approx(0.12, abs=0.01)
    assert stage.target.isfinite().all()


def test_the_fake_learns_before_the_student_which_moves_every_kth_step():
    objective, *_ = made(student_every=2)
    players = [[t.players for t in objective.turns(step)] for step in range(2)]
    assert players == [[("fake",), ("student",)], [("fake",)]]


def test_the_students_gradient_reaches_no_other_network():
    objective, student, batch = made()
    objective.student_loss(batch, student).value.backward()
    others = (*objective.teacher.parameters(), *objective.fake.parameters())
    assert all(p.grad is None for p in others)
    assert all(p.grad is not None for p in student.parameters())


def test_a_chain_that_is_renoised_is_refused():
    with refused("student.renoise", "false"):
        TDM(teacher=predictor(1), student=Generator(predictor(3), (1.0, 0.5)), fake=predictor(2))
    with refused("objective.low", "high"):
        made(low=0.98)
