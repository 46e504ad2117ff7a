"""Objectives against closed forms: Gaussian teacher N(0, 1), student m + r z, noise σ."""

import math

import pytest
import torch

from distill.losses import LogNormal, Uniform, huber, realism, surrogate
from distill.objective import Batch
from distill.objectives import DMD2, OBJECTIVES, Consistency, ConsistencyTuning, FDistill, SiD
from distill.objectives.progressive import Progressive
from students.generator import Generator
from teachers.analytic import Finite, Gaussian
from teachers.process import Karras, Trig
from tests.toys import Affine, Fitted, Slopes

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
    def omega(self, x, real):
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


class Ratio(torch.nn.Module):
    """The optimal critic: log p_t/q_t of the teacher N(0, 1) against the student N(m, r²)."""

    def forward(self, x_t, t, cond=None):
        p, q = 1 + SIGMA**2, R**2 + SIGMA**2
        x = x_t[:, 0]
        return 0.5 * ((x - M).square() / q - x.square() / p + math.log(q / p))


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
    from distill.objectives.fdistill import WEIGHTS

    class Plain(FDistill):
        scale = PlainDMD2.scale

    teacher, student, network = pair()
    objective = Plain(
        teacher=teacher, student=student, fake=Fitted(network), critic=Ratio(), times=ONLY,
        divergence=divergence, ratio_min=1e-6, ratio_max=1e6, realism=0,
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
            realism=0,
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
        memory=0,
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
    realism(logits).backward()
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
        student_every=2, reuse=reuse,
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


# ---- consistency: data N(0, c²), c = ½, students of slopes


def consistency(solver, levels):
    process = Karras()
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([0.25], dtype=D), process)
    times = torch.linspace(0, 1, levels, dtype=D)
    network = Slopes(times, torch.ones(levels, dtype=D), process)
    objective = Consistency(
        teacher=teacher, student=Generator(network), levels=levels, solver=solver,
        distance="square", target_ema=0,
    )  # fmt: skip
    one, slopes = torch.ones(1, 1, dtype=D), [1.0]
    for i in range(1, levels):
        back = objective.previous(one, times[i : i + 1], times[i - 1 : i], Batch(None, one))
        slopes.append(slopes[-1] * back.item())
    return objective, network, torch.tensor(slopes, dtype=D)


@pytest.mark.parametrize(
    ("solver", "levels", "scale"),
    [
        ("ddim", 18, 0.4230), ("ddim", 40, 0.4649), ("ddim", 150, 0.4905),
        ("heun", 18, 0.5276), ("heun", 40, 0.5049), ("heun", 150, 0.5003),
    ],
)  # fmt: skip
def test_consistency_ends_in_the_published_slope(solver, levels, scale):
    objective, network, slopes = consistency(solver, levels)
    assert 80 * slopes[-1].item() == pytest.approx(scale, abs=1e-4)
    with torch.no_grad():
        network.slopes.copy_(slopes)
    batch = Batch(0.5 * torch.randn(4096, 1, dtype=D), torch.randn(4096, 1, dtype=D))
    loss = objective.loss(batch, 0)  # the oracle: nothing is left to learn
    assert loss.value.item() < 1e-12
    loss.value.backward()
    assert network.slopes.grad.abs().max() < 1e-5


def test_consistency_pulls_a_wrong_slope_towards_the_right_one():
    objective, network, slopes = consistency("heun", 18)
    with torch.no_grad():
        network.slopes.copy_(slopes)
        network.slopes[-1] *= 1.1
    batch = Batch(0.5 * torch.randn(4096, 1, dtype=D), torch.randn(4096, 1, dtype=D))
    objective.loss(batch, 0).value.backward()
    assert network.slopes.grad[-1] > 0
    assert network.slopes.grad[:-1].abs().max() < 1e-6 * network.slopes.grad[-1]


def tuning(q=2.0):
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    network = Affine(torch.zeros(1, dtype=D), torch.ones(1, 1, dtype=D))
    return ConsistencyTuning(teacher=teacher, student=Generator(network), q=q, stage_steps=1)


@pytest.mark.parametrize(
    ("q", "sigma", "share"), [(256.0, 0.05, 0.981), (256.0, 80.0, 0.9961), (2.0, 80.0, 0.5)]
)
def test_ects_steps_shrink_as_published(q, sigma, share, monkeypatch):
    objective = tuning(q)
    t = objective.teacher.process.time(torch.tensor([sigma], dtype=D))
    monkeypatch.setattr(LogNormal, "sample", lambda *_: t)
    t, r = objective.pair(torch.zeros(1, 1), 0)
    assert (objective.ratio(r) / objective.ratio(t)).item() == pytest.approx(share, abs=1e-3)


def test_ects_last_stages_neither_overflow_nor_let_the_times_meet():
    objective, x = tuning(256.0), torch.zeros(64, 1)
    t, r = objective.pair(x, 10_000)  # where q^stage is beyond any float
    ratio = objective.ratio(r) / objective.ratio(t)
    assert ratio.max().item() == pytest.approx(0.999, abs=2e-4) and (r < t)[t > 0].all()


def test_ects_first_stage_is_plain_diffusion_below_its_threshold(monkeypatch):
    objective = tuning()
    t = objective.teacher.process.time(torch.tensor([1.8, 2.0], dtype=D))
    monkeypatch.setattr(LogNormal, "sample", lambda *_: t)
    _, r = objective.pair(torch.zeros(2, 1), 0)
    assert (r[0] == 0) and (r[1] > 0)
    x = torch.randn(2, 1, dtype=D)
    anchored = objective.anchor(torch.full((2, 1), 9.0, dtype=D), r, Batch(x, x))
    torch.testing.assert_close(anchored, torch.stack([x[0], torch.tensor([9.0], dtype=D)]))
    assert objective.weight(t, r)[0].item() == pytest.approx(1 / 1.8)


