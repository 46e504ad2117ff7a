"""GFT: its optimum is classifier-free guidance, at one evaluation and any scale."""

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.objectives.smaller.gft import GuidanceFree, mixed
from distill.training import build
from students.generator import Generator
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Denoiser, Guided
from teachers.process import Karras
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

D = torch.float64
MEANS = torch.tensor([-1.0, 2.0, 0.5], dtype=D)  # x̂ of label 0, of label 1, and of none (2)


class Lookup(Denoiser):
    """x̂ = m(label) + slope(label) (g - 1), whatever x_t is."""

    def __init__(self):
        super().__init__()
        self.process = Karras()
        self.mean = nn.Parameter(MEANS.clone())
        self.slope = nn.Parameter(torch.zeros(3, dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        label, g = cond["class_labels"], cond.get(GUIDANCE_SCALE, torch.ones(1, dtype=D))
        return (self.mean[label] + self.slope[label] * (g - 1))[:, None].expand_as(x_t)

    def weight(self, t):
        return torch.ones_like(t)


def made(drop=0.0):
    network = Lookup()
    null = {"class_labels": torch.tensor([2])}
    teacher = Guided(Lookup().requires_grad_(False), 3.0, null)
    return GuidanceFree(teacher=teacher, student=Generator(network), drop=drop), network


def batch_of(scale, n=64):
    """Data of mean MEANS[label], without noise of their own."""
    labels = torch.arange(n) % 2
    cond = {"class_labels": labels, GUIDANCE_SCALE: scale.expand(n)}
    return Batch(MEANS[labels][:, None], torch.randn(n, 1, dtype=D), cond)


def test_guidance_is_the_optimum_at_every_scale():
    objective, network = made()
    guided = MEANS[:2] - MEANS[2]  # the slope that makes x̂ = m(∅) + g (m(c) - m(∅))
    network.slope.data[:2] = guided
    for g in (1.0, 1.5, 3.0, 7.0):
        loss = objective.loss(batch_of(torch.tensor([g], dtype=D)), 0).value
        assert loss < 1e-28
    cond = {"class_labels": torch.tensor([0, 1]), GUIDANCE_SCALE: torch.full((2,), 3.0)}
    x = network(torch.zeros(2, 1, dtype=D), torch.ones(2, dtype=D), cond)
    torch.testing.assert_close(x[:, 0].detach(), MEANS[2] + 3 * guided)


def test_a_network_that_does_not_guide_is_moved_towards_guidance():
    objective, network = made()
    objective.loss(batch_of(torch.tensor([3.0], dtype=D)), 0).value.backward()
    # of label 0 the guided x̂ is lower, of label 1 higher
    assert network.slope.grad[0] > 0 > network.slope.grad[1]
    assert network.mean.grad[2] == 0  # the x̂ of no condition is held fixed


def test_training_ends_in_guidance():
    objective, network = made(drop=0.2)
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    torch.manual_seed(0)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.02 ** (step / 1500)
        scale = 1 + 4 * torch.rand(64, dtype=D)
        optimizer.zero_grad()
        objective.loss(batch_of(scale), 0).value.backward()
        optimizer.step()
    assert (network.mean[:2] - MEANS[:2]).abs().max() < 0.02
    # those without a condition have the mean of all data, whose labels are equally frequent
    empty = network.mean[2].item()
    assert empty == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(network.slope.detach()[:2], MEANS[:2] - empty, rtol=0.05, atol=0.05)


def test_scale_one_is_plain_training():
    objective, network = made()
    network.mean.data += 0.3
    loss = objective.loss(batch_of(torch.tensor([1.0], dtype=D)), 0).value
    assert loss.item() == pytest.approx(0.09)


def test_samples_without_their_condition_have_scale_one_too():
    objective, network = made(drop=1.0)
    network.slope.data[2] = 100.0  # would show at any other scale
    loss = objective.loss(batch_of(torch.tensor([5.0], dtype=D)), 0).value
    assert loss.item() == pytest.approx(((MEANS[:2] - MEANS[2]) ** 2).mean().item())


def test_the_mixture_by_hand():
    ours, none = torch.tensor([[4.0], [4.0]]), torch.tensor([[1.0], [1.0]])
    assert mixed(ours, none, torch.tensor([1.0, 3.0]))[:, 0].tolist() == [4.0, 2.0]


def test_one_scale_and_no_null_are_refused_before_any_work(pipelines, tmp_path):
    tree = recipe_tree("gft", pipelines["edm"])
    with refused("teacher.guidance", "range"):
        Recipe.check({**tree, "teacher": {**tree["teacher"], "guidance": 2.0}})
    del tree["teacher"]["null_label"]
    with refused("teacher.guidance", "null"):
        build.build(Recipe.check(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()
