"""CD and ECT: loss and gradient as the authors' code computes them, written anew in σ alone."""

import pytest
import torch
from torch import nn

from distill.objectives.base import Batch
from distill.objectives.consistency.consistency import Consistency, ConsistencyTuning
from distill.objectives.noise_levels import LogNormal
from students.generator import Generator
from teachers.analytic import Mixture
from teachers.denoiser import Denoiser
from teachers.process import Karras, expand

D = torch.float64


class Small(Denoiser):
    """A network of σ with two weights."""

    def __init__(self):
        super().__init__()
        self.process = Karras()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=D)) for v in (0.7, 0.2))

    def at(self, x, sigma):
        return torch.tanh(self.a * x / (1 + sigma)) + self.b * sigma / (1 + sigma)

    def forward(self, x_t, t, cond=None, s=None):
        return self.at(x_t, expand(self.process.scales(t)[1], x_t))


def both(kind, reference, monkeypatch, **keys):
    """Loss and gradients of the objective and of the reference at the same times."""
    network = Small()
    teacher = Mixture(torch.tensor([[1.0, -0.5], [-0.8, 0.6]], dtype=D), 0.2)
    objective = kind(teacher=teacher, student=Generator(network), **keys)
    torch.manual_seed(0)
    given = Batch(torch.randn(64, 2, dtype=D), torch.randn(64, 2, dtype=D))
    found = []
    for loss in (
        lambda: objective.loss(given, 3).value,
        lambda: reference(network, teacher, given),
    ):
        torch.manual_seed(1)
        value = loss()
        found.append((value, *torch.autograd.grad(value, [network.a, network.b])))
    return found


def test_ect_is_the_published_loss(monkeypatch):
    sigma = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=D).mul(0.5).exp()
    monkeypatch.setattr(LogNormal, "sample", lambda *_: Karras().time(sigma))

    def published(network, teacher, given, q=2.0, stage=1, c=0.03):
        x, eps, t = given.data, given.noise, sigma[:, None]
        ratio = 1 - (1 + 8 * torch.sigmoid(-t)) / q ** (stage + 1)
        r = (t * ratio).clamp(min=0)
        with torch.no_grad():
            target = torch.where(r > 0, network.at(x + r * eps, r), x)
        square = (network.at(x + t * eps, t) - target).square().sum(1)
        return (((square + c**2).sqrt() - c) / (t - r)[:, 0]).mean()

    ours, theirs = both(
        ConsistencyTuning, published, monkeypatch, q=2.0, stage_steps=3, huber_c=0.03
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("levels", [18, 40])
def test_cd_is_the_published_loss(levels, monkeypatch):
    """The authors average the squares over dimensions, where ours are summed."""

    def published(network, teacher, given):
        cell = torch.randint(levels - 1, (64,))
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        grid = (high + torch.arange(levels, dtype=D) / (levels - 1) * (low - high)) ** 7
        t, r = grid[levels - 2 - cell][:, None], grid[levels - 1 - cell][:, None]
        process = Karras()
        x = given.data + t * given.noise
        slope = (x - teacher(x, process.time(t[:, 0]))) / t
        euler = x + (r - t) * slope
        back = (euler - teacher(euler, process.time(r[:, 0]))) / r
        x_r = x + (r - t) * (slope + back) / 2
        with torch.no_grad():
            target = torch.where(r == grid[-1], x_r, network.at(x_r, r))
        return 2 * (network.at(x, t) - target).square().mean(1).mean()

    ours, theirs = both(
        Consistency, published, monkeypatch, pairs="grid", levels=levels, distance="square"
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
