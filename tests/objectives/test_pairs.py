"""Reflow and KD against closed forms: exact couplings, densities of times, and each other."""

import math

import pytest
import torch

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.objectives.pairs import regression
from distill.objectives.pairs.kd import KD
from distill.objectives.pairs.reflow import Reflow, high_passed
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.denoiser import Denoiser
from teachers.process import Karras, Linear, Tabulated, Trig
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Slopes

D = torch.float64
MEAN, C = torch.tensor([1.0, -2.0, 0.5], dtype=D), 0.5  # data N(m, c²)
PROCESSES = [Linear(), Linear(3.0), Karras(), Trig(0.7), Tabulated.scaled_linear()]


class Coupled(Denoiser):
    """x̂ of the exact coupling x = m + c ε: on the line, u = (1 - c) ε̂ - m and x̂ = m + c ε̂."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.slope = torch.nn.Parameter(torch.tensor(C, dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        alpha, sigma = self.process.at(t, x_t)
        eps = (x_t - alpha * MEAN) / (sigma + alpha * C)
        return MEAN + self.slope * eps


def pairs(n=64, m=MEAN, c=C):
    z = torch.randn(n, len(m), dtype=D)
    return Batch(m + c * z, z)


def objective(kind, network=None, process=None, **keys):
    process = process or Linear()
    student = Generator(network or Coupled(process), renoise=False)
    return kind(
        teacher=Gaussian(MEAN, torch.full((3,), C**2, dtype=D), process), student=student, **keys
    )


# ---- the closed-form optimum


REFLOWS = [{}, {"times": "u-shaped", "form": "2-rf++"}, {"times": "exponential"}]
ENDS = [{"distil_from": 0}, {"distil_from": 0, "distance": "square"}]  # from noise without data
CASES = [(k, p) for k in REFLOWS for p in PROCESSES]
CASES += [(k, p) for k in ENDS for p in PROCESSES if p.scales(torch.ones(()))[0].abs() < 1e-6]


@pytest.mark.parametrize(("keys", "process"), CASES, ids=str)
def test_on_the_exact_coupling_the_flow_map_has_no_loss(keys, process):
    made = objective(Reflow, process=process, **keys)
    next(made.turns(0))
    assert made.loss(pairs(), 0).value.item() < 1e-12


def test_the_velocity_of_the_coupling_is_the_published_one():
    z = torch.randn(5, 3, dtype=D)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0], dtype=D)[:, None]
    x = (1 - t) * (MEAN + C * z) + t * z
    eps = (x - (1 - t) * MEAN) / (t + (1 - t) * C)
    u = (1 - C) * eps - MEAN
    torch.testing.assert_close(u, z - (MEAN + C * z))  # constant on the path
    guess = Coupled(Linear())(x, t[:, 0])
    torch.testing.assert_close((x - guess) / t, u)


def test_the_loss_is_the_error_of_the_velocity_on_any_process():
    """Of x̂ = 0 the velocity's error is x / t, t = σ / (α + σ)."""
    for process in PROCESSES:
        torch.manual_seed(1)
        zero = Slopes(torch.tensor([0.0], dtype=D), torch.zeros(1, dtype=D), process)
        made, batch = objective(Reflow, zero, process), pairs(7)
        torch.manual_seed(2)
        loss = made.reflow_loss(batch, 0).value
        torch.manual_seed(2)
        t, flow = made.sample_times(batch.data)
        alpha, sigma = process.scales(t.double())
        torch.testing.assert_close(flow, (sigma / (alpha + sigma)).to(flow.dtype))
        expected = (batch.data / flow[:, None]).square().mean(1).mean()
        torch.testing.assert_close(loss, expected)


def test_a_teachers_denoiser_is_not_straight_and_the_loss_says_so():
    made = objective(Reflow, Gaussian(MEAN, torch.full((3,), C**2, dtype=D), Linear()))
    straight = objective(Reflow)
    torch.manual_seed(0)
    curved = made.reflow_loss(pairs(512), 0).logs["velocity_error"]
    assert curved > 0.1
    assert straight.reflow_loss(pairs(512), 0).logs["velocity_error"] < 1e-12


