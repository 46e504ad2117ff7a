"""Students that read where their step lands: they start as their teacher, and export it folded."""

from copy import deepcopy

import pytest
import torch

from students import Generator, schedulers
from students.checkpointing import checkpointing
from students.export.folder import export, load_student, pipeline, rehearse, sample_student
from students.landing import folds, in_place, stock_backbone
from students.lora import Adapter, unwrap
from students.two_time import TwoTime, keep_slow, two_time
from teachers import UserError, conditions, load
from teachers.edm import checkpoints
from tests.helpers import edm_pickles, families
from tests.helpers.toys import Affine

FAMILIES = ["sd", "sdxl", "dit", "pixart-sigma", "sd3", "flux-dev", "sana", "lumina", "qwen",
            "zimage", "wan"]  # fmt: skip
SOURCES = ["digits", "shapes", *FAMILIES]


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
    """The network, its landing's embedding moved from where it adds nothing."""
    with torch.no_grad():
        for p in network.embedding.parameters():
            p.add_(scale * torch.randn_like(p))
    return network


def at(value, t):
    return torch.full_like(t, value)


@pytest.mark.parametrize("name", SOURCES)
def test_it_starts_as_its_teacher_bit_for_bit_and_then_reads_where_it_lands(teacher_of, name):
    teacher = teacher_of(name)
    x, t, cond = inputs(teacher)
    student = TwoTime(teacher.denoiser)
    with torch.no_grad():
        before = teacher.denoiser(x, t, cond)
        for s in (None, at(0.0, t), at(0.3, t), t):
            assert torch.equal(student(x, t, cond, s), before)
    moved(student)
    zero, half = student(x, t, cond, at(0.0, t)), student(x, t, cond, at(0.3, t))
    assert (zero - half).abs().max() > 1e-6
    assert torch.equal(student(x, t, cond), zero)
    with torch.no_grad():  # each sample has its own; and the teacher has none
        both = student(x, t, cond, torch.tensor([0.0, 0.3]))
        torch.testing.assert_close(both, torch.stack([zero[0], half[1]]), atol=1e-5, rtol=1e-5)
        assert torch.equal(teacher.denoiser(x, t, cond), before)
    half.square().sum().backward()
    assert all(p.grad.any() for p in student.embedding.parameters())


@pytest.mark.parametrize("name", SOURCES)
def test_a_folded_network_is_the_student_that_lands_at_0(teacher_of, name):
    teacher = teacher_of(name)
    x, t, cond = inputs(teacher)
    student = moved(TwoTime(teacher.denoiser.double()), 0.2).double()
    changes = folds(Generator(student), teacher.shape, cond)
    plain = unwrap(student).twin(stock_backbone(student, changes), unwrap(student).schedule)
    with torch.no_grad():
        before = teacher.denoiser(x, t, cond)
        found, expected = plain(x, t, cond), student(x, t, cond)
    assert (expected - before).abs().max() > 1e-5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    assert torch.equal(teacher.denoiser(x, t, cond), before)  # its own biases are not touched
    assert plain.backbone.state_dict().keys() == teacher.denoiser.backbone.state_dict().keys()


def test_folding_adds_the_embedding_of_0_to_the_bias():
    teacher = load("digits")
    student = moved(TwoTime(teacher.denoiser))
    bias = teacher.denoiser.backbone.time_embedding.linear_2.bias
    changes = folds(Generator(student), teacher.shape, None)
    folded = stock_backbone(student, changes).time_embedding.linear_2.bias
    with torch.no_grad():
        torch.testing.assert_close(folded, bias + student.embedding(torch.zeros(1))[0][0])


@pytest.mark.parametrize("name", ["digits", "shapes", "dit"])
@pytest.mark.parametrize("adapter", [None, Adapter(rank=2)], ids=["copy", "adapter"])
def test_a_copy_and_an_adapter_read_it_in_deep_copies_and_state_dicts_alike(
    teacher_of, name, adapter
):
    teacher = teacher_of(name)
    x, t, cond = inputs(teacher)
    make = lambda: two_time(schedulers.student(teacher, 1, adapter=adapter)).denoiser  # noqa: E731
    student, other = moved(make()), make()
    twin = deepcopy(student)
    other.load_state_dict(student.state_dict())
    with torch.no_grad():
        expected = student(x, t, cond, at(0.3, t))
        assert torch.equal(twin(x, t, cond, at(0.3, t)), expected)
        assert torch.equal(other(x, t, cond, at(0.3, t)), expected)
        moved(twin)
        assert not torch.equal(twin(x, t, cond, at(0.3, t)), expected)
        assert torch.equal(student(x, t, cond, at(0.3, t)), expected)


