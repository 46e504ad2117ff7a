"""Times near 0 that a network reads as one (E-TSDM): in teachers, in students and their exports."""

import math

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.objectives.consistency.scm import ContinuousConsistency, Weighting
from distill.objectives.flow_maps.meanflow import MeanFlow
from distill.objectives.noise_levels import Uniform
from distill.objectives.tangent import tangent
from distill.pairs.settings import teacher_identity
from distill.sampling.baselines import Baseline
from distill.sampling.guided_teacher import load_teacher, share_times
from distill.training.networks import build_networks
from students import own_network, schedulers
from students.export import own_folder
from students.export.folder import rehearse
from students.generator import Generator
from students.lora import network_of
from teachers import Linear, Network, load
from teachers.analytic import Gaussian
from teachers.denoiser import SharedTimes
from teachers.process import Karras, Trig
from tests.helpers import families, own
from tests.helpers.refusals import refused

D = torch.float64
FIFTHS = SharedTimes(0.1, 5)


class Wave(nn.Module):
    """F(x, t) = w x sin(40 t), whose derivative along t is known; it keeps the times it reads."""

    def __init__(self):
        super().__init__()
        self.w, self.read = nn.Parameter(torch.ones((), dtype=D)), []

    def forward(self, x, t):
        self.read.append(t.detach())
        return self.w * x * torch.sin(40 * t)[:, None]


def wave(process=None, predicts="flow", share=FIFTHS):
    network = Network(Wave(), process or Linear(), predicts)
    network.share_times = share
    return network


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_an_interval_has_the_time_at_which_it_begins(dtype):
    t = torch.tensor([0, 0.019, 0.02, 0.039, 0.06, 0.0999, 0.1, 0.5, 1], dtype=dtype)
    found = FIFTHS(t)
    expected = torch.tensor([0, 0, 0.02, 0.02, 0.06, 0.08, 0.1, 0.5, 1], dtype=dtype)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[t >= 0.1], t[t >= 0.1])  # to the bit
    assert torch.equal(FIFTHS(found), found) and found.dtype == dtype


def test_beginnings_are_their_own_for_any_number_of_intervals():
    for below, intervals in ((0.1, 7), (0.3, 64), (1.0, 1000)):
        begins = torch.arange(intervals) * below / intervals
        torch.testing.assert_close(SharedTimes(below, intervals)(begins), begins)


@pytest.mark.parametrize("share", [None, SharedTimes(0.1, 0)])
def test_without_intervals_nothing_changes(share):
    t, x = torch.linspace(0, 1, 11, dtype=D), torch.ones(11, 3, dtype=D)
    assert SharedTimes(0.1, 0)(t) is t
    network = wave(share=share)
    assert torch.equal(network(x, t), x - t[:, None] * (x * torch.sin(40 * t)[:, None]))


@pytest.mark.parametrize(
    ("process", "predicts"), [(Linear(), "flow"), (Karras(), "edm"), (Trig(0.5), "eps")], ids=str
)
def test_the_network_reads_one_time_and_its_coefficients_the_true_one(process, predicts):
    network = wave(process, predicts)
    t = torch.tensor([0.041, 0.05, 0.0599], dtype=D)
    x = torch.ones(3, 2, dtype=D)
    found = network(x, t)
    torch.testing.assert_close(network.backbone.read[0], torch.full((3,), 0.04, dtype=D))
    c_skip, c_out = network.coefficients(*process.at(t, x))
    expected = c_skip * x + c_out * x * torch.sin(torch.tensor(1.6, dtype=D))
    torch.testing.assert_close(found, expected)
    assert found[:, 0].diff().all()  # x̂ moves with the true α and σ
    torch.testing.assert_close(network.weight(t), c_out[:, 0] ** -2)


def test_the_output_has_no_derivative_along_time_inside_an_interval():
    network, x = wave(predicts="x"), torch.ones(3, 2, dtype=D)
    t = torch.tensor([0.05, 0.0999, 0.3], dtype=D)
    for how, rounding in (("forward", 1e-12), ("difference", 1e-2)):
        slope = tangent(network, (x, t), (0 * x, torch.ones_like(t)), how, 1e-5)[1][:, 0]
        expected = torch.tensor([0, 0, 40 * math.cos(12)], dtype=D)
        torch.testing.assert_close(slope, expected, atol=rounding, rtol=0)
    # x̂ of a flow is x - t F: only the coefficient moves
    slope = tangent(wave(), (x, t), (0 * x, torch.ones_like(t)))[1][:, 0]
    expected = -torch.sin(40 * FIFTHS(t)) - t * torch.tensor([0, 0, 1]) * 40 * torch.cos(40 * t)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("kind", [ContinuousConsistency, MeanFlow])
def test_objectives_that_differentiate_along_time_are_finite(kind):
    keys = {"times": Uniform(0.0, 0.0999)}
    keys |= {"equal": 0.0} if kind is MeanFlow else {"weighting": Weighting().double()}
    teacher = Gaussian(torch.zeros(2, dtype=D), torch.ones(2, dtype=D), Linear())
    student = Generator(wave())
    objective = kind(teacher=teacher, student=student, **keys)
    torch.manual_seed(0)
    batch = Batch(torch.randn(6, 2, dtype=D), torch.randn(6, 2, dtype=D))
    loss = objective.loss(batch, 1).value
    loss.backward()
    assert loss.isfinite() and student.denoiser.backbone.w.grad.isfinite()


