"""sCM against the paper's formulas, closed forms and finite differences, in float64."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from distill.objectives.base import Batch
from distill.objectives.consistency.scm import ContinuousConsistency, Weighting
from distill.objectives.noise_levels import Uniform
from distill.profiling import denoisers_in, evaluations_of
from students.generator import Generator
from students.schedulers import student
from teachers import load
from teachers.analytic import Gaussian, Mixture
from teachers.denoiser import Denoiser
from teachers.process import Karras, Linear, Tabulated, Trig, expand
from tests.helpers import edm_pickles

D, SIGMA = torch.float64, 0.5
PROCESSES = [Karras(), Linear(), Trig(), Trig(SIGMA), Tabulated.linear()]


class TrigNetwork(Denoiser):
    """x̂ = cos θ x_θ - σ_data sin θ F(x_θ / σ_data, θ) for a small F, on any process."""

    def __init__(self, process, dim=3):
        super().__init__()
        self.process = process
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(dim + 1, 16), nn.Tanh(), nn.Linear(16, dim)).double()

    def f(self, x, angle):
        return self.body(torch.cat([x, angle[:, None]], 1))

    def forward(self, x_t, t, cond=None, s=None):
        alpha, sigma = (expand(v, x_t) for v in self.process.scales(t.double()))
        angle = torch.atan2(sigma / SIGMA, alpha)
        x = x_t / torch.hypot(alpha, sigma / SIGMA)
        return angle.cos() * x - SIGMA * angle.sin() * self.f(x / SIGMA, angle[:, 0])


class Flow(Denoiser):
    """The consistency function of N(0, c²) where k is 1."""

    def __init__(self, process, c):
        super().__init__()
        self.process, self.c = process, c
        self.k = nn.Parameter(torch.ones((), dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        alpha, sigma = (expand(v, x_t) for v in self.process.scales(t.double()))
        return self.c * x_t / torch.hypot(alpha * self.c, self.k * sigma)


def scm(network, teacher=None, **keys):
    keys = {"tangent_warmup": 0, "times": Uniform(0.02, 0.98), "sigma_data": SIGMA, **keys}
    teacher = teacher or Mixture(
        torch.tensor([[1.0, 0.2, -0.5], [-0.4, 0.3, 0.8]], dtype=D), 0.3, process=network.process
    )
    return ContinuousConsistency(
        teacher=teacher, student=Generator(network), weighting=Weighting().double(), **keys
    )


def batch(n=64, dim=3):
    torch.manual_seed(1)
    return Batch(0.6 * torch.randn(n, dim, dtype=D) + 0.1, torch.randn(n, dim, dtype=D))


def gradients(objective, loss):
    network = objective.student.denoiser
    for p in network.parameters():
        p.grad = None
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def algorithm_1(objective, given, step, r):
    """The loss of the paper's Algorithm 1, in TrigFlow alone, at the times of the objective."""
    network, process = objective.student.denoiser, objective.student.denoiser.process
    torch.manual_seed(2)
    t = objective.times.sample(given.data, process).double()
    alpha, sigma = process.scales(t)
    t = torch.atan(sigma / alpha / SIGMA)
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    z = SIGMA * given.noise
    x = cos * given.data + sin * z
    if objective.path == "data":
        dx = cos * z - sin * given.data
    else:  # the teacher's velocity, σ_data F
        x_t = x * torch.hypot(alpha, sigma / SIGMA)[:, None]
        with torch.no_grad():
            denoised = objective.teacher(x_t, process.time(sigma / alpha), given.cond)
        dx = (cos * x - denoised) / sin
    out = network.f(x / SIGMA, t)
    with torch.no_grad():  # already times cos sin
        direction = (cos * sin * dx / SIGMA, (cos * sin)[:, 0])
        slope = torch.func.jvp(network.f, (x / SIGMA, t), direction)[1]
        g = -(cos**2) * (SIGMA * out - dx) - r * (cos * sin * x + SIGMA * slope)
        g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    w = objective.weighting(t)
    return (w.exp() / 3 * (out - out.detach() - g).square().sum(1) - w).mean()


