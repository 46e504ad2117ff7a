"""DSNO: its network against the teacher's, Fourier layers in closed form, loss and pairs."""

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.pairs.making import Maker
from distill.pairs.settings import PairSettings, settings_of
from distill.pairs.source import Pairs
from distill.planning import forecast
from distill.training.networks import build_networks, check_form, form_for
from students.architecture.dsno import DSNO, Mixed, dsno
from students.lora import network_of
from teachers import load
from teachers.analytic import Gaussian
from teachers.denoiser import PREDICTIONS
from teachers.process import Karras, Linear, Trig
from teachers.solver import heun_step, quadratic_times, solve_through
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

D = torch.float64
NETWORK = "student.architecture.network"


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def noise_of(n=3, shape=(1, 8, 8)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))


def recipe_of(tmp_path, **data):
    tree = recipe_tree("dsno", tmp_path / "digits")
    tree["teacher"] = {"source": "digits"}
    return Recipe.check({**tree, "data": {**tree["data"], **data}})


# ---- the network


def test_without_its_fourier_layers_it_is_a_call_of_the_teacher_for_each_time(digits):
    network = dsno(digits)
    teacher = network_of(digits.denoiser)
    cond = {"class_labels": torch.tensor([3, 1, 10])}
    process = teacher.process
    x_t = process.at(torch.ones(3), noise_of())[1] * noise_of()
    outputs = network.backbone.outputs(x_t, torch.ones(3), cond)
    sigma = 80.0
    for k, time in enumerate([0.5625, 0.25, 0.0625, 0.0]):
        told = teacher.time(torch.full((3,), time))
        out = teacher.backbone(x_t / (sigma**2 + 0.25) ** 0.5, told, **cond).sample
        wanted = 0.25 / (sigma**2 + 0.25) * x_t + sigma * 0.5 / (sigma**2 + 0.25) ** 0.5 * out
        torch.testing.assert_close(outputs[:, k], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(x_t, torch.ones(3), cond), outputs[:, -1])
    alone = network.backbone.outputs(x_t[1:2], torch.ones(1), {"class_labels": torch.tensor([1])})
    torch.testing.assert_close(alone[0], outputs[1])
    layers = [n for n, m in network.backbone.named_modules() if isinstance(m, Mixed)]
    assert len(layers) == 2 + 1 + 4  # a layer of each down stage, the middle's, two of each up


def filled(values, modes=2):
    """A Fourier layer around the identity, whose weight is the same matrix for every frequency."""
    made = Mixed(nn.Identity(), 2, 4, modes)
    with torch.no_grad():
        made.weight[..., 0] = torch.tensor(values)
    return made


def over_time(*values):
    """Two channels of one pixel, of one sample at four times: (4, 2, 1, 1)."""
    return torch.tensor(values).view(4, 1, 1, 1).expand(4, 2, 1, 1).contiguous()


def test_two_of_four_frequencies_keep_constants_and_lose_the_fastest():
    layer, eye = filled([[1.0, 0.0], [0.0, 1.0]]), over_time(3.0, 3.0, 3.0, 3.0)
    torch.testing.assert_close(layer(eye), 2 * eye)
    fast = over_time(1.0, -1.0, 1.0, -1.0)
    torch.testing.assert_close(layer(fast), fast)  # nothing is added
    slow = over_time(1.0, 0.0, -1.0, 0.0)
    wanted = over_time(1.0, 0.0, -0.01, 0.0)  # LeakyReLU of what is below 0
    torch.testing.assert_close(layer(slow), slow + wanted)
    torch.testing.assert_close(filled([[1.0, 0.0], [0.0, 1.0]], 3)(fast + 1), 2 * (fast + 1))