@pytest.mark.parametrize("name", ["digits", "dit"])  # DiT's time embedding is inside its blocks
def test_checkpointed_blocks_are_recomputed_under_their_own_landing(teacher_of, name):
    teacher = teacher_of(name)
    x, t, cond = inputs(teacher)
    student = moved(two_time(schedulers.student(teacher, 1, adapter=Adapter(rank=2))).denoiser, 0.3)
    student.requires_grad_(True)

    def gradients():
        made = student(x, t, cond, at(0.3, t))
        with torch.no_grad():
            student(x, t, cond, at(0.8, t))
            teacher.denoiser(x, t, cond)
        return torch.autograd.grad(made.square().sum(), list(student.embedding.parameters()))

    plain = gradients()
    checkpointing(unwrap(student).backbone)
    unwrap(student).backbone.train()
    for expected, found in zip(plain, gradients(), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("renoise", "expected"),
    [(False, [0.6, 0.3, 0.0]), (True, [0.0, 0.0, 0.0])],
    ids=["along the ODE", "renoising"],
)
def test_a_generator_hands_each_step_the_time_it_lands_on(renoise, expected):
    landings = []

    class Spy(Affine):
        def forward(self, x_t, t, cond=None, s=None):
            landings.append(s.tolist())
            return super().forward(x_t, t)

    student = Generator(Spy(torch.zeros(2), torch.eye(2)), (1.0, 0.6, 0.3), renoise)
    student(torch.randn(2, 2))
    assert [v for v, _ in landings] == pytest.approx(expected)
    student.rollout(torch.randn(3, 2))
    assert landings[-1] == [0.0, 0.0, 0.0]  # x̂ is read as data


# ---- export


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("digits", None), ("shapes", Adapter(rank=2)),
     *(pytest.param(n, a, marks=pytest.mark.slow)
       for n, a in (("digits", Adapter(rank=2)), ("shapes", None)))],
    ids=["digits-copy", "shapes-adapter", "digits-adapter", "shapes-copy"],
)  # fmt: skip
def test_a_student_that_lands_at_0_is_exported_as_a_stock_folder(tmp_path, name, adapter):
    """Stock diffusers draws a student whose landing time is folded into its weights."""
    teacher = load(name)
    student = two_time(schedulers.student(teacher, 2, adapter=adapter))
    moved(student.denoiser)
    rehearse(student, teacher)  # compares pixels
    export(student, teacher, tmp_path / "student", {"objective": {"name": "none"}})  # again
    again, itself = load_student(tmp_path / "student")
    prompts = [1, 2] if name == "digits" else ["a red circle", "a blue square"]
    found = sample_student(again, itself, prompts, 7)
    torch.testing.assert_close(
        found, sample_student(student, teacher, prompts, 7), atol=2e-4, rtol=1e-3
    )


def test_one_time_with_several_landings_is_refused_before_it_trains():
    teacher = load("shapes")
    student = two_time(schedulers.student(teacher, 2, renoise=False))
    with pytest.raises(UserError, match=r"^student\.counts: .*set it to \[2\]"):
        rehearse(student, teacher)
    assert pipeline(student.keep(1), teacher) is not None  # one step lands at 0


