"""Students that read a guidance scale: they start as their teacher, and leave in a stock form."""

from copy import deepcopy

import pytest
import torch

from students import schedulers
from students.export.folder import export, load_student, rehearse, sample_student
from students.landing import folds, stock_backbone
from students.lora import Adapter, unwrap
from students.scale_reading import ScaleReading, reading_of, scale_reading
from students.two_time import TwoTime, current_shifts, two_time
from teachers import load
from teachers.conditions import GUIDANCE_SCALE

RANGE = (1.0, 5.0)


def inputs(teacher, n=2):
    prompts = [1, 2] if teacher.codec.classes else ["a red circle", "two blue squares"]
    return (
        torch.randn(n, *teacher.shape),
        torch.tensor([0.9, 0.4]),
        teacher.codec.condition(prompts),
    )


def scaled(cond, *scales):
    return {**cond, GUIDANCE_SCALE: torch.tensor(scales)}


def moved(student, size=0.05):
    """The student, what reads the scale moved from where it adds nothing."""
    reading = reading_of(student)
    part = reading.embedding or unwrap(student).backbone.time_embedding.cond_proj
    with torch.no_grad():
        for p in part.parameters():
            p.add_(size * torch.randn_like(p))
    return student


@pytest.mark.parametrize(
    ("name", "adapter", "native"),
    [("digits", None, False), ("shapes", None, True), ("shapes", Adapter(rank=2), False)],
)
def test_it_starts_as_its_teacher_and_then_reads_each_samples_own_scale(name, adapter, native):
    teacher = load(name)
    x, t, cond = inputs(teacher)
    plain = schedulers.student(teacher, 1, adapter=adapter).denoiser
    student = scale_reading(schedulers.student(teacher, 1, adapter=adapter), RANGE, 3.0).denoiser
    assert (reading_of(student).embedding is None) is native
    with torch.no_grad():
        before = plain(x, t, cond)
        for own in (cond, scaled(cond, 1.0, 5.0)):
            torch.testing.assert_close(student(x, t, own), before, atol=1e-6, rtol=1e-6)
        moved(student)
        low, high = student(x, t, scaled(cond, 1.0, 1.0)), student(x, t, scaled(cond, 5.0, 5.0))
        both = student(x, t, scaled(cond, 1.0, 5.0))
        usual = student(x, t, scaled(cond, 3.0, 3.0))
        assert torch.equal(student(x, t, cond), usual)
        torch.testing.assert_close(both, torch.stack([low[0], high[1]]), atol=1e-5, rtol=1e-5)
        assert min((low - high).abs().max(), (low - usual).abs().max()) > 1e-6
        assert torch.equal(deepcopy(student)(x, t, scaled(cond, 1.0, 1.0)), low)
        torch.testing.assert_close(plain(x, t, cond), before)


def test_stable_diffusions_copy_reads_the_embedding_that_its_pipeline_passes():
    teacher = load("shapes")
    x, t, cond = inputs(teacher)
    student = moved(scale_reading(schedulers.student(teacher, 1), RANGE, 3.0).denoiser)
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    network = unwrap(student)
    embedding = Pipeline.get_guidance_scale_embedding(None, torch.tensor([0.5, 2.0]), 256)
    out = network.backbone(
        x, network.time(t), cond["text"], timestep_cond=embedding, return_dict=False
    )[0]
    c_skip, c_out = network.coefficients(*network.process.at(t, x))
    torch.testing.assert_close(student(x, t, scaled(cond, 1.5, 3.0)), c_skip * x + c_out * out)


def test_two_numbers_are_read_side_by_side_and_folded_together():
    teacher = load("digits")
    x, t, cond = inputs(teacher)
    generator = two_time(scale_reading(schedulers.student(teacher, 1), RANGE, 3.0))
    student = generator.denoiser
    assert isinstance(student, TwoTime)
    with torch.no_grad():
        for p in [*student.embedding.parameters(), *reading_of(student).embedding.parameters()]:
            p.add_(0.05 * torch.randn_like(p))
        expected = student(x, t, cond)
        assert (student(x, t, cond, t) - expected).abs().max() > 1e-6
        assert (student(x, t, scaled(cond, 1.0, 1.0)) - expected).abs().max() > 1e-6
        network = unwrap(student)
        changes = folds(generator, teacher.shape, cond)
        folded = network.twin(stock_backbone(student, changes), network.schedule)
        torch.testing.assert_close(folded(x, t, cond), expected, atol=1e-5, rtol=1e-4)
    assert current_shifts(network.backbone) is None


@pytest.mark.parametrize(
    ("name", "adapter"), [("shapes", None), ("shapes", Adapter(rank=2)), ("digits", None)]
)
def test_it_is_exported_in_a_stock_form_at_the_scale_of_its_samples(tmp_path, name, adapter):
    """Stock diffusers passes the scale of a copy of Stable Diffusion; of others one is folded."""
    teacher = load(name)
    student = scale_reading(schedulers.student(teacher, 2, adapter=adapter), RANGE, 2.0)
    moved(student.denoiser, 0.2)
    rehearse(student, teacher)  # compares pixels
    if (name, adapter) != ("shapes", None):
        return
    export(student, teacher, tmp_path / "student", {"objective": {"name": "none"}})  # again
    again, itself = load_student(tmp_path / "student")
    assert reading_of(again.denoiser).facts() == {
        "range": [1.0, 5.0], "scale": 2.0, "input": True,
    }  # fmt: skip
    prompts = ["a red circle", "a blue square"]
    torch.testing.assert_close(
        sample_student(again, itself, prompts, 7), sample_student(student, teacher, prompts, 7),
        atol=2e-4, rtol=1e-3,
    )  # fmt: skip


def test_scales_outside_the_range_are_read_as_its_ends():
    teacher = load("digits")
    x, t, cond = inputs(teacher)
    student = moved(ScaleReading(teacher.denoiser, RANGE, 3.0))
    with torch.no_grad():
        assert torch.equal(
            student(x, t, scaled(cond, 0.0, 9.0)), student(x, t, scaled(cond, 1.0, 5.0))
        )
