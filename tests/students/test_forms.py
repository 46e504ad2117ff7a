"""Each teacher's students have a form: how they are built, rehearsed, exported and measured."""

import pytest
import torch

from distill.config.recipe import Recipe
from distill.training.networks import objective_of
from students.export.forms import NetworkForm, StockForm, form_of
from students.gaussian import Affine, GaussianForm
from teachers import UserError, load
from tests.helpers.toys import recipe_tree


def test_the_form_follows_from_the_teacher_and_from_what_is_trained(pipelines):
    stock, linear = load(str(pipelines["edm"])), load("analytic:gaussian")
    assert type(form_of(stock)) is StockForm
    assert type(form_of(linear)) is GaussianForm
    assert type(form_of(stock, few_step=False)) is NetworkForm


def test_only_stock_students_leave_a_pipeline_and_only_closed_forms_have_no_adapters(pipelines):
    teacher = load(str(pipelines["edm"]))
    forms = [form_of(teacher), form_of(load("analytic:gaussian")), form_of(teacher, False)]
    assert [form.leaves_pipeline for form in forms] == [True, False, False]
    assert [form.adapts for form in forms] == [True, False, True]


def test_a_networks_student_is_the_network_itself_and_trains(pipelines):
    teacher = load(str(pipelines["edm"]))
    student = form_of(teacher, few_step=False).student(1, None, True, None)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.4])
    cond = teacher.codec.condition([1, 2])
    assert torch.equal(student.denoiser(x, t, cond), teacher.denoiser(x, t, cond))
    assert all(p.requires_grad for p in student.parameters())


def test_distributions_are_those_of_the_samples():
    form = form_of(load("analytic:gaussian"))
    student = form.student(1, None, True, None)
    assert isinstance(student.denoiser, Affine)
    with torch.no_grad():
        student.denoiser.root.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.5]]))
        x = student(torch.randn(200_000, 2))
    ours, teachers = form.distributions(student)
    torch.testing.assert_close(x.mean(0), ours.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(x.T.cov(), ours.cov, atol=0.05, rtol=0)
    torch.testing.assert_close(teachers.cov, torch.tensor([[1.0, 0.5], [0.5, 0.6]]))


def test_a_teacher_under_training_has_no_steps(pipelines):
    tree = recipe_tree("diffusion", pipelines["edm"])
    recipe = Recipe.check({**tree, "student": {"steps": 2}})
    with pytest.raises(UserError, match=r"^student\.steps: "):
        objective_of(recipe, load(str(pipelines["edm"])), torch.device("cpu"))
