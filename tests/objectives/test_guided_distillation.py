"""Guided distillation against closed forms: data N(c, ¼) of a label c, guided away from label 0."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.trajectory.guided import GuidedDistillation
from distill.objectives.trajectory.progressive import Progressive
from distill.objectives.weights import error_weight
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Denoiser, Guided
from teachers.process import Karras, Linear, Tabulated, expand
from teachers.solver import double_steps

D = torch.float64
NULL = {"label": torch.zeros(1, dtype=D)}


class Labelled(Denoiser):
    """The exact denoiser of data N(label, ¼); with `factor`, one that is wrong by it."""

    def __init__(self, process, factor=1.0):
        super().__init__()
        self.process = process
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        alpha, sigma = self.process.at(t, x_t)
        m = expand(cond["label"], x_t)
        return self.factor * (m + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x_t - alpha * m))


class Reader(Denoiser):
    """A student that reads the scale g: the same as two calls of `Labelled`, mixed."""

    def __init__(self, process, factor=1.0):
        super().__init__()
        self.process, self.inner = process, Labelled(process, factor)

    def forward(self, x_t, t, cond=None, s=None):
        g = expand(cond[GUIDANCE_SCALE], x_t)
        x = self.inner(x_t, t, cond)
        null = self.inner(x_t, t, {"label": torch.zeros_like(cond["label"])})
        return null + g * (x - null)


def make(process=None, factor=1.0, times=(1.0,), renoise=True, kind=GuidedDistillation, **keys):
    process = process or Linear()
    teacher = Guided(Labelled(process), 3.0, NULL)
    student = Generator(Reader(process, factor), times, renoise)
    keys = {"initial_steps": 4 * len(times), "stage_steps": 5, **keys}
    if kind is GuidedDistillation:
        keys = {"first_steps": 10, **keys}
    return kind(teacher=teacher, student=student, **keys)


def batch(n=64):
    torch.manual_seed(2)
    label = torch.randint(1, 4, (n,)).double()
    x = label[:, None] + 0.5 * torch.randn(n, 1, dtype=D)
    cond = {"label": label, GUIDANCE_SCALE: 1 + 4 * torch.rand(n, dtype=D)}
    return Batch(x, torch.randn(n, 1, dtype=D), cond)


def play(objective, steps):
    """The stage and its size at each step, as `turns` goes through them."""
    seen = []
    for step in steps:
        for turn in objective.turns(step):
            seen.append((objective.stage, turn.reset, objective.grid_size()))
    return seen


@pytest.mark.parametrize("process", [Tabulated.scaled_linear(), Karras(), Linear()])
def test_the_first_stage_ends_in_the_guided_map_of_every_scale(process):
    objective = make(process)
    loss = objective.loss(batch(), 0)
    assert loss.value.item() < 1e-12
    loss.value.backward()
    assert objective.student.denoiser.inner.factor.grad.abs() < 1e-6
    wrong = make(process, 1.1)
    loss = wrong.loss(batch(), 0)
    loss.value.backward()
    assert loss.value.item() > 1e-3 and wrong.student.denoiser.inner.factor.grad > 0


def test_the_stages_are_the_scales_and_then_the_halvings():
    objective = make(times=(1.0,), initial_steps=4)
    seen = play(objective, (0, 9, 10, 14, 15, 20, 99))
    assert seen == [(0, False, 4), (0, False, 4), (1, True, 4), (1, False, 4), (2, True, 2),
                    (3, True, 1), (3, False, 1)]  # fmt: skip
    assert objective.last_stage == 20


def test_halving_carries_each_samples_own_scale():
    """The teacher of later stages is the student, which reads the scale that the batch has."""
    objective, process = make(), Linear()
    play(objective, (0, 10))
    data = batch(8)
    assert isinstance(objective.teacher, Reader)
    t, m, r = (torch.full((8,), v, dtype=D) for v in (0.75, 0.625, 0.5))
    x_t = process.noise(data.x, t, data.noise)
    found = objective.target(x_t, t, m, r, data.cond)
    for k in range(8):
        guided = Guided(Labelled(process), data.cond[GUIDANCE_SCALE][k].item(), NULL)
        one, cond = slice(k, k + 1), {"label": data.cond["label"][k : k + 1]}
        x_m = process.step(x_t[one], guided(x_t[one], t[one], cond), t[one], m[one])
        x_r = process.step(x_m, guided(x_m, m[one], cond), m[one], r[one])
        torch.testing.assert_close(process.step(x_t[one], found[one], t[one], r[one]), x_r)


def test_after_its_first_stage_it_is_progressive_distillation():
    mine, plain = make(factor=0.8), make(factor=0.8, kind=Progressive)
    play(mine, (0, 10))
    plain.teacher = mine.teacher
    data = batch()
    values = []
    for objective in (mine, plain):
        torch.manual_seed(5)
        values.append(objective.loss(data, 10).value)
    torch.testing.assert_close(*values)


def test_a_resumed_run_has_its_stage_and_its_teacher():
    objective, again = make(factor=0.9), make()
    play(objective, (0, 10, 15))
    again.load_state_dict(objective.state_dict())
    assert again.stage == 2 and again.teacher.inner.factor.item() == pytest.approx(0.9)


def test_weights_are_the_errors_of_x_of_noise_and_of_v():
    """SNR |Δx|² = |Δε|², and (SNR + 1)|Δx|² = |Δv|² of a variance-preserving process."""
    process = Tabulated.scaled_linear()
    t = torch.rand(6, dtype=D)
    x_t, x, y = torch.randn(3, 6, 1, dtype=D).unbind()
    alpha, sigma = process.at(t, x)
    square = (x - y).square()
    noise = (process.eps(x_t, x, t) - process.eps(x_t, y, t)).square()
    v = alpha * process.eps(x_t, x, t) - sigma * x - alpha * process.eps(x_t, y, t) + sigma * y
    expected = {
        "eps": noise,
        "v": v.square(),
        "truncated-snr": torch.maximum(square, noise),
        "x": square,
    }
    for weighting, error in expected.items():
        weight = error_weight(weighting, process, t)[:, None]
        torch.testing.assert_close(weight * square, error)


def test_double_steps_keep_the_data_of_an_exact_flow_in_many_steps():
    """The variance identity: noise back to s leaves a variable of the forward process."""
    process = Tabulated.scaled_linear()
    denoiser = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D), process)
    torch.manual_seed(0)
    x_t = torch.randn(40_000, 1, dtype=D)
    x = double_steps(denoiser, x_t, process.grid(400))
    assert x.var().item() == pytest.approx(1, rel=0.04)


def test_double_steps_end_on_x_of_the_last_time_and_call_it_n_times():
    calls = []

    class Counted(Gaussian):
        def forward(self, x_t, t, cond=None, s=None):
            calls.append(t[0].item())
            return super().forward(x_t, t, cond)

    denoiser = Counted(torch.zeros(1, dtype=D), torch.zeros(1, dtype=D), Linear())
    x = double_steps(denoiser, torch.randn(4, 1, dtype=D), Linear().grid(4))
    assert calls == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert x.abs().max() < 1e-12