@pytest.mark.parametrize("name", SOURCES)
def test_a_folded_chain_is_the_student_at_each_of_its_times(teacher_of, name):
    teacher = teacher_of(name)
    x, _, cond = inputs(teacher, 3)
    cond = conditions.rows(cond, torch.tensor([0, 1, 0]))
    student = moved(TwoTime(teacher.denoiser.double()), 0.2).double()
    t, s = torch.tensor([1.0, 0.75, 0.5]).double(), torch.tensor([0.75, 0.5, 0.0]).double()
    changes = folds(Generator(student, t.tolist(), renoise=False).keep(3), teacher.shape, cond)
    plain = unwrap(student).twin(stock_backbone(student, changes), unwrap(student).schedule)
    with torch.no_grad():
        before = teacher.denoiser(x, t, cond)
        found, expected = plain(x, t, cond), student(x, t, cond, s)
        with in_place(student, changes):
            within = teacher.denoiser(x, t, cond)
    assert (expected - before).abs().max() > 1e-5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(within, found, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "adapter"), [("digits", None), ("shapes", Adapter(rank=2))], ids=["copy", "adapter"]
)
def test_a_chain_along_the_ode_runs_in_a_stock_pipeline_at_its_one_count(name, adapter):
    teacher = load(name)
    student = two_time(schedulers.student(teacher, 4, renoise=False, adapter=adapter)).keep(4)
    moved(student.denoiser)
    rehearse(student, teacher)  # compares pixels
    with torch.no_grad():  # and not by chance: the landings matter
        student.denoiser.embedding.out.weight.add_(0.1)
    prompts = [1, 2] if name == "digits" else ["a red circle", "a blue square"]
    first = sample_student(student, teacher, prompts, 7)
    zeroed = deepcopy(student)
    zeroed.denoiser.forward = lambda x, t, cond, s: type(student.denoiser).forward(
        zeroed.denoiser, x, t, cond, 0 * s
    )
    assert (sample_student(zeroed, teacher, prompts, 7) - first).abs().max() > 1e-3
    rehearse(student, teacher)


def test_times_that_a_network_does_not_tell_apart_cannot_be_folded():
    teacher = load("digits")
    student = moved(two_time(schedulers.student(teacher, 2)).denoiser)
    cond = teacher.codec.condition([1])
    with torch.no_grad():
        unwrap(student).backbone.time_embedding.linear_1.weight.zero_()
    with pytest.raises(UserError, match=r"^student\.steps: .* 2 steps apart"):
        folds(Generator(student, (1.0, 0.5), renoise=False).keep(2), teacher.shape, cond)


def test_a_network_without_a_bias_in_its_time_embedding_is_refused(tmp_path):
    known, _ = edm_pickles.golden()
    source = tmp_path / "edm2"
    checkpoints.convert(edm_pickles.save(known["edm2-pixels"], tmp_path / "edm2.pkl"), source)
    teacher = load(str(source))
    student = two_time(schedulers.student(teacher, 1))
    x, t, cond = inputs(teacher)
    moved(student.denoiser)
    with torch.no_grad():
        gap = student.denoiser(x, t, cond) - student.denoiser(x, t, cond, at(0.5, t))
    assert gap.abs().max() > 1e-6
    with pytest.raises(UserError, match="no bias to fold the landing time into"):
        rehearse(student, teacher)


@pytest.mark.parametrize("name", ["ddpmpp-labels", "adm"])
def test_edms_networks_read_it_and_bring_it_in_their_own_source(tmp_path, name):
    known, _ = edm_pickles.golden()
    source = tmp_path / name
    checkpoints.convert(edm_pickles.save(known[name], tmp_path / f"{name}.pkl"), source)
    teacher = load(str(source))
    x, t, cond = inputs(teacher)
    student = two_time(schedulers.student(teacher, 1))
    with torch.no_grad():
        assert torch.equal(student.denoiser(x, t, cond), student.denoiser.denoiser(x, t, cond))
    moved(student.denoiser)
    rehearse(student, teacher)  # compares pixels


def test_a_closed_form_has_no_time_embedding():
    with pytest.raises(UserError, match="no weights"):
        TwoTime(load("analytic:ring").denoiser)


def test_sinusoids_that_a_student_does_not_read_at_first_stay_unread():
    teacher = load("digits")
    student = two_time(schedulers.student(teacher, 1)).denoiser
    keep_slow(student)
    first = unwrap(student).backbone.time_embedding.linear_1
    read = first.weight.any(0)
    assert 0 < read.sum() < len(read)
    x, t, cond = inputs(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    student(x, t, cond, at(0.1, t)).square().sum().backward()
    before = first.weight.detach().clone()
    optimizer.step()
    assert torch.equal(first.weight.any(0), read)
    assert (first.weight[:, read] != before[:, read]).any()


def test_an_adapters_shared_time_embedding_stays_frozen():
    teacher = load("digits")
    student = two_time(schedulers.student(teacher, 1, adapter=Adapter(rank=2))).denoiser
    assert not unwrap(student).backbone.time_embedding.linear_1.weight.requires_grad
