"""Options of DMD2 that are off by default: Decoupled DMD, DP-DMD's first step, IDA."""

import pytest
import torch
import torch.nn.functional as F

from distill.config.objectives import AnchoredDMD2
from distill.objectives.base import Batch
from distill.objectives.distribution.dmd2 import DMD2
from distill.objectives.dmd2_options.matching import check_pull
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from students.lora import AdaptedDenoiser
from teachers.analytic import Gaussian
from teachers.denoiser import Network
from teachers.process import Karras, Linear, Tabulated
from tests.helpers.noise_predictors import NULL, guided, labels, predictor
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Slopes

D = torch.float64
TIMES = (1.0, 0.75, 0.5, 0.25)
ONE = Uniform(0.4, 0.4)


def made(chain=TIMES, process=None, scale=4.5, n=16, kind=DMD2, **fields):
    """An objective with a guided teacher, a student of these times, and a batch."""
    process = process or Linear()
    predicts = "eps" if isinstance(process, Tabulated) else "flow"
    teacher, fake, network = (predictor(seed, process, predicts) for seed in (1, 2, 3))
    teacher = guided(teacher, scale) if scale != 1 else teacher
    student = Generator(network, chain).keep(len(chain))
    torch.manual_seed(0)
    batch = Batch(None, torch.randn(n, 3, dtype=D), labels(n))
    return kind(teacher=teacher, student=student, fake=fake, **fields), student, batch


def computed(objective, student, batch, first=1, seed=5):
    """The student's loss, and its gradient at x̂."""
    torch.manual_seed(seed)
    loss = objective.student_loss(batch, student, first)
    (grad,) = torch.autograd.grad(loss.value, loss.samples)
    return loss, grad


@pytest.mark.parametrize("process", [Linear(), Tabulated.scaled_linear()])
@pytest.mark.parametrize("times", [TIMES, (1.0,)])
def test_with_every_option_off_the_loss_is_dmd2s(times, process):
    objective, student, batch = made(times, process)
    loss, grad = computed(objective, student, batch)
    torch.manual_seed(5)
    x = student.rollout(batch.noise, batch.cond, 1).detach().requires_grad_()
    t = 0.02 + 0.96 * torch.rand(len(x))
    x_t = process.noise(x, t, torch.randn_like(x))
    with torch.no_grad():
        real, fake = objective.teacher(x_t, t, batch.cond), objective.fake(x_t, t, batch.cond)
        g = (fake - real) / (x - real).abs().mean(1, keepdim=True)
    expected = 0.5 * F.mse_loss(x, (x - g).detach())
    expected.backward()
    assert abs(loss.value - expected) < 1e-12
    assert (grad - x.grad).abs().max() < 1e-12


def test_the_times_at_which_samples_end_are_those_of_their_places():
    _, student, batch = made()
    seen = []
    student.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    student.rollout(batch.noise, batch.cond, 2)
    ends = student.ends(batch.noise, 2)
    assert torch.equal(seen[-1], ends)
    assert sorted(set(ends.tolist())) == sorted(TIMES)


# ---- gradients through several steps

CHAIN = (1.0, 0.6, 0.2)  # with the flow's step x_s = (s/t) x_t + (1 - s/t) x̂


@pytest.mark.parametrize("gradient_steps", [1, 2, 3])
def test_gradients_flow_through_the_last_steps_of_every_sample(gradient_steps):
    """x̂ of the place p is k_p x_p with x_{i+1} = c_i x_i, c_i = s/t + (1 - s/t) k_i, by hand."""
    k = torch.tensor([0.3, 0.7, 0.9], dtype=D, requires_grad=True)
    network = Slopes(torch.tensor(CHAIN, dtype=D), k.detach().clone(), Linear())
    student = Generator(network, CHAIN, renoise=False).keep(3)
    z = torch.tensor([[1.0], [-0.4], [2.5], [0.8], [1.7]], dtype=D)
    student.denoiser.requires_grad_(True)
    x_t = student.inputs(z, None, 1, gradient_steps)
    x = network(x_t, student.ends(z, 1))
    (found,) = torch.autograd.grad(x.sum(), network.slopes)
    places = [2, 2, 1, 1, 0]  # (1 + i) mod 3, those that end later first
    expected = torch.zeros((), dtype=D)
    for start, place in zip(z[:, 0], places, strict=True):
        state = start
        for i in range(place):
            r = CHAIN[i + 1] / CHAIN[i]
            slope = k[i] if place - i < gradient_steps else k[i].detach()
            state = (r + (1 - r) * slope) * state
        expected = expected + k[place] * state
    torch.testing.assert_close(x.sum(), expected)
    (wanted,) = torch.autograd.grad(expected, k)
    torch.testing.assert_close(found, wanted)