def test_a_linear_layer_is_a_product_for_each_frequency():
    """By the sums that define the transform, with a complex weight for each frequency."""
    draw = torch.Generator().manual_seed(0)
    layer = Mixed(nn.Identity(), 2, 4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 2, 2, 2, generator=draw))
    w = torch.view_as_complex(layer.weight.detach())
    x = torch.randn(4, 2, 1, 1, generator=draw)
    added = torch.zeros(4, 2)
    for k in range(2):
        turn = torch.exp(-2j * torch.pi * k * torch.arange(4) / 4)
        part = (turn[:, None] * x[..., 0, 0]).sum(0) @ w[k]
        back = (turn.conj()[:, None] * part).real
        added += (1 if k == 0 else 2) * back / 4
    wanted = x + nn.functional.leaky_relu(added)[..., None, None]
    torch.testing.assert_close(layer(x), wanted)


def test_samples_of_a_batch_are_not_mixed():
    layer = filled([[0.3, -0.2], [0.1, 0.4]])
    x = noise_of(8, (2, 1, 1))
    torch.testing.assert_close(layer(x)[4:], layer(x[4:]))


def test_teachers_of_other_kinds_are_refused(digits):
    with refused(NETWORK):
        dsno(load("shapes"))
    network = network_of(digits.denoiser)
    before = network.coefficients
    network.coefficients = PREDICTIONS["eps"]
    try:
        with refused(NETWORK):
            dsno(digits)
    finally:
        network.coefficients = before


# ---- states


@pytest.mark.parametrize("process", [Linear(), Karras()], ids=str)
@pytest.mark.parametrize("method", ["heun", "ddim", "dpmpp_2m"])
def test_states_are_those_of_the_ode_at_quadratic_times(process, method):
    """Of N(m, c²), the ODE keeps (x_t - α m) / √(α² c² + σ²)."""
    mean, c = torch.tensor([1.0, -2.0], dtype=D), 0.5
    gaussian = Gaussian(mean, torch.full((2,), c**2, dtype=D), process)
    z = noise_of(5, (2,)).double()
    x, path = solve_through(gaussian, z, 200, method, None, 4)
    assert path.shape == (5, 4, 2) and torch.equal(path[:, -1], x)

    def kept(x_t, t):
        alpha, sigma = process.scales(torch.tensor(t, dtype=D))
        return (x_t - alpha * mean) / torch.hypot(alpha * c, sigma)

    start = process.at(torch.ones(5, dtype=D), z)[1] * z
    for k, t in enumerate([0.5625, 0.25, 0.0625]):
        torch.testing.assert_close(kept(path[:, k], t), kept(start, 1.0), atol=0.05, rtol=0.02)
    assert not gaussian._forward_pre_hooks


def test_of_heuns_two_calls_at_a_time_the_state_is_the_second():
    gaussian = Gaussian(torch.ones(2, dtype=D), torch.full((2,), 0.25, dtype=D), Linear())
    z = noise_of(5, (2,)).double()
    _, path = solve_through(gaussian, z, 2, "heun", None, 4)
    times = [torch.full((5,), t, dtype=D) for t in (1.0, 0.5625, 0.5, 0.25, 0.0625)]
    x_t = Linear().step(z, gaussian(z, times[0]), times[0], times[1])
    torch.testing.assert_close(path[:, 0], x_t)
    for t, s in zip(times[1:3], times[2:4], strict=True):
        x_t = heun_step(gaussian, x_t, t, s)
    torch.testing.assert_close(path[:, 1], x_t)
    torch.testing.assert_close(path[:, 2], heun_step(gaussian, x_t, times[3], times[4]))


def test_times_are_quadratic():
    assert quadratic_times(4) == [0.5625, 0.25, 0.0625, 0.0] and quadratic_times(1) == [0.0]


def test_pairs_store_states_and_others_stay_as_they_were(tmp_path, digits):
    recipe = recipe_of(tmp_path, path=str(tmp_path / "pairs"))
    settings = settings_of(recipe)
    assert settings.states == 4
    source = Pairs(recipe, digits).source()
    batch = source.batch(0, 0, 1, 8)
    assert batch.path.shape == (8, 4, 1, 8, 8)
    torch.testing.assert_close(batch.path[:, -1], batch.x)
    assert not torch.equal(batch.path[:, 0], batch.path[:, 1])
    again = Pairs(recipe, digits).source().batch(0, 0, 1, 8)  # read, and not made
    assert torch.equal(again.path, batch.path)
    stored = recipe_of(tmp_path, path=str(tmp_path / "pairs"), in_memory_gb=0.0)
    assert torch.equal(Pairs(stored, digits).source().batch(0, 0, 1, 8).path, batch.path)
    plain = Maker(PairSettings(settings.teacher, 16, steps=2), digits).make(range(4))[0]
    assert "path" not in plain