@pytest.mark.parametrize("path", ["teacher", "data"])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_loss_and_gradient_are_those_of_the_papers_algorithm(process, path):
    objective = scm(TrigNetwork(process), path=path, tangent_warmup=9)
    nn.init.normal_(objective.weighting.out.weight, std=0.1)
    given = batch()
    for step, r in ((0, 0.1), (2, 0.3), (9, 1.0), (10**6, 1.0)):
        expected = algorithm_1(objective, given, step, r)
        wanted = gradients(objective, expected)
        torch.manual_seed(2)
        loss = objective.loss(given, step).value
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients(objective, loss), wanted, atol=1e-5, rtol=1e-4)


def test_the_surrogates_gradient_is_that_of_the_continuous_loss():
    """2 / (σ_data tan θ) fᵀ df/dθ, for tangents too small to be clipped."""
    objective = scm(TrigNetwork(Trig(SIGMA)), norm="clip", times=Uniform(0.3, 0.3))
    given = batch(1)
    given = given._replace(x=given.x * 0.1, noise=given.noise * 0.1)
    found = gradients(objective, objective.loss(given, 0).value)
    network, teacher, process = objective.student.denoiser, objective.teacher, Trig(SIGMA)
    t = torch.tensor([0.3], dtype=D)
    x_t = process.noise(given.data, t, given.noise)
    move = process.velocity(x_t, teacher(x_t, t), t)
    slope = torch.func.jvp(network, (x_t, t), (move, torch.ones_like(t)))[1] * 2 / math.pi  # of θ
    angle = math.pi / 2 * 0.3
    assert (slope * math.cos(angle)).abs().max() < 1
    value = 2 / (SIGMA * math.tan(angle)) * (network(x_t, t) * slope.detach()).sum() / 3  # dims
    torch.testing.assert_close(found, gradients(objective, value), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("derivative", ["forward", "difference", "stacked", "discrete"])
@pytest.mark.parametrize("process", PROCESSES[:3], ids=repr)
def test_the_derivative_of_the_optimum_is_zero(process, derivative):
    c = 0.7
    teacher = Gaussian(torch.zeros(3, dtype=D), torch.full((3,), c**2, dtype=D), process)
    exact = derivative == "forward"
    objective = scm(
        Flow(process, c), teacher, derivative=derivative, derivative_step=1e-5, norm="clip"
    )
    given = batch()
    t = torch.linspace(0.05, 0.95, 64, dtype=D)
    x_t = process.noise(given.data, t, given.noise)
    _, slope = objective.differentiated(x_t, t, teacher(x_t, t), given)
    assert slope.abs().max() < (1e-12 if exact else 1e-2)
    loss = objective.loss(given, 0)
    assert loss.value.item() < (1e-12 if exact else 1e-4)  # with w = 0
    assert gradients(objective, loss.value).abs().max() < (1e-6 if exact else 1e-2)
    with torch.no_grad():
        objective.student.denoiser.k -= 0.01  # too large at high noise
    assert gradients(objective, objective.loss(given, 0).value) < -1e-4 or not exact


def test_for_unit_sigma_data_and_a_still_path_the_network_is_the_papers_tangent():
    """N(0, σ_data²): F* = -tan(θ/2) x_θ / σ_data, and the path's velocity is 0."""
    process = Trig(SIGMA)
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.full((1,), SIGMA**2, dtype=D), process)
    x, t = torch.randn(8, 1, dtype=D), torch.linspace(0.1, 0.9, 8, dtype=D)
    assert process.velocity(x, teacher(x, t), t).abs().max() < 1e-12
    angle = (math.pi / 2 * t)[:, None]
    output = (angle.cos() * x - Flow(process, SIGMA)(x, t)) / (SIGMA * angle.sin())
    torch.testing.assert_close(output.detach(), -(angle / 2).tan() * x / SIGMA)


