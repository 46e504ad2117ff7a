"""TCM against closed forms: the network of each target, the times, the shares of the loss."""

import math

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.consistency.consistency import ConsistencyTuning
from distill.objectives.consistency.tcm import TruncatedConsistency
from distill.objectives.noise_levels import LogNormal, LogStudent
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.denoiser import Denoiser
from teachers.process import Karras
from tests.helpers.refusals import refused

D = torch.float64


class Constant(Denoiser):
    """x̂ = k everywhere."""

    def __init__(self, k):
        super().__init__()
        self.process, self.k = Karras(), torch.nn.Parameter(torch.tensor(k, dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        return self.k + 0 * x_t


def tcm(k=0.0, frozen=None, kind=TruncatedConsistency, times=(1.0,), **keys):
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
    objective = kind(teacher=teacher, student=Generator(Constant(k), times), **keys)
    if frozen is not None:
        objective.frozen = Constant(frozen)
    return objective


def batch(n=8):
    torch.manual_seed(0)
    return Batch(torch.randn(n, 1, dtype=D), torch.randn(n, 1, dtype=D))


def test_below_the_boundary_the_target_is_the_first_stages():
    objective, given = tcm(1.0, frozen=5.0), batch(4)
    r = Karras().time(torch.tensor([0.5, 0.9, 0.99, 1.01], dtype=D))
    found = objective.targets(given.noise, r, given, 2)
    assert found[:, 0].tolist() == [5.0, 5.0, 5.0, 1.0]
    r = torch.zeros(4, dtype=D)  # where the path ends, the data
    torch.testing.assert_close(objective.targets(given.noise, r, given, 2), given.data)


def test_times_lie_above_the_boundary_and_the_first_share_on_it():
    objective = tcm(far_times=LogNormal(0.0, 2.0))
    t = objective.times_above(torch.zeros(1000, 1), 250)
    sigma = objective.ratio(t.double())
    torch.testing.assert_close(sigma[:250], torch.ones(250, dtype=D), atol=1e-5, rtol=0)
    assert sigma.min() > 1 - 1e-5 and sigma[250:].max() > 5
    r = objective.earlier(t, 0)
    assert (objective.ratio(r[:250]) < 1).all()  # so that the first stage gives their target


def test_the_boundary_weighs_a_tenth_of_the_others_mean():
    objective, given = tcm(0.0, frozen=3.0, q=1e9), batch()
    loss = objective.loss(given, 0)
    torch.manual_seed(0)
    edge = Karras().time(torch.ones(1, dtype=D))
    weight = objective.weight(edge, objective.earlier(edge, 0)).item()
    # at the boundary 0 against 3; above it the student against itself, where distances are 0
    value, rest = loss.value.item(), loss.logs["distance"].item()
    assert rest < 1.5 and loss.logs["edge"].item() == pytest.approx(3.0)
    if rest == 0:
        assert value == pytest.approx(0.1 * weight * 3.0, rel=1e-3)
    heavier = tcm(0.0, frozen=3.0, q=1e9, boundary_weight=0.2)
    torch.manual_seed(0)
    more = heavier.loss(batch(), 0).value.item()
    torch.manual_seed(0)
    assert more - objective.loss(batch(), 0).value.item() == pytest.approx(
        0.1 * weight * 3.0, rel=1e-2
    )


def test_the_boundary_loss_alone_pulls_the_student_to_the_first_stage():
    objective = tcm(0.0, frozen=3.0, q=1e9, far_times=LogNormal(3.0, 0.1))
    objective.loss(batch(), 0).value.backward()
    assert objective.student.denoiser.k.grad < -1e-3
    equal = tcm(3.0, frozen=3.0, q=1e9)
    equal.loss(batch(), 0).value.backward()
    assert abs(equal.student.denoiser.k.grad.item()) < 1e-6


def test_the_first_stage_is_ect_and_freezes_when_it_ends():
    objective = tcm(1.0, first_steps=3)
    ect = tcm(1.0, kind=ConsistencyTuning)
    for one in (objective, ect):
        torch.manual_seed(0)
        one.value = one.loss(batch(), 2).value.item()
    assert objective.value == ect.value
    turns = [next(objective.turns(k)) for k in range(5)]
    assert [t.reset for t in turns] == [False, False, False, True, False]
    assert objective.frozen is not objective.student.denoiser
    with torch.no_grad():
        objective.student.denoiser.k.fill_(9.0)
    assert objective.frozen.k.item() == 1.0 and not objective.frozen.k.requires_grad
    other = tcm(0.0, first_steps=3)
    other.load_state_dict(objective.state_dict())
    assert other.frozen.k.item() == 1.0
    assert tcm(first_steps=3).state_dict() == {}


def test_a_student_that_steps_below_the_boundary_is_refused():
    with refused("student.steps", "0.8"):
        tcm(times=(1.0, Karras().time(torch.tensor(0.8, dtype=D)).item()))
    with refused("objective.target_ema"):
        tcm(target_ema=0.5)


def test_students_noise_levels_follow_the_truncated_density():
    process, times = Karras(), LogStudent(0.0, 0.5, 2.0)
    torch.manual_seed(0)
    t = times.sample(torch.zeros(100_000, 1), process)
    x = process.scales(t.double())[1].log().sort().values / 0.5
    assert x.min() > -1e-3 and x.max() < math.log(80) / 0.5 + 1e-3

    def cdf(x):  # of Student's t with two degrees of freedom
        return 0.5 + x / (2 * (2 + x**2) ** 0.5)

    top = torch.tensor(math.log(80) / 0.5, dtype=D)
    expected = (cdf(x) - 0.5) / (cdf(top) - 0.5)
    place = (torch.arange(100_000, dtype=D) + 0.5) / 100_000
    assert (expected - place).abs().max() < 0.006


def test_the_papers_tail_is_nearly_even_in_the_log_of_the_log():
    t = LogStudent(0.0, 0.2, 0.01).sample(torch.zeros(20_000, 1), Karras())
    log = Karras().scales(t.double())[1].log()
    shares = [((log > a) & (log < 2 * a)).double().mean() for a in (0.2, 0.4, 0.8, 1.6)]
    assert max(shares) - min(shares) < 0.02 and min(shares) > 0.1


def test_a_part_of_a_batch_with_no_sample_off_the_boundary_is_refused():
    tcm().check_batch((2, 1))
    with refused("objective.boundary_share", "0.25", "1"):
        tcm().check_batch((1, 1))
    with refused("objective.boundary_share"):
        tcm(boundary_share=0.99).check_batch((4, 1))