def test_gradients_through_all_steps_are_those_of_whole_chains():
    objective, student, batch = made(gradient_steps=4, scale=1, n=1)
    student.renoise = False
    x_t = student.inputs(batch.noise, batch.cond, 3, 4)  # the one sample ends at the last step
    weights = list(student.denoiser.parameters())
    ends = student.ends(batch.noise, 3)
    x = objective.student.denoiser(x_t, ends, batch.cond)
    whole = student(batch.noise, batch.cond, whole_chain=True)
    torch.testing.assert_close(x, whole)
    for a, b in zip(*(torch.autograd.grad(v.sum(), weights) for v in (x, whole)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_flow_through_no_more_steps_than_there_are():
    with refused("objective.gradient_steps", "5 steps of a student of 4"):
        made(gradient_steps=5)


# ---- Flash-DMD's split


class First(torch.nn.Module):
    """A critic whose logit is the first dimension of x_t, scaled."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(2.0, dtype=D))

    def forward(self, x_t, t, cond=None):
        assert cond is None or len(cond["class_labels"]) == len(x_t)
        return self.a * x_t[:, 0]


def test_below_the_split_the_critic_moves_samples_and_above_it_the_matching(monkeypatch):
    objective, student, batch = made(
        split=0.6, critic=First(), gan_weight=1.0, critic_times=Uniform(0.0, 0.0), n=15
    )
    seen = []

    def one(x, ends, part):
        seen.append((ends, part.cond["class_labels"]))
        return torch.ones_like(x), torch.zeros_like(x)

    monkeypatch.setattr(objective, "gradient", one)
    loss, grad = computed(objective, student, batch)
    ends = student.ends(batch.noise, 1)
    low = ends < 0.6
    assert 0 < low.sum() < 15 and torch.equal(seen[0][0], ends[~low])
    assert torch.equal(seen[0][1], batch.cond["class_labels"][~low])
    force = torch.full_like(grad[~low], 1 / grad[~low].numel())
    torch.testing.assert_close(grad[~low], force)
    # of softplus(-2 x₀), a mean over the samples of low noise
    fooled = -2 * torch.sigmoid(-2 * loss.samples.detach()[low, 0]) / low.sum()
    torch.testing.assert_close(grad[low, 0], fooled)
    assert grad[low, 1:].abs().max() == 0


def test_a_split_needs_a_critic_and_steps_on_both_sides():
    for fields, said in (
        ({"split": 0.6}, "critic: {}"),
        ({"split": 0.6, "critic": First(), "gan_weight": 0.0}, "critic: {}"),
        ({"split": 0.1, "critic": First()}, "one side"),
        ({"split": 0.6, "critic": First(), "chain": (1.0,)}, "one side"),
    ):
        with refused("objective.split", said):
            made(**fields)
    objective, *_ = made(split=0.6, critic=First())
    with refused("train.batch", "split"):
        objective.check_batch((3, 3))


# ---- Decoupled DMD


def test_at_equal_times_and_noise_the_two_terms_are_the_guided_teachers(monkeypatch):
    """F - T_w = (F - T_c) - (w - 1) (T_c - T_0); divisors of one size make them comparable."""
    fields = {"times": ONE, "error_floor": 1e3}
    apart, student, batch = made(chain=(1.0,), guidance_times=ONE, **fields)
    plain, same, _ = made(chain=(1.0,), **fields)
    monkeypatch.setattr(torch, "randn_like", lambda x: batch.noise)
    loss, grad = computed(apart, student, batch)
    expected, expected_grad = computed(plain, same, batch)
    assert expected_grad.abs().max() > 1e-7
    assert (grad - expected_grad).abs().max() < 1e-12
    assert abs(loss.value - expected.value) < 1e-12


def test_the_two_terms_are_the_published_code():
    """CDM's: α = w - 1 times T_c - T_0, each over the unguided error, 0.1 at least; no half."""
    objective, student, batch = made(scale=8.0, guidance_times="below", error_floor=0.1, n=64)
    _, grad = computed(objective, student, batch)
    torch.manual_seed(5)
    x = student.rollout(batch.noise, batch.cond, 1).detach().requires_grad_()
    null = {"class_labels": torch.full((64,), NULL)}
    teacher, ends = objective.teacher.denoiser, student.ends(batch.noise, 1)

    def over(gap, real):
        return gap / (real - x).abs().mean(1, keepdim=True).clamp(min=0.1)

    with torch.no_grad():
        tau = 0.02 + 0.96 * torch.rand(64)
        x_tau = Linear().noise(x, tau, torch.randn_like(x))
        real = teacher(x_tau, tau, batch.cond)
        grad_dm = over(objective.fake(x_tau, tau, batch.cond) - real, real)
        tau = (torch.rand(64) * ends).clamp(0.02, 0.98)  # uniform_capped
        x_tau = Linear().noise(x, tau, torch.randn_like(x))
        real, uncond = teacher(x_tau, tau, batch.cond), teacher(x_tau, tau, null)
        grad_ca = 7 * over(uncond - real, real)
    F.mse_loss(x, (x - grad_dm - grad_ca).detach()).backward()
    assert grad_ca.abs().mean() > 0.1
    torch.testing.assert_close(2 * grad, x.grad, rtol=1e-5, atol=1e-9)


def test_guidance_is_compared_below_each_samples_own_time():
    objective, student, batch = made(n=4000, guidance_times="below")
    seen = []
    objective.teacher.denoiser.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    objective.student_loss(batch, student, 0)
    matched, t = seen[0], seen[1][:4000]
    assert matched.max() > 0.97
    ends = student.ends(batch.noise, 0)
    assert (t <= ends.clamp(max=0.98)).all() and t.min() == pytest.approx(0.02)
    for end in TIMES:
        assert t[ends == end].max() > 0.95 * end
        assert t[ends == end].mean().item() == pytest.approx(end / 2, abs=0.02)


def test_without_guidance_there_is_nothing_to_take_apart():
    with refused("objective.guidance_times", "guidance"):
        made(scale=1, guidance_times="below")


# ---- DP-DMD


@pytest.mark.parametrize("process", [Linear(), Linear(3.0)])
def test_the_first_steps_loss_is_the_published_one(process):
    """MSE(v_1, (noise - z_k) / (1 - σ_k)), z_k after k of 30 Euler steps along v."""
    objective, student, batch = made(process=process, first_step=0.05)
    loss, grad = computed(objective, student, batch, first=0)
    first = student.ends(batch.noise) == 1.0
    noise = batch.noise[first]
    cond = {"class_labels": batch.cond["class_labels"][first]}
    t = torch.linspace(1, 0, 31, dtype=D)
    sigmas, z = process.scales(t)[1], noise
    with torch.no_grad():
        for k in range(5):
            now = t[k].expand(4)
            v = (z - objective.teacher(z, now, cond)) / sigmas[k]
            z = z + (sigmas[k + 1] - sigmas[k]) * v
        target = (noise - z) / (1 - sigmas[5])
    x = student.denoiser(noise, torch.ones(4, dtype=D), cond)
    expected = F.mse_loss(noise - x, target)  # v = noise - x̂ at t = 1
    torch.testing.assert_close(loss.logs["first_step"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.value - loss.logs["matching"], 0.05 * expected)
    wrong = 0.05 * 2 * (x - noise + target) / x.numel()  # of the first step, the path alone
    torch.testing.assert_close(grad[first], wrong, rtol=1e-5, atol=1e-9)


def test_the_later_steps_are_matched_as_if_the_first_were_not_there():
    objective, student, batch = made(first_step=0.05)
    _, grad = computed(objective, student, batch, first=0)
    kept = int((student.ends(batch.noise) < 1).sum())
    assert 0 < kept < len(batch.noise)
    plain, *_ = made()
    torch.manual_seed(5)
    x = student.rollout(batch.noise, batch.cond, 0).detach()[:kept]
    rows = Batch(None, batch.noise[:kept], {"class_labels": batch.cond["class_labels"][:kept]})
    expected, _ = plain.gradient(x, student.ends(batch.noise)[:kept], rows)
    torch.testing.assert_close(grad[:kept], expected / x.numel(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("process", [Linear(), Karras(), Tabulated.scaled_linear()], ids=str)
def test_a_student_that_walks_the_teachers_path_has_no_loss(process):
    """The network is made to answer, at its first time, the x̂ whose step ends on the path."""
    teacher = Gaussian(torch.zeros(3, dtype=D), torch.full((3,), 0.25, dtype=D), process)
    start, (steps, grid) = torch.ones(1, dtype=D), (2, 8)
    begin, t = torch.full((1, 3), 3.0, dtype=D), start
    x_t = begin
    for k in range(steps):
        s = process.rounded(start * (1 - (k + 1) / grid))
        x_t, t = process.step(x_t, teacher(x_t, t), t, s), s
    low, high = (process.step(begin, begin * k, start, t) for k in (0.0, 1.0))
    slope = (x_t - low) / (high - low)  # a step is linear in x̂ = slope · x_t
    losses = []
    for wrong in (0.0, 0.01):
        network = Slopes(torch.tensor([0.5, 1.0], dtype=D), slope[0, :1] + torch.tensor(
            [0.0, wrong], dtype=D), process)  # fmt: skip
        student = Generator(network, (1.0, 0.5)).keep(2)
        objective = DMD2(
            teacher=teacher, student=student, fake=teacher, first_step=1.0,
            first_step_path=(steps, grid),
        )  # fmt: skip
        losses.append(objective.student_loss(Batch(None, torch.randn(8, 3, dtype=D)), student))
    assert losses[0].logs["first_step"] < 1e-18 < 1e-6 < losses[1].logs["first_step"]


def test_a_first_step_of_its_own_needs_later_ones_and_a_fake_that_sees_the_last():
    with refused("objective.first_step", "student.steps"):
        made(chain=(1.0,), first_step=0.05)
    with refused("objective.fake_sees", "last"):
        made(first_step=0.05, fake_sees="places")
    with refused("objective.first_step_path", 30):
        made(first_step=0.05, first_step_path=(30, 30))
    with refused("objective.first_step", "dmd2-anchored"):
        made(kind=AnchoredDMD2, first_step=0.05)
    objective, *_ = made(first_step=0.05)
    objective.check_batch((4, 3))
    with refused("train.batch", "first_step"):
        objective.check_batch((3, 3))


# ---- IDA


def test_the_fake_is_pulled_to_the_student_after_the_students_turn():
    objective, student, _ = made(ida=0.98, student_every=2)
    fake, network = objective.fake, student.denoiser
    before = [p.detach().clone() for p in fake.parameters()]
    turns = objective.turns(0)
    next(turns)
    with torch.no_grad():  # the student moves in its turn
        for p in network.parameters():
            p += 1
    next(turns)
    after = [0.98 * b + 0.02 * p for b, p in zip(before, network.parameters(), strict=True)]
    for found, expected in zip(fake.parameters(), after, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    list(objective.turns(1))  # no turn of the student
    for found, expected in zip(fake.parameters(), after, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


def test_without_ida_the_fake_stays():
    objective, *_ = made()
    before = [p.detach().clone() for p in objective.fake.parameters()]
    list(objective.turns(0))
    assert all(map(torch.equal, before, objective.fake.parameters()))


def test_factors_of_adapters_are_not_averaged():
    plain = Affine(torch.zeros(1), torch.ones(1, 1))
    adapted = AdaptedDenoiser(predictor(1), None)
    check_pull(plain, plain)
    for student, fake in ((plain, adapted), (adapted, plain)):
        with refused("objective.ida", "adapters"):
            check_pull(student, fake)


def test_networks_that_read_other_times_or_labels_are_not_averaged():
    class Scaled(Network):
        def read_time(self, t):
            return 250 * t

    plain = predictor(1)
    check_pull(predictor(2), plain)
    more = predictor(3)
    more.backbone.b = torch.nn.Parameter(torch.zeros(NULL, 3, dtype=D))
    for student in (Scaled(predictor(1).backbone, plain.process, "eps"), more):
        with refused("objective.ida", "stock form"):
            check_pull(student, plain)
