"""CTM against exact flow maps: soft consistency, its gradients, its two other terms."""

import random

import pytest
import torch

from distill.config.recipe import Recipe
from distill.objectives.balance import balance, last_layer
from distill.objectives.base import Batch
from distill.objectives.flow_maps import ctm
from distill.objectives.flow_maps.ctm import CTM
from distill.objectives.noise_levels import Uniform
from distill.training import networks
from students import schedulers
from students.generator import Generator
from students.lora import unwrap
from students.two_time import two_time
from teachers import load
from teachers.process import Karras, Linear, Trig
from tests.helpers.flow_maps import MAPS, D, Shifted
from tests.helpers.refusals import refused

N = 12


def made(process=None, name="mixture", shift=0.0, **keys):
    exact = MAPS[name](process or Karras())
    keys = {"distance": "square", "denoising_weight": 0.0, "solver_steps": 3, **keys}
    return CTM(teacher=exact.denoiser, student=Generator(Shifted(exact, shift)), **keys)


def data(n=N):
    rng = torch.Generator().manual_seed(2)
    x = torch.where(torch.rand(n, 1, generator=rng) < 0.3, -1.0, 0.8)
    x, noise = x + 0.2 * torch.randn(n, 1, generator=rng), torch.randn(n, 1, generator=rng)
    return Batch(x.to(D), noise.to(D))


@pytest.fixture
def exact_solver(monkeypatch):
    """The teacher's steps solve its ODE exactly."""

    def step(denoiser, x_t, t, s, cond=None):
        name = "mixture" if hasattr(denoiser, "means") else "gaussian"
        return MAPS[name](denoiser.process).flow(x_t, t.to(D), s.to(D))

    monkeypatch.setattr(ctm, "heun_step", step)


