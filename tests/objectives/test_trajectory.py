"""Objectives of trajectories against closed forms: consistency, progressive."""

import pytest
import torch

from distill.config.objectives import Consistency, ConsistencyTuning
from distill.objectives.base import Batch
from distill.objectives.consistency.consistency import posterior_mean
from distill.objectives.losses import huber
from distill.objectives.noise_levels import LogNormal
from distill.objectives.trajectory.progressive import Progressive
from students.generator import Generator
from teachers.analytic import Finite, Gaussian
from teachers.process import Karras, Trig
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Slopes

D = torch.float64
AT = Karras().time(torch.tensor(0.8, dtype=D)).item()

# ---- consistency: data N(0, c²), c = ½, students of slopes


def consistency(solver, levels):
    process = Karras()
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([0.25], dtype=D), process)
    times = torch.linspace(0, 1, levels, dtype=D)
    network = Slopes(times, torch.ones(levels, dtype=D), process)
    objective = Consistency(
        teacher=teacher, student=Generator(network), pairs="grid", levels=levels, solver=solver,
        distance="square",
    )  # fmt: skip
    one, slopes = torch.ones(1, 1, dtype=D), [1.0]
    for i in range(1, levels):
        back = objective.ode_step(one, times[i : i + 1], times[i - 1 : i], Batch(None, one))
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
    t, r = objective.sample_times(torch.zeros(1, 1), 0)
    assert (objective.ratio(r) / objective.ratio(t)).item() == pytest.approx(share, abs=1e-3)


def test_ects_last_stages_neither_overflow_nor_let_the_times_meet():
    objective, x = tuning(256.0), torch.zeros(64, 1)
    t, r = objective.sample_times(x, 10_000)  # where q^stage is beyond any float
    ratio = objective.ratio(r) / objective.ratio(t)
    assert ratio.max().item() == pytest.approx(0.999, abs=2e-4) and (r < t)[t > 0].all()


def test_ects_first_stage_is_plain_diffusion_below_its_threshold(monkeypatch):
    objective = tuning()
    t = objective.teacher.process.time(torch.tensor([1.8, 2.0], dtype=D))
    monkeypatch.setattr(LogNormal, "sample", lambda *_: t)
    _, r = objective.sample_times(torch.zeros(2, 1), 0)
    assert (r[0] == 0) and (r[1] > 0)
    x = torch.randn(2, 1, dtype=D)
    target = objective.boundary(torch.full((2, 1), 9.0, dtype=D), x + 1, r, Batch(x, x))
    torch.testing.assert_close(target, torch.stack([x[0], torch.tensor([9.0], dtype=D)]))
    assert objective.weight(t, r)[0].item() == pytest.approx(1 / 1.8)


def test_ects_stages_halve_the_gap():
    objective = tuning()
    torch.manual_seed(0)
    t0, r0 = objective.sample_times(torch.zeros(1000, 1), 0)
    torch.manual_seed(0)
    t1, r1 = objective.sample_times(torch.zeros(1000, 1), 1)
    far = objective.ratio(t0) > 5
    gaps = (
        (objective.ratio(t0) - objective.ratio(r0))[far],
        (objective.ratio(t1) - objective.ratio(r1))[far],
    )
    torch.testing.assert_close(gaps[1], gaps[0] / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("stage", [0, 3])
def test_distillation_of_one_point_is_tuning_on_it(solver, stage):
    """All paths to one point are straight, so the teacher's step is the line to the data."""
    point = torch.tensor([0.7], dtype=D)
    teacher = Gaussian(point, torch.zeros(1, dtype=D))
    found = []
    for kind, extra in ((Consistency, {"solver": solver}), (ConsistencyTuning, {})):
        network = Affine(torch.ones(1, dtype=D), torch.ones(1, 1, dtype=D))
        objective = kind(
            teacher=teacher, student=Generator(network), stage_steps=1, huber_c=0.1, **extra
        )
        torch.manual_seed(0)
        batch = Batch(point.expand(512, 1), torch.randn(512, 1, dtype=D))
        objective.loss(batch, stage).value.backward()
        found.append(torch.stack([network.m.grad[0], network.r.grad[0, 0]]))
    assert found[0].abs().min() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)  # the path ends at σ_min, not at 0


def test_the_steps_of_distillation_go_along_the_teachers_path_and_not_to_the_data():
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([0.25], dtype=D))
    objective = Consistency(
        teacher=teacher, student=Generator(Slopes(*[torch.ones(1)] * 2, Karras()))
    )
    x_t = torch.tensor([[3.0]], dtype=D)
    t, r = (Karras().time(torch.tensor([v], dtype=D)) for v in (2.0, 1.9))
    batch = Batch(torch.full((1, 1), -99.0, dtype=D), torch.zeros(1, 1, dtype=D))
    back = objective.ode_step(x_t, t, r, batch).item()
    assert back == pytest.approx(3 * ((0.25 + 1.9**2) / (0.25 + 2.0**2)) ** 0.5, abs=1e-4)