def test_after_reflow_one_euler_step_is_as_good_as_many():
    network, z = Coupled(Linear()), torch.randn(9, 3, dtype=D)
    x_t = z
    times = torch.linspace(1, 0, 8, dtype=D)
    for t, s in zip(times[:-1], times[1:], strict=True):
        rows = t.expand(9), s.expand(9)
        x_t = Linear().step(x_t, network(x_t, rows[0]), *rows)
    torch.testing.assert_close(x_t, network(z, torch.ones(9, dtype=D)))
    torch.testing.assert_close(x_t, MEAN + C * z)


def test_reflow_descends_to_the_coupling():
    """Gradients of the slope vanish at c, and point to it from both sides."""
    for slope, sign in ((C, 0), (C + 0.1, 1), (C - 0.1, -1)):
        network = Coupled(Linear())
        with torch.no_grad():
            network.slope.fill_(slope)
        objective(Reflow, network).reflow_loss(pairs(), 0).value.backward()
        grad = network.slope.grad.item()
        assert grad == pytest.approx(0, abs=1e-9) if sign == 0 else grad * sign > 0


# ---- times


DENSITIES = {
    "uniform": lambda t: torch.ones_like(t),
    "u-shaped": lambda t: torch.cosh(4 * (t - 0.5)),
    "exponential": lambda t: 10**t,
}


@pytest.mark.parametrize("times", DENSITIES)
def test_times_have_their_density(times):
    drawn = objective(Reflow, times=times).flow_times(torch.zeros(400_000, 1))
    middle = (torch.arange(20) + 0.5) / 20
    density = DENSITIES[times](middle)
    share = torch.histc(drawn.float(), 20, 0, 1) / len(drawn)
    torch.testing.assert_close(share, (density / density.sum()).float(), atol=2e-3, rtol=0)


# ---- 2-RF++, Simple ReFlow, SlimFlow


def test_2rfpp_is_a_huber_distance_of_the_velocity_and_the_ends_error_over_t(monkeypatch):
    zero = Slopes(torch.tensor([0.0], dtype=D), torch.zeros(1, dtype=D), Linear())
    made, batch = objective(Reflow, zero, form="2-rf++", distance="square"), pairs(4)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=D)
    monkeypatch.setattr(made, "sample_times", lambda x: (t, t))
    norm = (batch.data / t[:, None]).square().sum(1)
    c, d = 0.00054 * 3, 3
    expected = (1 - t) * ((norm + c**2).sqrt() - c) / d + batch.data.square().mean(1) / t
    torch.testing.assert_close(made.reflow_loss(batch, 0).value, expected.mean())


def test_a_normalised_loss_is_one_and_keeps_each_samples_direction():
    grads = []
    for normalise in (False, True):
        network = Affine(torch.zeros(3, dtype=D), torch.eye(3, dtype=D), Linear())
        made = objective(Reflow, network, normalise=normalise)
        torch.manual_seed(3)
        loss = made.reflow_loss(pairs(1), 0)
        loss.value.backward()
        grads.append((network.m.grad, loss))
    (plain, loss), (scaled, ones) = grads
    assert ones.value.item() == pytest.approx(1)
    torch.testing.assert_close(scaled, plain / loss.value.detach())
    torch.testing.assert_close(ones.logs["velocity_error"], loss.value.detach())  # the raw loss


def test_the_high_pass_part_is_what_a_blur_takes_away():
    flat = torch.full((1, 2, 5, 5), 3.0, dtype=D)
    torch.testing.assert_close(high_passed(flat), torch.zeros_like(flat))
    dot = torch.zeros(1, 1, 5, 5, dtype=D)
    dot[..., 2, 2] = 9.0
    assert high_passed(dot)[0, 0, 2, 2] == 8 and high_passed(dot)[0, 0, 1, 1] == -1
    with refused("objective.high_pass"):
        objective(
            Reflow, Slopes(torch.zeros(1), torch.zeros(1), Linear()), high_pass=1.0
        ).reflow_loss(pairs(2), 0)