# ---- the loss


class Fixed(nn.Module):
    """Outputs that are the noise times 1, 2, 3, …"""

    def __init__(self, states):
        super().__init__()
        self.factors = nn.Parameter(torch.arange(1.0, states + 1))

    def outputs(self, x_t, t, cond):
        return x_t[:, None] * self.factors.view(1, -1, *[1] * (x_t.ndim - 1))

    def forward(self, x_t, t, cond):
        return self.outputs(x_t, t, cond)[:, -1]


@pytest.mark.parametrize("process", [Linear(), Trig(0.7)], ids=str)
def test_the_loss_is_a_weighted_mean_over_the_times(process, digits, tmp_path):
    from students.generator import Generator
    from teachers import Network

    kind = recipe_of(tmp_path).kind
    student = Generator(Network(Fixed(4), process, "x"), renoise=False)
    made = kind(teacher=digits.denoiser, student=student)
    z, path = noise_of(6, (2,)), noise_of(6, (4, 2))
    loss = made.loss(Batch(path[:, -1], z, path=path), 0)
    start = process.at(torch.ones(6), z)[1] * z
    total = 0.0
    for k, t in enumerate([0.5625, 0.25, 0.0625, 0.0]):
        alpha, sigma = (v.item() for v in process.scales(torch.tensor(t, dtype=D)))
        weight = min(max(alpha / sigma if sigma else 1e9, 1.0), 1e4)
        target = path[:, k] / (alpha**2 + sigma**2) ** 0.5
        total += weight * ((k + 1) * start - target).abs().mean() / 4
    torch.testing.assert_close(loss.value, total)
    torch.testing.assert_close(loss.samples, 4 * start)
    with refused("data.states"):
        made.loss(Batch(path[:, -1], z, path=path[:, :3]), 0)


def test_a_student_of_one_output_is_refused(digits, tmp_path):
    student = build_networks(
        Recipe.check({**recipe_tree("kd", tmp_path), "teacher": {"source": "digits"}}), digits
    )["student"]
    with refused(NETWORK):
        recipe_of(tmp_path).kind(teacher=digits.denoiser, student=student)


# ---- recipes


def test_a_plan_counts_all_times(tmp_path, digits):
    plan = forecast.plan(recipe_of(tmp_path))
    assert 3.9 < plan.smaller[1] < 4.3
    count = sum(p.numel() for p in dsno(digits).backbone.parameters())
    assert plan.smaller[0] == count > 652_449


def test_it_leaves_as_a_folder_that_samples_alike_in_another_process(tmp_path, digits):
    recipe = recipe_of(tmp_path)
    form = form_for(recipe, digits)
    check_form(recipe, form)
    student = build_networks(recipe, digits)["student"]
    assert isinstance(network_of(student.denoiser).backbone, DSNO)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    student.eval().requires_grad_(False)
    form.rehearsal(torch.device("cpu"))(student)
    form.export(student, tmp_path / "student", {})  # it compares in another process


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"data": {"states": 3}}, "data.states"),
        ({"data": {"states": None}}, "data.states"),
        ({"student": {"renoise": False}}, "student.architecture"),
        ({"data": {"source": "digits", "states": 4}}, "data.source"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(change, key, tmp_path):
    tree = recipe_tree("dsno", tmp_path)
    if "data" in change and "source" not in change["data"]:
        change = {"data": {**tree["data"], **change["data"]}}
    with refused(f"*{key}"):
        Recipe.check({**tree, **change})


def test_inverted_pairs_have_no_states(tmp_path, digits):
    with refused("data.states"):
        settings_of(recipe_of(tmp_path, inverted=4, images="digits")).check(digits)
