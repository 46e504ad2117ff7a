"""Step distillation of a guided student: its limits, both passes, and its stock pipeline."""

import pytest
import torch

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.objectives.trajectory.progressive import Progressive
from distill.objectives.trajectory.snapfusion import SnapFusion
from distill.sampling.guided_teacher import guided_student
from students import schedulers
from students.export.folder import export, load_student, rehearse, sample_student
from students.generator import Generator
from students.scale_reading import GuidedStudent
from teachers import conditions, load
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Guided
from teachers.process import Linear
from tests.helpers.refusals import refused
from tests.objectives.test_guided_distillation import NULL, Labelled, batch

D = torch.float64


def make(factor=1.0, kind=SnapFusion, guided=True, null=NULL, **keys):
    process = Linear()
    network = Labelled(process, factor)
    student = GuidedStudent(network, 3.0, null) if guided else network
    teacher = Guided(Labelled(process), 3.0, null)
    return kind(
        teacher=teacher, student=Generator(student), initial_steps=4, stage_steps=5, **keys
    )  # fmt: skip


def value(objective, data):
    torch.manual_seed(5)
    return objective.loss(data, 0).value


def test_with_scales_of_one_it_is_progressive_distillation_of_the_condition():
    data = batch()
    ones = data._replace(cond=conditions.with_scale_one(data.cond, torch.ones(64, dtype=bool)))
    plain = make(0.8, Progressive, guided=False)
    plain.teacher = Labelled(Linear())
    torch.manual_seed(5)
    torch.rand(64)  # which samples are vanilla is drawn first
    expected = plain.loss(data._replace(cond={"label": data.cond["label"]}), 0).value
    for given, keys in ((ones, {"guided_share": 1.0}), (data, {"guided_share": 0.0})):
        torch.testing.assert_close(value(make(0.8, diffusion_weight=0.0, **keys), given), expected)


def test_where_both_conditions_are_one_the_scale_makes_no_difference():
    data = batch()
    null = data._replace(cond={**data.cond, "label": torch.zeros(64, dtype=D)})
    few = null._replace(cond={**null.cond, GUIDANCE_SCALE: torch.full((64,), 7.0, dtype=D)})
    objective = make(0.8, guided_share=1.0, diffusion_weight=0.0)
    torch.testing.assert_close(value(objective, null), value(objective, few))


def test_gradients_flow_through_both_passes():
    """The gradient of the mixed x̂ is not that of the pass of the condition alone."""
    data, objective = batch(), make(0.8, guided_share=1.0, diffusion_weight=0.0)
    found = torch.autograd.grad(value(objective, data), objective.student.denoiser.denoiser.factor)
    network, step = objective.student.denoiser.denoiser, 1e-6
    with torch.no_grad():
        network.factor += step
        above = value(objective, data)
        network.factor -= 2 * step
        below = value(objective, data)
    assert found[0].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5)


def test_the_diffusion_loss_is_of_the_samples_that_are_not_guided():
    data = batch()
    every = [value(make(guided_share=0.0, diffusion_weight=w), data) for w in (0.0, 0.5)]
    torch.manual_seed(5)
    torch.rand(64)
    objective = make()
    t, _, _ = objective.step_times(data.x)
    x_t = Linear().noise(data.x, t, data.noise)
    error = (Labelled(Linear())(x_t, t, data.cond) - data.x).square().mean()
    torch.testing.assert_close(every[1] - every[0], 0.5 * error)
    none = [value(make(guided_share=1.0, diffusion_weight=w), data) for w in (0.0, 0.5)]
    assert torch.equal(*none)


def test_its_later_stages_have_the_guided_student_as_their_teacher():
    objective = make(0.9)
    play_steps = [t for step in (0, 5) for t in objective.turns(step)]
    assert [t.reset for t in play_steps] == [False, True]
    assert isinstance(objective.teacher, GuidedStudent)
    assert objective.teacher.denoiser.factor.item() == pytest.approx(0.9)


def test_stock_diffusers_guides_the_exported_student(tmp_path):
    teacher = load("shapes")
    student = schedulers.student(teacher, 2, renoise=False)
    student.denoiser = GuidedStudent(student.denoiser, 3.0, teacher.codec.null)
    rehearse(student, teacher)  # compares pixels
    export(student, teacher, tmp_path / "student", {"objective": {"name": "none"}})  # again
    again, itself = load_student(tmp_path / "student")
    assert isinstance(again.denoiser, GuidedStudent) and again.denoiser.scale == 3.0
    torch.testing.assert_close(
        sample_student(again, itself, ["a red circle"], 7),
        sample_student(student, teacher, ["a red circle"], 7), atol=2e-4, rtol=1e-3,
    )  # fmt: skip


def test_guidance_that_a_pipeline_does_not_know_is_refused():
    def section(source, **guidance):
        tree = {"teacher": {"source": source, "guidance": guidance}, "data": {"source": "digits"},
                "objective": {"name": "snapfusion"}, "train": {"steps": 1}}  # fmt: skip
        return Recipe.check(tree).teacher

    teacher = load("shapes")
    with refused("teacher.guidance"):
        guided_student(section("shapes", scale=2, rescale=0.5), teacher, teacher.denoiser)
    digits = load("digits")
    with refused("objective.name"):
        guided_student(section("digits", scale=2), digits, digits.denoiser)


def test_a_batch_without_scales_is_guided_as_a_whole():
    data = batch()
    plain = Batch(data.x, data.noise, {"label": data.cond["label"]})
    torch.testing.assert_close(
        value(make(0.8, guided_share=0.5), plain), value(make(0.8, guided_share=1.0), plain)
    )