def test_hubers_constant_is_what_the_recipe_says():
    teacher, x = Gaussian(torch.zeros(1), torch.ones(1)), torch.full((2, 100), 0.01)
    student = Generator(Affine(torch.zeros(1), torch.ones(1, 1)))
    square = 100 * 0.01**2

    def distance(kind, **keys):
        return (
            kind(teacher=teacher, student=student, **keys)
            .distances(x, torch.zeros_like(x))[0]
            .item()
        )

    for kind in (Consistency, ConsistencyTuning):
        said = distance(kind, huber_c=0.06)
        assert said == pytest.approx((square + 0.06**2) ** 0.5 - 0.06, rel=1e-5)
    c = 0.00054 * 10  # iCT's, for 100 dimensions
    assert distance(Consistency) == pytest.approx((square + c**2) ** 0.5 - c, rel=1e-5)
    assert distance(ConsistencyTuning) == pytest.approx(square**0.5, rel=1e-5)


def test_the_huber_norm_runs_over_the_whole_sample():
    x, y = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    torch.testing.assert_close(huber(x, y, 0.5), torch.full((2,), (6.25**0.5) - 0.5))


def test_the_target_network_follows_only_after_the_turn():
    objective, network, _ = consistency("ddim", 18)
    objective = Consistency(
        teacher=objective.teacher, student=objective.student, pairs="grid", target_ema=0.9
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
    return Progressive(
        teacher=teacher, student=Generator(network), initial_steps=first, stage_steps=1
    )


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
    t, m, r = (v.double() for v in objective.step_times(batch.x))
    process = Trig()
    x_t = process.noise(batch.x, t, batch.noise)
    target, x = objective.target(x_t, t, m, r, None), objective.student.denoiser(x_t, t)
    eps = process.eps(x_t, target, t) - process.eps(x_t, x, t)
    larger = torch.maximum((target - x).square(), eps.square()).mean().item()
    assert value == pytest.approx(larger, rel=1e-4)


def test_grids_that_do_not_halve_to_the_students_are_refused():

    with refused("objective.initial_steps", "3", "1"):
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


# ---- stable consistency tuning


def some_data(n=12, d=3):
    rng = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(n, d, dtype=D, generator=rng) for _ in range(2))
    t = torch.rand(n, dtype=D, generator=rng)
    return x, noise, t


@pytest.mark.parametrize("process", [Karras(), Trig()])
def test_the_mean_of_a_batch_of_all_data_is_the_exact_denoiser(process):
    x, noise, t = some_data()
    x_t = process.noise(x, t, noise)
    exact = Finite(x, process=process)(x_t, t)
    torch.testing.assert_close(posterior_mean(x_t, t, Batch(x, noise), process), exact)


def test_data_of_other_conditions_are_no_references():
    x, noise, t = some_data()
    process, label = Karras(), torch.arange(12) % 3
    x_t = process.noise(x, t, noise)
    whole = posterior_mean(x_t, t, Batch(x, noise, {"class_labels": label}), process)
    for k in range(3):
        rows = label == k
        part = posterior_mean(x_t[rows], t[rows], Batch(x[rows], noise[rows]), process)
        torch.testing.assert_close(whole[rows], part)
    alone = posterior_mean(x_t, t, Batch(x, noise, {"class_labels": torch.arange(12)}), process)
    torch.testing.assert_close(alone, x)  # a batch of one each


def test_stable_tuning_with_one_datum_is_tuning_and_with_all_the_teachers_euler_step():
    x, noise, t = some_data()
    r, process = 0.9 * t, Karras()
    network = Slopes(torch.ones(1, dtype=D), torch.ones(1, dtype=D), process)
    stable, plain = (
        ConsistencyTuning(
            teacher=Finite(x, process=process), student=Generator(network), references=v
        )
        for v in (True, False)
    )
    x_t = process.noise(x, t, noise)
    each = Batch(x, noise, {"class_labels": torch.arange(12)})
    torch.testing.assert_close(stable.ode_step(x_t, t, r, each), plain.ode_step(x_t, t, r, each))
    distilled = Consistency(
        teacher=Finite(x, process=process), student=Generator(network), solver="ddim"
    )
    whole = Batch(x, noise)
    torch.testing.assert_close(
        stable.ode_step(x_t, t, r, whole), distilled.ode_step(x_t, t, r, whole)
    )
    assert (stable.ode_step(x_t, t, r, whole) - plain.ode_step(x_t, t, r, whole)).abs().max() > 0.01