@pytest.mark.parametrize("process", [Karras(), Linear(), Trig(0.5)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_an_exact_flow_map_has_no_distance(process, name, exact_solver):
    objective = made(process, name)
    for seed in range(3):
        torch.manual_seed(seed)
        loss = objective.loss(data(), 0)
        assert loss.value.item() < 1e-12
        loss.value.backward()
    assert objective.student.denoiser.shift.grad.abs() < 1e-5


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_a_wrong_jump_is_pulled_back(shift, exact_solver):
    """θ⁻ and the target's own jump are held: the gradient has the sign of the error."""
    objective = made(shift=0.0)
    with torch.no_grad():
        objective.student.denoiser.shift.add_(shift)
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        objective.count = 3
        objective.loss(data(), 0).value.backward()
        found.append(objective.student.denoiser.shift.grad.item())
    assert found[-1] * shift > 0


def test_only_the_first_jump_of_the_estimate_learns(exact_solver):
    objective = made(shift=0.1)
    torch.manual_seed(0)
    estimate, target = objective.soft_pair(data())
    assert estimate.requires_grad and not target.requires_grad
    estimate.sum().backward()
    assert objective.target.shift.grad is None
    assert objective.student.denoiser.shift.grad.abs() > 0


def test_gradients_pass_through_the_frozen_last_jump():
    """With s above 0, dx̂/dθ is the frozen jump's slope times that of the landing."""
    objective, batch = made(name="gaussian", shift=0.1), data()
    student, process = objective.student.denoiser, Karras()
    t, s = torch.full((N,), 0.8, dtype=D), torch.full((N,), 0.4, dtype=D)
    x_t = process.noise(batch.data, t, batch.noise)
    found = objective.finish(objective.jump(x_t, t, s, batch), s, batch).sum()
    found.backward()
    sigma_t, sigma_s = (process.scales(v)[1][0].item() for v in (t, s))
    sigma_0 = process.scales(torch.zeros(1, dtype=D))[1].item()
    std = lambda sigma: (0.25 + sigma**2) ** 0.5  # noqa: E731
    # x̂ of the exact jump s → 0 is linear, with this slope; the landing has 1 - σ_s/σ_t of θ's shift
    slope = (sigma_s * std(sigma_0) / std(sigma_s) - sigma_0) / (sigma_s - sigma_0)
    expected = N * slope * (1 - sigma_s / sigma_t)
    assert student.shift.grad.item() == pytest.approx(expected, rel=1e-9)


def test_the_cells_leave_room_for_the_solver_and_the_landing():
    objective = made(levels=9)
    torch.manual_seed(0)
    start, landing = objective.sample_cells(torch.zeros(20_000, 1), 3)
    assert (start.min(), start.max()) == (3, 8)
    assert landing.min() == 0 and (landing <= start - 3).all()
    top = landing[start == 8]
    share = torch.bincount(top, minlength=6) / len(top)
    assert (share - 1 / 6).abs().max() < 0.03


def test_more_solver_steps_are_more_likely():
    objective = made()
    random.seed(0)
    found = []
    for _ in range(600):
        next(objective.turns(0))
        found.append(objective.count)
    shares = [found.count(k) / 600 for k in (1, 2, 3)]
    assert shares == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=0.06)


def test_a_landing_on_the_end_of_the_solver_compares_with_the_solver(monkeypatch, exact_solver):
    """With s = u the inner jump is the identity: consistency distillation at s = u = 0."""
    objective, batch = made(shift=0.1), data()
    cells = torch.full((N,), 3), torch.zeros(N, dtype=torch.long)
    monkeypatch.setattr(CTM, "sample_cells", lambda *_: cells)
    estimate, target = objective.soft_pair(batch)
    t = torch.full((N,), 3 / 17, dtype=D)
    x_t = Karras().noise(batch.data, (cells[0] / 17), batch.noise)
    flow = objective.student.denoiser.denoiser.flow
    torch.testing.assert_close(target, flow(x_t, t, 0 * t), atol=1e-6, rtol=0)
    landing = objective.jump(x_t, t, 0 * t, batch)
    torch.testing.assert_close(estimate, landing, atol=1e-6, rtol=0)


def test_the_denoising_term_has_the_exact_denoiser_for_its_optimum():
    found = {}
    for shift in (-0.05, 0.0, 0.05):
        torch.manual_seed(0)
        found[shift] = made(shift=shift).denoising(data(20_000)).item()
    assert found[0.0] < min(found[-0.05], found[0.05])


def test_terms_are_balanced_by_their_gradients_at_the_last_layer():
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    main, other = 6 * weight.sum(), 2 * weight.sum()
    assert balance(main, other, weight, 0, 1e4).item() == pytest.approx(3, rel=1e-4)
    assert balance(main, other, weight, 0, 2).item() == 2
    assert balance(main, 0 * other, weight, 0, 10).item() == 10
    student = two_time(schedulers.student(load("digits"), 1)).denoiser
    assert last_layer(student.requires_grad_(True)) is unwrap(student).backbone.conv_out.weight


@pytest.mark.parametrize(("count", "teacher"), [(1, 2), (3, 6)])
def test_its_forwards_are_those_of_its_docstring(count, teacher):
    objective = made(denoising_weight=1.0)
    calls = []
    objective.teacher.register_forward_hook(lambda *_: calls.append(1))
    objective.count = count
    exact = objective.student.denoiser.denoiser
    frozen = objective.target.denoiser
    objective.loss(data(), 0)
    assert (len(exact.calls), len(frozen.calls)) == (3, 2)
    assert len(calls) - len(exact.calls) == teacher  # each call of the student calls its teacher


class Line(torch.nn.Module):
    """A critic whose logit is x_t itself."""

    def forward(self, x_t, t, cond=None):
        return x_t[:, 0]


def test_the_critic_learns_by_the_hinge_loss_and_pulls_the_estimate_up(exact_solver):
    objective, batch = made(critic_times=Uniform(0.0, 0.0)), data()  # at σ_min
    objective.critic = Line()
    torch.manual_seed(0)
    value = objective.critic_loss(batch).value
    torch.manual_seed(0)
    fake = objective.soft_pair(batch, target=False)[0].detach()
    expected = (1 + fake).relu().mean() + (1 - batch.data).relu().mean()
    torch.testing.assert_close(value, expected, atol=5e-3, rtol=0)
    objective.loss(batch, 0).value.backward()  # the distance is 0, and so its balance the least
    assert objective.student.denoiser.shift.grad < 0
    assert made(gan_start=5).gan_start == 5


def test_too_many_solver_steps_are_refused():
    with refused("objective.solver_steps", "18", "17"):
        made(solver_steps=18)


def test_its_critic_reads_the_frozen_teacher():
    tree = {
        "teacher": "digits", "objective": {"name": "ctm"}, "critic": {},
        "data": {"source": "digits"}, "train": {"steps": 1, "batch": 4},
    }  # fmt: skip
    teacher = load("digits")
    objective = networks.objective_of(Recipe.check(tree), teacher, torch.device("cpu"))
    (read,) = objective.critic._denoiser
    assert read is teacher.denoiser
    objective.student.requires_grad_(True)
    objective.count = 1
    batch = Batch(
        torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), teacher.codec.condition([1, 2, 3, 4])
    )
    for turn, names in zip(objective.turns(0), (("student",), ("critic",)), strict=True):
        assert turn.players == names
        loss = turn.loss(batch)
        loss.value.backward()
        if names == ("student",):
            assert loss.logs["gan"].isfinite()
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    assert all(p.grad is not None for p in objective.critic.parameters())


# ---- γ-sampling


@pytest.mark.parametrize("process", [Karras(), Linear(), Trig(0.5)], ids=str)
def test_gamma_sampling_keeps_the_marginals_of_an_exact_map_and_has_both_samplers_as_ends(process):
    exact, n = MAPS["gaussian"](process), 200_000
    torch.manual_seed(0)
    t, s = torch.full((n,), 0.8, dtype=D), 0.5
    x_t = process.noise(0.3 + 0.5 * torch.randn(n, 1, dtype=D), t, torch.randn(n, 1, dtype=D))
    noise, found = torch.randn(n, 1, dtype=D), {}
    for gamma in (False, 1e-9, 0.5, 1 - 1e-9, True):
        floor = 0.002 if process == Karras() else 0.0
        chain = Generator(exact, (0.8, s), gamma, floor)
        found[gamma] = chain.step(x_t, 0, noise=noise)
    torch.testing.assert_close(found[1e-9], found[False], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1 - 1e-9], found[True], atol=0.02, rtol=0)
    alpha, sigma = (v.item() for v in process.scales(torch.tensor(s, dtype=D)))
    for x in found.values():
        assert x.mean().item() == pytest.approx(0.3 * alpha, abs=0.01 * (1 + sigma))
        variance = 0.25 * alpha**2 + sigma**2
        assert x.var().item() == pytest.approx(variance, rel=0.015)
    assert not torch.allclose(found[0.5], found[True], atol=0.05)
