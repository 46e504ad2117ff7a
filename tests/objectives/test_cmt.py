"""Consistency mid-training against closed forms: its trajectories, its optimum, its cost."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.flow_maps.cmt import CMT
from students.generator import Generator
from teachers.process import Karras, Linear
from tests.helpers.flow_maps import MAPS, D, Shifted
from tests.helpers.refusals import refused


def made(process=None, name="gaussian", shift=0.0, **keys):
    exact = MAPS[name](process or Karras())
    return CMT(teacher=exact.denoiser, student=Generator(Shifted(exact, shift)), **keys)


def data(n):
    rng = torch.Generator().manual_seed(5)
    x, noise = (torch.randn(n, 1, generator=rng).to(D) for _ in range(2))
    return Batch(0.3 + 0.5 * x, noise, {"label": torch.arange(n)})


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddim"])
def test_states_are_the_solvers_own_and_lead_to_their_trajectorys_end(solver):
    from teachers.solver import SOLVERS

    objective, batch = made(points=4, solver=solver), data(12)
    x_t, t, end, cond = objective.trajectories(batch)
    assert t.tolist() == pytest.approx([v for v in (1, 2 / 3, 1 / 3, 0) for _ in range(3)])
    start = batch.data[:3] + 80 * batch.noise[:3]
    torch.testing.assert_close(x_t[:3], start)
    alone = SOLVERS[solver](objective.teacher, start, Karras().grid(4))
    torch.testing.assert_close(end, torch.cat([alone] * 4))
    assert cond["label"].tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("process", [Karras(), Linear()], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_an_exact_student_has_the_solvers_error_alone(process, name):
    """It vanishes with the solver's steps."""
    errors = []
    for points in (32, 128):
        batch = data(8 * points)
        found = made(process, name, points=points, huber_c=0.0).loss(batch, 0).value.item()
        errors.append(found)
    assert errors[1] < min(errors[0], 2e-3) and errors[0] < 0.02


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_a_wrong_student_is_pulled_back(shift):
    objective = made(shift=shift, points=32)
    objective.loss(data(64), 0).value.backward()
    assert objective.student.denoiser.shift.grad * shift > 0


def test_it_costs_one_forward_of_each_network():
    objective, calls = made(points=4), []
    objective.teacher.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    objective.loss(data(12), 0)
    assert objective.student.denoiser.denoiser.calls == [12]
    assert calls[:4] == [3, 3, 3, 3]  # and then those that the student is made of


def test_a_batch_that_trajectories_do_not_divide_is_refused():
    with refused("objective.points", "12", "16"):
        made().loss(data(12), 0)


def test_it_gives_no_samples_to_reward_since_they_are_not_of_the_batchs_items():
    """They are of the first trajectories' conditions, again and again."""
    assert made(points=4).loss(data(8), 0).samples is None