def test_high_pass_raises_the_weight_of_detail_alone():
    zero = Slopes(torch.tensor([0.0]), torch.zeros(1), Linear())
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2).view(1, 1, 4, 4)
    values = {}
    for name, x in (("flat", torch.ones(1, 1, 4, 4)), ("checks", checks)):
        for weight in (0.0, 1.0):
            torch.manual_seed(4)
            made = objective(Reflow, zero, high_pass=weight)
            values[name, weight] = made.reflow_loss(Batch(x, torch.zeros_like(x)), 0).value
    torch.testing.assert_close(values["flat", 1.0], values["flat", 0.0])
    assert values["checks", 1.0] > 2 * values["checks", 0.0]


def test_annealed_noise_is_independent_at_first_and_the_stored_noise_at_last():
    made = objective(Reflow, beta=1.0, anneal_steps=100)
    z = torch.randn(200_000, 1, dtype=D)
    for step, share in ((0, 1.0), (25, 0.75), (50, 0.5), (99, 0.01), (100, 0.0), (500, 0.0)):
        assert made.share(step) == pytest.approx(share)
        mixed = made.mixed(z, step)
        assert mixed.var().item() == pytest.approx(1, abs=0.01)
        correlation = (mixed * z).mean().item()
        assert correlation == pytest.approx(math.sqrt(1 - share**2), abs=0.01)
    assert made.mixed(z, 100) is z
    assert objective(Reflow, beta=1.0).share(10**6) == 1.0  # 1-RF


def test_beta_one_is_the_loss_of_an_independent_coupling():
    """1-RF on a Gaussian: its minimiser is the denoiser, of loss E|x - x̂|² / t²."""
    var = C**2
    made = objective(Reflow, Gaussian(MEAN, torch.full((3,), var, dtype=D), Linear()), beta=1.0)
    torch.manual_seed(0)
    batch = pairs(200_000)
    loss = made.reflow_loss(batch, 0).value.item()
    t = (torch.arange(20_000, dtype=D) + 0.5) / 20_000
    floor = (var / ((1 - t) ** 2 * var + t**2)).mean().item()  # posterior variance over t²
    assert loss == pytest.approx(floor, rel=0.01)


# ---- KD


@pytest.mark.parametrize("distance", ["square", "huber"])
def test_kds_optimum_is_the_flow_map(distance):
    network = Affine(MEAN, C * torch.eye(3, dtype=D), Linear())
    loss = objective(KD, network, distance=distance).loss(pairs(), 0)
    assert loss.value.item() < 1e-12
    with torch.no_grad():
        network.m.zero_()  # the mean over noise would be m, with a loss
    assert objective(KD, network, distance=distance).loss(pairs(), 0).value.item() > 0.1


def test_kds_distances_are_of_whole_samples():
    x, y = torch.randn(4, 3, 2, 2, dtype=D), torch.randn(4, 3, 2, 2, dtype=D)
    norm, d = (x - y).flatten(1).norm(dim=1), 12
    c = 0.00054 * math.sqrt(d)
    torch.testing.assert_close(
        regression.distances(x, y, "huber"), ((norm**2 + c**2).sqrt() - c) / d
    )
    torch.testing.assert_close(regression.distances(x, y, "square"), norm**2 / d)
    torch.testing.assert_close(regression.distances(x, y, "huber", 0.0), norm / d)


def test_lpips_has_gradients_sees_small_images_enlarged_and_refuses_others(monkeypatch):
    seen = []

    def network(a, b):
        seen.append(a.shape)
        return (a - b).square().flatten(1).mean(1)[:, None, None, None]

    monkeypatch.setattr(regression, "_network", lambda place: network)
    x, y = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    value = regression.distances(x, y, "lpips")
    assert value.shape == (2,) and seen == [(2, 3, 224, 224)]
    value.sum().backward()
    assert x.grad.abs().sum() > 0
    with refused("objective.distance", "1×8×8", "huber"):
        regression.distances(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), "lpips")