@pytest.mark.parametrize("derivative", ["forward", "difference", "stacked", "discrete"])
def test_every_way_is_the_central_difference_along_the_path(derivative):
    process = Karras()
    objective = scm(TrigNetwork(process), derivative=derivative, derivative_step=1e-5)
    network, given = objective.student.denoiser, batch()
    t = torch.linspace(0.1, 0.9, 64, dtype=D)
    x_t = process.noise(given.data, t, given.noise)
    end = objective.teacher(x_t, t)
    value, slope = objective.differentiated(x_t, t, end, given)
    angle, h = objective.angle(t), 1e-6

    def at(shift):  # a small step of DDIM is one along the path, up to h²
        r = process.time((angle + shift).tan() * SIGMA)
        return network(process.step(x_t, end, t, r), r)

    with torch.no_grad():
        torch.testing.assert_close(value, network(x_t, t))
        wanted = (at(h) - at(-h)) / (2 * h) * angle.cos()[:, None]
    close = 1e-6 if derivative == "forward" else 2e-3
    torch.testing.assert_close(slope, wanted, atol=close, rtol=close)
    assert value.requires_grad and not slope.requires_grad


def test_a_stacked_pair_of_batches_has_the_conditions_of_both():
    """Each half of the double batch is asked for its own labels."""
    teacher = load("digits")
    network = student(teacher, 1).denoiser
    x_t, labels = torch.randn(3, *teacher.shape), teacher.codec.condition([1, 2, 3])
    given, t = Batch(torch.zeros_like(x_t), x_t, labels), torch.tensor([0.3, 0.5, 0.7])
    found = [
        scm(network, teacher.denoiser, derivative=how).differentiated(x_t, t, x_t, given)
        for how in ("difference", "stacked")
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def test_the_discrete_form_is_the_difference_over_the_sine_of_the_gap():
    objective = scm(TrigNetwork(Karras()), derivative="discrete", derivative_step=0.1)
    network, given, process = objective.student.denoiser, batch(), Karras()
    t = torch.linspace(0.4, 0.9, 64, dtype=D)
    x_t = process.noise(given.data, t, given.noise)
    end = objective.teacher(x_t, t)
    _, slope = objective.differentiated(x_t, t, end, given)
    theta = torch.atan(process.scales(t)[1] / SIGMA)
    r = process.time((theta - 0.1).tan() * SIGMA)
    alpha, beta = torch.cos(theta)[:, None], torch.sin(theta)[:, None]
    x_trig = x_t * alpha
    teacher_f = (alpha * x_trig - end) / (SIGMA * beta)
    x_before = math.cos(0.1) * x_trig - math.sin(0.1) * SIGMA * teacher_f  # DDIM in TrigFlow
    before = network(x_before / (theta - 0.1).cos()[:, None], r)
    wanted = theta.cos()[:, None] * (network(x_t, t) - before) / math.sin(0.1)
    torch.testing.assert_close(slope, wanted.detach(), atol=1e-8, rtol=1e-8)


def test_before_the_warmup_the_student_is_pulled_to_the_teachers_estimate():
    objective = scm(TrigNetwork(Karras()), tangent_warmup=10**9)
    x, end = torch.randn(2, 4, 3, dtype=D)
    sin, cos = (torch.full((4, 1), v, dtype=D) for v in (0.6, 0.8))
    g = objective.direction(x, torch.full_like(x, 9e3), end, sin, cos, 0)
    torch.testing.assert_close(g, 0.64 / 0.6 * (x - end), atol=1e-4, rtol=1e-4)
    objective.tangent_share, objective.tangent_warmup = 0.9, 0
    g = objective.direction(x, torch.ones_like(x), end, sin, cos, 5)
    torch.testing.assert_close(g, 0.9 + 0.1 * 0.64 / 0.6 * (x - end))


def test_tangents_are_normalised_by_the_whole_samples_norm():
    g = torch.tensor([[3.0, 4.0, 0.0, 0.0]], dtype=D)
    whole = scm(TrigNetwork(Karras())).normalised(g)
    torch.testing.assert_close(whole, g / 5.1)
    rms = scm(TrigNetwork(Karras()), norm="rms").normalised(g)
    torch.testing.assert_close(rms, g / 2.6)
    assert scm(TrigNetwork(Karras()), norm="clip").normalised(g).max() == 1


def test_the_weighting_learns_the_size_of_the_tangent():
    objective = scm(TrigNetwork(Karras()), times=Uniform(0.5, 0.5))
    given = batch(1)
    torch.manual_seed(0)
    square = objective.loss(given, 0).value.item()  # |g|²/d, as w = 0
    with torch.no_grad():
        objective.weighting.out.bias.fill_(-math.log(square))
    loss = objective.loss(given, 0).value
    loss.backward()
    assert loss.item() == pytest.approx(1 + math.log(square))
    assert abs(objective.weighting.out.bias.grad.item()) < 1e-9


@pytest.mark.parametrize(("path", "evaluations"), [("teacher", (8, 16)), ("data", (0, 16))])
def test_a_step_evaluates_the_students_network_once_with_its_derivative(path, evaluations):
    teacher = load("digits")
    generator = student(teacher, 1)
    objective = ContinuousConsistency(
        teacher=teacher.denoiser, student=generator, weighting=Weighting(), path=path,
        tangent_warmup=0,
    )  # fmt: skip
    calls = []
    generator.denoiser.register_forward_hook(lambda *_: calls.append(1))
    given = Batch(
        torch.zeros(8, 1, 8, 8), torch.randn(8, 1, 8, 8), teacher.codec.condition([1] * 8)
    )
    generator.requires_grad_(True)
    with evaluations_of(
        denoisers_in({"teacher": teacher.denoiser, "student": generator})
    ) as counts:
        loss = objective.loss(given, 0)
        loss.value.backward()
    assert (counts["teacher"], counts["student"]) == evaluations and len(calls) == 1
    assert loss.samples is not None and loss.samples.requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


@pytest.fixture(scope="module")
def edm2_network():
    """A small EDM2 student in float64, whose gains are not 0."""
    known, _ = edm_pickles.golden()
    with TemporaryDirectory() as folder:
        teacher = load(str(edm_pickles.save(known["edm2-pixels"], Path(folder) / "edm2.pkl")))
    return student(teacher).denoiser.double().requires_grad_(True), teacher.shape


def test_through_edm2s_network_the_derivative_is_the_central_difference(edm2_network):
    network, shape = edm2_network
    objective = scm(network, teacher=network)
    torch.manual_seed(0)
    given = Batch(0.5 * torch.randn(3, *shape, dtype=D), torch.randn(3, *shape, dtype=D))
    process, t = network.process, torch.tensor([0.3, 0.6, 0.9], dtype=D)
    x_t = process.noise(given.data, t, given.noise)
    value, slope = objective.differentiated(x_t, t, given.data, given)
    angle, h = objective.angle(t), 1e-6

    def at(shift):
        r = process.time((angle + shift).tan() * SIGMA)
        return network(process.step(x_t, given.data, t, r), r)

    with torch.no_grad():
        torch.testing.assert_close(value, network(x_t, t))
        wanted = (at(h) - at(-h)) / (2 * h) * expand(angle.cos(), x_t)
    assert wanted.flatten(1).norm(dim=1).min() > 0.1
    torch.testing.assert_close(slope, wanted, atol=1e-6, rtol=1e-6)


def test_edm2s_weights_move_across_themselves(edm2_network):
    """Only their directions matter, so they need not be normalised again to keep Adam's rate."""
    network, shape = edm2_network
    given = Batch(0.5 * torch.randn(3, *shape, dtype=D), torch.randn(3, *shape, dtype=D))
    objective = scm(network, teacher=network)
    gradients(objective, objective.loss(given, 0).value)
    seen = 0
    for p in network.parameters():
        if p.ndim > 1:
            assert p.grad is not None
            along = (p.grad * p.detach()).flatten(1).sum(1)
            length = p.grad.flatten(1).norm(dim=1) * p.detach().flatten(1).norm(dim=1)
            assert (along.abs() <= 1e-3 * length + 1e-12).all()  # its 1e-4 beside the norm
            seen += int((length > 1e-8).any())
    assert seen > 10