def test_ects_stages_halve_the_gap():
    objective = tuning()
    torch.manual_seed(0)
    t0, r0 = objective.pair(torch.zeros(1000, 1), 0)
    torch.manual_seed(0)
    t1, r1 = objective.pair(torch.zeros(1000, 1), 1)
    far = objective.ratio(t0) > 5
    gaps = (
        (objective.ratio(t0) - objective.ratio(r0))[far],
        (objective.ratio(t1) - objective.ratio(r1))[far],
    )
    torch.testing.assert_close(gaps[1], gaps[0] / 2, rtol=1e-3, atol=1e-3)


def test_the_huber_norm_runs_over_the_whole_sample():
    x, y = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    torch.testing.assert_close(huber(x, y, 0.5), torch.full((2,), (6.25**0.5) - 0.5))


def test_the_target_network_follows_only_after_the_turn():
    objective, network, _ = consistency("ddim", 18)
    objective = Consistency(
        teacher=objective.teacher, student=objective.student, levels=18, target_ema=0.9
    )
    turns = objective.turns(0)
    next(turns)
    with torch.no_grad():
        network.slopes.add_(1.0)
    torch.testing.assert_close(objective.target.slopes, torch.ones(18, dtype=D))
    assert next(turns, None) is None
    torch.testing.assert_close(objective.target.slopes, torch.full((18,), 1.1, dtype=D))


# ---- progressive


def progressive(first):
    process = Trig()
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([0.25], dtype=D), process)
    network = Slopes(torch.zeros(1, dtype=D), torch.zeros(1, dtype=D), process)
    return Progressive(teacher=teacher, student=Generator(network), first=first, stage_steps=1)


@pytest.mark.parametrize(("first", "slope"), [(1, 0.2), (2, 0.33344), (4, 0.41138), (8, 0.45393)])
def test_stages_compose_to_the_first_teachers_own_steps(first, slope):
    objective, one = progressive(first), torch.ones(1, 1, dtype=D)
    for stage, n in enumerate(objective.grids):
        objective.stage = stage
        grid = objective.grid()
        assert len(grid) == n + 1
        slopes = [
            objective.target(one, grid[i : i + 1], (grid[i : i + 1] + grid[i + 1 : i + 2]) / 2,
                             grid[i + 1 : i + 2], None).item()
            for i in range(n)
        ]  # fmt: skip
        # the stage's optimum becomes the next teacher
        objective.teacher = Slopes(grid[:-1], torch.tensor(slopes, dtype=D), Trig())
    assert slopes[0] == pytest.approx(slope, abs=1e-5)


def test_a_student_step_lands_where_two_teacher_steps_do():
    objective, x_t = progressive(4), torch.randn(16, 1, dtype=D)
    process, teacher = Trig(), objective.teacher
    t, m, r = (torch.full((16,), v, dtype=D) for v in (0.75, 0.625, 0.5))
    x_m = process.step(x_t, teacher(x_t, t), t, m)
    x_r = process.step(x_m, teacher(x_m, m), m, r)
    target = objective.target(x_t, t, m, r, None)
    torch.testing.assert_close(process.step(x_t, target, t, r), x_r)


def test_the_last_cell_takes_the_teachers_second_answer():
    objective, x_t = progressive(4), torch.randn(16, 1, dtype=D)
    process, teacher = Trig(), objective.teacher
    t, m, r = (torch.full((16,), v, dtype=D) for v in (0.25, 0.125, 0.0))
    x_m = process.step(x_t, teacher(x_t, t), t, m)
    torch.testing.assert_close(objective.target(x_t, t, m, r, None), teacher(x_m, m))


def test_the_loss_is_the_larger_of_the_errors_of_x_and_eps():
    objective = progressive(4)
    batch = Batch(torch.randn(256, 1, dtype=D), torch.randn(256, 1, dtype=D))
    torch.manual_seed(3)
    value = objective.loss(batch, 0).value.item()
    torch.manual_seed(3)
    t, m, r = (v.double() for v in objective.times(batch.x))
    process = Trig()
    x_t = process.noise(batch.x, t, batch.noise)
    target, x = objective.target(x_t, t, m, r, None), objective.student.denoiser(x_t, t)
    eps = process.eps(x_t, target, t) - process.eps(x_t, x, t)
    larger = torch.maximum((target - x).square(), eps.square()).mean().item()
    assert value == pytest.approx(larger, rel=1e-4)


def test_grids_that_do_not_halve_to_the_students_are_refused():
    from teachers.errors import UserError

    with pytest.raises(UserError, match=r"objective\.first"):
        progressive(3)


def test_diffusion_training_has_the_finite_sets_denoiser_for_its_optimum():
    items = torch.tensor([[-1.0], [1.0]], dtype=D)
    exact, x = Finite(items), items[torch.randint(2, (200_000,))]
    t = torch.full((len(x),), AT, dtype=D)
    torch.manual_seed(0)
    best = exact.loss(x, t).item()
    for shift in (-0.05, 0.05):

        class Off(Finite):
            def forward(self, x_t, t, cond=None, s=None, shift=shift):
                return super().forward(x_t, t) + shift

        torch.manual_seed(0)
        assert Off(items).loss(x, t).item() > best
