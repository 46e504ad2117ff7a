"""DDO: the optimum of its loss on three states, and the log-ratio read off two networks."""

import math

import pytest
import torch

from distill.objectives.adversarial.ddo import DDO, ratio_loss
from distill.objectives.base import Batch
from distill.objectives.noise_levels import Uniform
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.guidance import Interval
from teachers.process import Karras, Linear
from teachers.solver import solve
from tests.helpers.noise_predictors import guided, labels, predictor
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine

D = torch.float64
DATA, REFERENCE = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)  # of three states


def optimum(beta, alpha):
    """The model p_θ of three states, normalised, that the loss leads to."""
    p, q = (torch.tensor(v, dtype=D) for v in (DATA, REFERENCE))
    states = [torch.repeat_interleave(torch.arange(3), (v * 10).round().long()) for v in (p, q)]
    theta = q.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        ratio = theta.log_softmax(0) - q.log()
        loss = ratio_loss(ratio[states[0]], ratio[states[1]], beta, alpha)
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach().softmax(0)


def test_with_unit_weights_the_optimum_is_the_datas_distribution():
    assert optimum(1.0, 1.0).tolist() == pytest.approx(DATA, abs=1e-4)


def test_otherwise_it_is_not_the_published_one_but_that_of_normalised_models():
    published = torch.tensor(DATA, dtype=D) ** 2 / torch.tensor(REFERENCE, dtype=D)
    published = (published / published.sum()).tolist()
    assert published == pytest.approx([0.767, 0.184, 0.050], abs=1e-3)
    assert optimum(0.5, 1.0).tolist() == pytest.approx([0.684, 0.242, 0.075], abs=1e-3)


def made(n=6, d=3, **fields):
    teacher, network = predictor(1, Linear(), "flow"), predictor(2, Linear(), "flow")
    objective = DDO(teacher=teacher, student=Generator(network), **fields)
    torch.manual_seed(0)
    x = [torch.randn(n, d, dtype=D) for _ in range(2)]
    return objective, Batch(*x, labels(n))


@pytest.mark.parametrize("levels", [1, 3])
def test_the_log_ratio_is_the_difference_of_two_losses_of_what_the_network_predicts(levels):
    """|v_ref - v̂|² - |v_θ - v̂|², summed over dimensions, at one t and noise."""
    objective, batch = made(levels=levels, times=Uniform(0.1, 0.9))
    torch.manual_seed(3)
    found = objective.log_ratio(batch.data, batch.cond)
    torch.manual_seed(3)
    x = batch.data.repeat(levels, 1)
    t = 0.1 + 0.8 * torch.rand(len(x))
    noise = torch.randn_like(x)
    x_t = (1 - t[:, None]) * x + t[:, None] * noise
    cond = {"class_labels": batch.cond["class_labels"].repeat(levels)}
    before, now = (
        ((n.backbone(x_t, t, cond) - (noise - x)) ** 2).sum(1)
        for n in (objective.teacher, objective.student.denoiser)
    )
    torch.testing.assert_close(found, before - now, rtol=1e-4, atol=1e-5)


def test_the_loss_is_a_discriminators_between_data_and_samples_of_the_reference():
    objective, batch = made(beta=0.3, alpha=2.0, levels=2, solver_steps=5)
    torch.manual_seed(4)
    loss = objective.loss(batch, 0)
    torch.manual_seed(4)
    x = solve(objective.teacher, batch.noise, 5, "heun", batch.cond)
    data = objective.log_ratio(batch.data, batch.cond)
    sample = objective.log_ratio(x, batch.cond)
    expected = -(0.3 * data).sigmoid().log().mean() - 2 * (-0.3 * sample).sigmoid().log().mean()
    torch.testing.assert_close(loss.value, expected.detach().requires_grad_())
    loss.value.backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_a_student_that_is_the_reference_has_a_loss_of_log_2_for_each_side():
    objective, batch = made(alpha=3.0, solver_steps=2)
    objective.student.denoiser = predictor(1, Linear(), "flow")
    assert objective.loss(batch, 0).value.item() == pytest.approx(4 * math.log(2))


def test_it_moves_a_model_from_its_reference_towards_the_data():
    """A reference N(0, 1), data N(1, 1): the model N(m, 1) starts at m = 0."""

    class Mean(Affine):
        """The exact denoiser of N(m, 1)."""

        def forward(self, x_t, t, cond=None, s=None):
            sigma = self.process.at(t, x_t)[1]
            return self.m + (x_t - self.m) / (1 + sigma**2)

    network = Mean(torch.zeros(1, dtype=D), torch.ones(1, 1, dtype=D), Karras())
    network.weight = lambda t: torch.ones_like(t)
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    teacher.weight = lambda t: torch.ones_like(t)
    objective = DDO(teacher=teacher, student=Generator(network), beta=1.0, solver_steps=8)
    torch.manual_seed(0)
    batch = Batch(1 + torch.randn(2000, 1, dtype=D), torch.randn(2000, 1, dtype=D))
    objective.loss(batch, 0).value.backward()
    assert network.m.grad.item() < -0.01


def test_a_guided_reference_is_refused():
    student = Generator(predictor(2, Linear(), "flow"))
    for teacher in (guided(predictor(1), 2.0), Interval(guided(predictor(1), 2.0), 0.1, 0.9)):
        with refused("teacher.guidance", "guided"):
            DDO(teacher=teacher, student=student)
    DDO(teacher=guided(predictor(1), 1.0), student=student)  # which guides nothing
