"""Students whose landing time is mixed with the time (AnyFlow): their start, and their export."""

from copy import deepcopy

import pytest
import torch

from distill.config.recipe import Recipe
from students import Generator, schedulers
from students.checkpointing import checkpointing
from students.export.folder import rehearse
from students.landing import folds, in_place, stock_backbone
from students.lora import Adapter, unwrap
from students.scale_reading import scale_reading
from students.two_time import GATE, MixedTime, keep_slow, two_time
from teachers import UserError, conditions, load
from tests.helpers import families
from tests.helpers.refusals import refused

SOURCES = ["digits", "shapes", "sd", "sdxl", "dit", "pixart-sigma", "sd3", "wan"]


@pytest.fixture
def teacher_of(folders):
    def teacher(name):
        if name in ("digits", "shapes"):
            return load(name)
        return load(folders(name), **families.OPTIONS.get(name, {}))

    return teacher


def inputs(teacher, n=2):
    prompts = [1, 2] if getattr(teacher.codec, "classes", 0) else ["a red circle", "two boats"]
    x, t = torch.randn(n, *teacher.shape), torch.tensor([0.9, 0.4])
    return x, t, teacher.codec.condition(prompts)


def moved(network, scale=0.05):
    with torch.no_grad():
        for p in network.embedding.parameters():
            p.add_(scale * torch.randn_like(p))
    return network


@pytest.mark.parametrize("name", SOURCES)
def test_at_its_own_time_it_is_its_teacher_bit_for_bit_and_elsewhere_it_is_not(teacher_of, name):
    teacher = teacher_of(name)
    x, t, cond = inputs(teacher)
    student = MixedTime(teacher.denoiser)
    with torch.no_grad():
        before = teacher.denoiser(x, t, cond)
        assert torch.equal(student(x, t, cond, t), before)
        lower = student(x, t, cond, t / 2)
        assert (lower - before).abs().max() > 1e-6
        assert torch.equal(student(x, t, cond), student(x, t, cond, 0 * t))
        assert torch.equal(teacher.denoiser(x, t, cond), before)
        twin = moved(deepcopy(student))
        assert not torch.equal(twin(x, t, cond, t), before)
        assert torch.equal(student(x, t, cond, t), before)
    student(x, t, cond, t / 2).square().sum().backward()
    assert all(p.grad.any() for p in student.embedding.parameters())


def test_the_embedding_is_three_quarters_of_the_times_and_a_quarter_of_the_landings():
    teacher = load("digits")
    student, seen = MixedTime(teacher.denoiser), []
    x, t, cond = inputs(teacher)
    embedder = teacher.denoiser.backbone.time_embedding
    own = lambda v: embedder(teacher.denoiser.backbone.time_proj(teacher.denoiser.time(v)))  # noqa: E731
    with torch.no_grad():
        expected = (1 - GATE) * own(t) + GATE * own(t / 3)
        hook = embedder.register_forward_hook(lambda m, args, out: seen.append(out))
        student(x, t, cond, t / 3)
        hook.remove()
    torch.testing.assert_close(seen[-1], expected)


@pytest.mark.parametrize("name", SOURCES)
def test_a_folded_network_is_the_student_at_the_times_of_its_chain(teacher_of, name):
    teacher = teacher_of(name)
    x, _, cond = inputs(teacher, 3)
    cond = conditions.rows(cond, torch.tensor([0, 1, 0]))
    student = moved(MixedTime(teacher.denoiser.double()), 0.2).double()
    t, s = torch.tensor([1.0, 0.75, 0.5]).double(), torch.tensor([0.75, 0.5, 0.0]).double()
    for renoise, landing in ((True, 0 * s), (False, s)):
        generator = Generator(student, t.tolist(), renoise=renoise).keep(3)
        changes = folds(generator, teacher.shape, cond)
        plain = unwrap(student).twin(stock_backbone(student, changes), unwrap(student).schedule)
        with torch.no_grad():
            before = teacher.denoiser(x, t, cond)
            found, expected = plain(x, t, cond), student(x, t, cond, landing)
            with in_place(student, changes):
                within = teacher.denoiser(x, t, cond)
        assert (expected - before).abs().max() > 1e-5
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(within, found, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "adapter", "renoise"),
    [("digits", None, True), ("digits", None, False), ("shapes", Adapter(rank=2), False)],
)
def test_stock_pipelines_sample_it(name, adapter, renoise):
    teacher = load(name)
    student = two_time(schedulers.student(teacher, 2, None, renoise, adapter), mixed=True)
    moved(student.denoiser)
    rehearse(student if renoise else student.keep(2), teacher)  # compares pixels


def test_a_guidance_scale_is_added_after_the_mixing():
    teacher = load("digits")
    student = two_time(schedulers.student(teacher, 1), mixed=True)
    student = scale_reading(student, (1.0, 4.0), 2.0)
    moved(student.denoiser), moved(student.denoiser.denoiser)
    x, t, cond = inputs(teacher)
    changes = folds(student, teacher.shape, cond)
    assert [fold.kept for fold in changes] == [1 - GATE, 1]
    network = unwrap(student.denoiser)
    plain = network.twin(stock_backbone(student.denoiser, changes), network.schedule)
    with torch.no_grad():
        torch.testing.assert_close(plain(x, t, cond), student.denoiser(x, t, cond))


def test_checkpointed_blocks_are_recomputed_under_the_mixed_embedding(teacher_of):
    teacher = teacher_of("dit")  # its time embedding is inside its blocks
    x, t, cond = inputs(teacher)
    student = two_time(schedulers.student(teacher, 1, adapter=Adapter(rank=2)), mixed=True).denoiser
    moved(student).requires_grad_(True)
    unwrap(student).backbone.train()

    def gradients():
        torch.manual_seed(0)  # labels are dropped
        made = student(x, t, cond, t / 2)
        with torch.no_grad():
            student(x, t, cond, t / 4)
        return torch.autograd.grad(made.square().sum(), list(student.embedding.parameters()))

    plain = gradients()
    checkpointing(unwrap(student).backbone)
    for expected, found in zip(plain, gradients(), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_copys_fast_sinusoids_stay_unread_as_well():
    student = two_time(schedulers.student(load("digits"), 1), mixed=True).denoiser
    keep_slow(student)
    first = student.embedding[0].linear_1
    read = first.weight.any(0)
    assert 0 < read.sum() < len(read)
    x, t, cond = inputs(load("digits"))
    student(x, t, cond, t / 2).square().sum().backward()
    assert not first.weight.grad[:, ~read].any() and first.weight.grad[:, read].any()


def test_a_family_that_names_no_sinusoids_is_refused(teacher_of):
    with refused("student.landing"):
        two_time(Generator(teacher_of("flux-dev").denoiser), mixed=True)


def test_a_recipe_of_one_time_cannot_have_it():
    tree = {
        "teacher": "digits",
        "student": {"landing": "mixed"},
        "data": {"source": "digits"},
        "train": {"steps": 1},
    }
    with pytest.raises(UserError, match=r"student\.landing: ect trains no flow map"):
        Recipe.check({**tree, "objective": {"name": "ect"}}, "recipe")
    Recipe.check({**tree, "objective": {"name": "anyflow"}}, "recipe")
