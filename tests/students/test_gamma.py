"""Students that renoise in part, as TCD's scheduler samples them."""

import pytest
import torch

from students import schedulers
from students.export.folder import export, load_student, rehearse, sample_student
from students.generator import Generator
from teachers import load
from teachers.analytic import Gaussian
from teachers.process import Karras, Tabulated
from tests.helpers.refusals import refused

D = torch.float64


def gaussian(gamma, process, times=(1.0, 0.6, 0.2)):
    network = Gaussian(torch.zeros(1, dtype=D), torch.ones(1, dtype=D), process)
    student = Generator(network, times, start=1.0)
    student.gamma = gamma
    return student


def test_renoising_in_part_keeps_the_variance_of_unit_data():
    """Of data N(0, 1) in a variance-preserving process a DDIM step shrinks; the noise is of the
    forward process, so what a DDIM step to the lower time has is all that is lost."""
    process = Tabulated.scaled_linear()
    student = gaussian(0.5, process)
    torch.manual_seed(0)
    x_t = torch.randn(400_000, 1, dtype=D)
    moved = student.step(x_t, 0)
    index = torch.floor(torch.tensor([0.5 * 0.6 * 999], dtype=D))
    t, s, low = (torch.tensor([v], dtype=D) for v in (1.0, 0.6, index.item() / 999))
    x = student.denoiser(x_t[:1], t)
    slope = process.step(x_t[:1], x, t, low) / x_t[:1]
    (a, _), (a_low, _) = process.scales(s), process.scales(low)
    expected = (a / a_low * slope) ** 2 + 1 - (a / a_low) ** 2
    assert moved.var().item() == pytest.approx(expected.item(), rel=0.01)


def test_a_gamma_of_0_is_the_ode_and_fewer_steps_keep_it():
    process = Karras()
    student = gaussian(0.0, process)
    along = Generator(student.denoiser, student.times, False)
    x_t = torch.randn(8, 1, dtype=D)
    torch.testing.assert_close(student.step(x_t, 0), along.step(x_t, 0), atol=1e-6, rtol=1e-6)
    assert student.at(1).gamma == student.gamma
    end = student.at(1)(x_t)
    t = torch.ones(8, dtype=D)
    expected = process.step(x_t, along.denoiser(x_t, t), t, torch.zeros_like(t))
    torch.testing.assert_close(end, expected)


def test_the_stock_tcd_scheduler_samples_it(tmp_path):
    teacher = load("shapes")
    student = schedulers.renoised_in_part(schedulers.student(teacher, 4), 0.3)
    assert type(schedulers.scheduler(student)).__name__ == "TCDScheduler"
    rehearse(student, teacher)  # compares pixels
    export(student, teacher, tmp_path / "student", {"objective": {"name": "none"}})  # again
    again, itself = load_student(tmp_path / "student")
    assert again.gamma == 0.3
    torch.testing.assert_close(
        sample_student(again, itself, ["a red circle"], 7),
        sample_student(student, teacher, ["a red circle"], 7), atol=2e-4, rtol=1e-3,
    )  # fmt: skip


def test_students_that_follow_the_ode_or_have_no_indices_are_refused():
    with refused("student.gamma"):
        schedulers.renoised_in_part(schedulers.student(load("shapes"), 4, renoise=False), 0.3)
    with refused("student.gamma"):
        schedulers.renoised_in_part(schedulers.student(load("digits"), 4), 0.3)