@pytest.mark.parametrize("name", ["digits", "shapes", "sd", "dit", "sd3", "lumina"])
def test_every_familys_network_reads_the_shared_time(folders, name):
    embedded = name in ("digits", "shapes")
    teacher = load(name if embedded else folders(name), **families.OPTIONS.get(name, {}))
    network = network_of(teacher.denoiser)
    prompts = [1, 2] if teacher.codec.classes else ["a red circle", "two boats"]
    cond, x = teacher.codec.condition(prompts), torch.randn(2, *teacher.shape)
    t, begin = torch.tensor([0.05, 0.4]), torch.tensor([0.04, 0.4])
    with torch.no_grad():
        output = network.call(x, begin, cond, None)
        plain = network(x, t, cond)
        network.share_times = FIFTHS
        c_skip, c_out = network.coefficients(*network.process.at(t, x))
        found = network(x, t, cond)
        torch.testing.assert_close(found, c_skip * x + c_out * output[:, : x.shape[1]])
        assert torch.equal(found[1], plain[1]) or (found[1] - plain[1]).abs().max() < 1e-5
        twin = network.twin(network.backbone, network.schedule)
        assert torch.equal(twin(x, t, cond), found)


# ---- recipes


def recipe(teacher=None, student=None, **sections):
    tree = {
        "teacher": {"source": "digits", **(teacher or {})},
        "student": {"steps": 2, **(student or {})},
        "objective": {"name": "dmd2"},
        "data": {"source": "digits"},
        "train": {"steps": 1},
        **sections,
    }
    return Recipe.check(tree, "recipe")


@pytest.mark.parametrize("adapters", [{}, {"adapters": {"rank": 2}}], ids=["copy", "adapter"])
def test_a_recipe_says_which_networks_share_times(adapters):
    share = {"share_times": {"below": 0.1, "intervals": 4}}
    for teacher, student, expected in (
        ({}, {}, (None, None)),
        ({}, share, (None, SharedTimes(0.1, 4))),
        (share, {}, (SharedTimes(0.1, 4), SharedTimes(0.1, 4))),
        (share, {"share_times": {"intervals": 0}}, (SharedTimes(0.1, 4), SharedTimes(0.1, 0))),
    ):
        made = recipe(teacher, student, **adapters)
        networks = build_networks(made, load_teacher(made.teacher))
        shares = {k: network_of(getattr(v, "denoiser", v) if k == "student" else v).share_times
                  for k, v in networks.items()}  # fmt: skip
        assert (shares["teacher"], shares["student"]) == expected
        assert shares["fake"] == expected[0]


def test_the_default_is_the_papers_share():
    section = recipe(student={"share_times": {}}).student.share_times
    assert section is not None and section.shared == FIFTHS  # the first 100 of 1000 indices


def test_a_closed_form_has_no_network_to_share_times():
    section = recipe({"share_times": {}}).teacher.share_times
    with refused("teacher.share_times"):
        share_times(Gaussian(torch.zeros(2), torch.ones(2), Linear()), section, "teacher")


def test_pairs_of_a_teacher_that_shares_times_are_others():
    plain, shared = recipe(), recipe({"share_times": {}})
    teacher = load_teacher(plain.teacher)
    first, second = (teacher_identity(r.teacher, teacher) for r in (plain, shared))
    assert "share_times" not in first and second["share_times"] == {"below": 0.1, "intervals": 5}


def test_a_stock_pipeline_of_such_a_teacher_is_no_baseline():
    made = recipe({"share_times": {}})
    teacher = load_teacher(made.teacher)
    Baseline(steps=(4,), solver="heun").check(made, teacher)
    with refused("baselines", "share_times"):
        Baseline(steps=(4,), scheduler="EDMEulerScheduler").check(made, teacher)


# ---- exports


def shifted_student(teacher, steps, share):
    student = schedulers.student(teacher, steps)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    network_of(student.denoiser).share_times = share
    return student.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_a_student_of_later_times_leaves_for_its_stock_pipeline(name):
    teacher = load(name)
    rehearse(shifted_student(teacher, 2, SharedTimes(0.4, 5)), teacher)  # compares pixels


def test_a_student_of_shared_times_is_refused_before_training():
    teacher = load("digits")
    student = shifted_student(teacher, 4, SharedTimes(0.6, 2))
    times = student.times
    with refused("student.share_times", f"{times[2]:.4g}"):
        rehearse(student, teacher)
    rehearse(student.at(2).keep(1), teacher)  # its step is above
    network_of(student.denoiser).share_times = SharedTimes(2 * times[2], 2)  # an interval begins
    schedulers.check_read_times(student.keep(2))


@pytest.mark.parametrize("renoise", [True, False])
def test_a_network_of_ones_own_leaves_with_the_times_that_it_reads(renoise, tmp_path):
    teacher = load(f"{own.write(tmp_path, own.CONV)}:three")
    student = own_network.student(teacher, 4, None, renoise, None)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    network_of(student.denoiser).share_times = SharedTimes(0.6, 1)  # the last two read 0
    own_folder.rehearse(student.eval().requires_grad_(False), teacher)  # compares samples
    places = own_folder.chain(own_folder.merged(student), 4)
    assert [p["network_t"] for p in places] == [1.0, 0.75, 0.0, 0.0]
    assert [p["t"] for p in places] == [1.0, 0.75, 0.5, 0.25]
