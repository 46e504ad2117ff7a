"""Students whose steps are samples of q(x_s | x_t, x̂), and the stock scheduler that takes them."""

import pytest
import torch

from students import own_network, schedulers
from students.export.folder import export, load_student, rehearse, sample_student
from students.generator import Generator
from teachers import load
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear, Tabulated, Trig
from tests.helpers.refusals import refused

D = torch.float64
PROCESSES = [Karras(), Linear(), Linear(3.0), Trig(0.5), Tabulated.scaled_linear()]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.6, 0.55), (0.5, 0.0)])
def test_two_steps_have_the_marginals_of_the_process(process, t, s):
    """x_t of noise and x_s of the posterior are a pair of the forward chain: x_s is α x + σ ε, and
    x_t is it scaled, with independent noise. The step is linear, so unit inputs give all."""
    t, s = torch.tensor([t], dtype=D), torch.tensor([s], dtype=D)
    zero, one = torch.zeros(1, 1, dtype=D), torch.ones(1, 1, dtype=D)

    def moved(x, eps, fresh):
        return process.posterior(process.noise(x, t, eps), x, t, s, fresh).item()

    (alpha, sigma), (alpha_s, sigma_s) = ([v.item() for v in process.scales(u)] for u in (t, s))
    old, new = moved(zero, one, zero), moved(zero, zero, one)
    assert moved(one, zero, zero) == pytest.approx(alpha_s, abs=1e-12)
    assert old**2 + new**2 == pytest.approx(sigma_s**2, abs=1e-12)
    assert old * sigma == pytest.approx(alpha / alpha_s * sigma_s**2, abs=1e-12)  # covariance


def test_a_step_is_the_posteriors_and_lands_at_0():
    process = Karras()
    network = Gaussian(torch.zeros(2, dtype=D), torch.ones(2, dtype=D), process)
    student = Generator(network, (0.6, 0.4), renoise="posterior").keep(2)
    x_t, noise = torch.randn(2, 3, 2, dtype=D)
    t, s = (torch.full((3,), v, dtype=D) for v in (0.6, 0.4))
    expected = process.posterior(x_t, network(x_t, t), t, s, noise)
    assert torch.equal(student.step(x_t, 0, noise=noise), expected)
    assert not student.renoises_in_part and student.at(2).renoise == "posterior"
    z = x_t / student.scale(x_t)
    torch.testing.assert_close(student(z, noises=[noise]), network(expected, s))


def test_of_exact_steps_for_a_point_the_chain_ends_there():
    network = Gaussian(torch.full((1,), 0.3, dtype=D), torch.full((1,), 1e-12, dtype=D), Karras())
    student = Generator(network, (1.0, 0.5), renoise="posterior").keep(2)
    x = student(torch.randn(8, 1, dtype=D))
    torch.testing.assert_close(x, torch.full_like(x, 0.3), atol=1e-6, rtol=0)


def test_the_stock_sde_scheduler_samples_it(tmp_path):
    teacher = load("digits", null_label=10)
    student = schedulers.student(teacher, 3, 5.0, "posterior")
    scheduler = schedulers.scheduler(student)
    assert type(scheduler).__name__ == "EDMDPMSolverMultistepScheduler"
    assert student.counts == (3,)
    rehearse(student, teacher)  # compares pixels
    export(student, teacher, tmp_path / "student", {"objective": {"name": "none"}})  # again
    again, itself = load_student(tmp_path / "student")
    assert again.renoise == "posterior"
    torch.testing.assert_close(
        sample_student(again, itself, [3, 4], 7), sample_student(student, teacher, [3, 4], 7),
        atol=2e-4, rtol=1e-3,
    )  # fmt: skip


def test_students_without_such_a_scheduler_are_refused():
    with refused("student.renoise", "posterior"):
        schedulers.student(load("shapes"), 4, renoise="posterior")
    with refused("student.renoise"):
        own_network.student(load("digits"), 2, None, "posterior", None)