def test_states_of_a_chain_begin_at_noise_and_lie_on_the_line():
    process = Karras()
    student = Generator(Coupled(process), (1.0, 0.5), renoise=False, start=80.1)
    made, batch = objective(KD), pairs(6)
    made.student = student.keep(2)
    x_t, t = made.chain_states(batch)
    assert sorted(t.tolist()) == [0.5] * 3 + [1.0] * 3
    first = t == 1
    torch.testing.assert_close(x_t[first], 80.1 * batch.noise[first])
    sigma = process.scales(torch.tensor(0.5, dtype=D))[1]
    torch.testing.assert_close(x_t[~first], (batch.data + sigma * batch.noise)[~first])


def test_students_that_renoise_cannot_learn_pairs_in_several_steps():
    student = Generator(Coupled(Linear()), (1.0, 0.5))
    with refused("student.renoise", "follow the ODE"):
        KD(teacher=Coupled(Linear()), student=student)
    KD(teacher=Coupled(Linear()), student=student.at(1))


def test_the_distillation_begins_at_its_step_and_resets_once():
    made = objective(Reflow, distil_from=3)
    resets = [next(made.turns(step)).reset for step in range(6)]
    assert resets == [False, False, False, True, False, False]
    again = objective(Reflow, distil_from=3)
    again.load_state_dict(made.state_dict())
    assert not next(again.turns(6)).reset
    torch.manual_seed(0)
    batch = pairs(8, MEAN + 1)  # other pairs than the student knows
    kd = objective(KD).loss(batch, 0).value
    torch.testing.assert_close(next(made.turns(6)).loss(batch).value, kd)


@pytest.mark.parametrize("name", ["digits/kd", "digits/reflow", "digits/simple-reflow"])
def test_recipes_spend_the_budget_with_their_pairs(name):
    recipe = Recipe.load(name)
    data, per = recipe.data, {"dpmpp_2m": 1}[recipe.data.solver]
    spent = data.count * data.steps * per + (data.inverted or 0) * 2 * (data.steps - 1)
    spent += recipe.train.steps * recipe.train.batch
    assert 179_900 <= spent <= 180_000


def test_data_that_a_loss_does_not_compare_are_refused_before_training():
    """Distillation may begin after thousands of steps."""
    with refused("objective.distance", "1×8×8"):
        objective(Reflow, distance="lpips", distil_from=1000).check_batch((4, 1, 8, 8))
    with refused("objective.high_pass"):
        objective(Reflow, high_pass=1.0).check_batch((4, 3))


def test_the_last_stage_of_reflow_is_distillation_if_there_is_one():
    assert objective(Reflow).last_stage == 0
    assert objective(Reflow, distil_from=7).last_stage == 7


# ---- students of several steps that learn from their own steps


@pytest.mark.parametrize("process", [Linear(), Linear(3.0), Trig(0.7)], ids=str)
def test_own_steps_have_no_loss_at_the_flow_map(process):
    made = objective(KD, process=process, states="own", distance="square")
    made.student = Generator(Coupled(process), (1.0, 0.4), renoise=False).keep(2)
    assert made.loss(pairs(), 0).value.item() < 1e-12


def test_later_steps_learn_from_where_the_student_itself_has_come():
    """A student x̂ = k ε̂ with k wrong: its second step starts from its own first x̂."""
    network = Coupled(Linear())
    network.slope.data.fill_(0.2)
    made = objective(KD, network, states="own", distance="square")
    made.student = Generator(network, (1.0, 0.4), renoise=False).keep(2)
    batch = pairs()
    x = made.loss(batch, 0).samples
    first = network(batch.noise, torch.ones(64, dtype=D))
    then = network(0.6 * first + 0.4 * batch.noise, torch.full((64,), 0.4, dtype=D))
    at_end = (x - then).abs().amax(1) < 1e-9
    assert at_end.sum() == 32  # half the batch ends at each step
    torch.testing.assert_close(x[~at_end], first[~at_end])
    on_line = network(0.6 * batch.data + 0.4 * batch.noise, torch.full((64,), 0.4, dtype=D))
    assert (then - on_line).abs().max() > 1e-3  # the stored sample's state is another
