"""Convolutions of several experts: A-SDM's, mixed for each sample."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from students.architecture.change import changed
from students.architecture.units import size_of
from students.export import folder as folders
from students.lora import network_of
from students.schedulers import source_of
from students.schedulers import student as student_of
from teachers import load
from teachers.errors import UserError
from teachers.reduced.experts import Experts
from tests.students.test_architecture import inputs

CONV = "up_blocks.0.resnets.0.conv1"


def apart(made):
    """The experts, in place, each with weights of its own and a router that prefers."""
    torch.manual_seed(2)
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"stride": 2}, {"groups": 2, "bias": False}, {"dilation": 2}]
)
def test_equal_experts_are_the_convolution_whatever_the_router_says(settings):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, **settings), torch.randn(5, 4, 8, 8)
    made = Experts(conv, 3)
    nn.init.normal_(made.router.weight, std=5.0)
    torch.testing.assert_close(made(x), conv(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"padding": 1}, {"groups": 2, "bias": False}])
def test_each_sample_has_the_mixture_of_its_own_router(settings):
    """By hand, sample by sample; so a batch is no other than its samples alone."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, **settings), torch.randn(2, 4, 8, 8)
    made = apart(Experts(conv, 3))
    alone = [made(v[None])[0] for v in x]
    for sample, both, single in zip(x, made(x), alone, strict=True):
        shares = (made.router.weight @ sample.mean((1, 2)) + made.router.bias).softmax(0)
        weight = sum(a * w for a, w in zip(shares, made.weight, strict=True))
        bias = None if made.bias is None else shares @ made.bias
        expected = nn.functional.conv2d(sample, weight, bias, padding=conv.padding,
                                        groups=conv.groups)  # fmt: skip
        torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(single, both, atol=1e-5, rtol=1e-5)


def test_a_router_that_is_sure_takes_one_expert():
    made = apart(Experts(nn.Conv2d(4, 6, 3), 3))
    nn.init.zeros_(made.router.weight)
    made.router.bias.data = torch.tensor([0.0, 60.0, 0.0])
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(made(x), nn.functional.conv2d(x, made.weight[1], made.bias[1]))


def test_experts_begin_equal_and_learn_apart():
    torch.manual_seed(0)
    made = Experts(nn.Conv2d(4, 6, 3), 3)
    made(torch.randn(5, 4, 8, 8)).square().mean().backward()
    first, second = made.weight.grad[:2]
    assert first.abs().sum() > 0 and not torch.allclose(first, second)


def test_a_network_of_experts_is_the_teacher_before_training():
    loaded = load("shapes")
    network = source_of(loaded)
    made = changed(network.backbone, {}, {}, [], change={CONV: {"kind": "experts", "count": 4}})
    conv = network.backbone.get_submodule(CONV)
    more = 3 * size_of(conv) + 4 * (conv.in_channels + 1)
    assert size_of(made) == size_of(network.backbone) + more
    x_t, t, cond = inputs(loaded)
    with torch.no_grad():
        found = network.twin(made.eval(), network.schedule)(x_t, t, cond)
        torch.testing.assert_close(found, network(x_t, t, cond), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("mid_block.resnets.0", {}, "give a convolution"),
        (CONV, {"count": 1}, "count: give 2 or more"),
        (CONV, {"count": True}, "count: give 2 or more"),
        (CONV, {"many": 2}, "has count"),
    ],
)
def test_what_cannot_have_experts_is_refused(name, settings, words):
    form = {name: {"kind": "experts", **settings}}
    with pytest.raises(UserError, match=words) as error:
        changed(load("shapes").denoiser.backbone, {}, {}, [], change=form)
    assert error.value.key == f"student.architecture.change.{name}"


def test_a_network_of_experts_leaves_as_a_folder(tmp_path):
    """It takes some seconds: the folder is loaded in another process, whose pixels are compared."""
    teacher = load("shapes")
    network = source_of(teacher)
    made = changed(network.backbone, {}, {}, [], change={CONV: {"kind": "experts"}})
    made.get_submodule(CONV).weight.data[1] *= 1.5
    teacher = replace(teacher, denoiser=network.twin(made.eval(), network.schedule))
    folders.export(student_of(teacher), teacher, tmp_path / "student", {})
    generator, _ = folders.load_student(tmp_path / "student")
    again = network_of(generator.denoiser).backbone.get_submodule(CONV)
    assert isinstance(again, Experts)
    assert torch.equal(again.weight, made.get_submodule(CONV).weight)
