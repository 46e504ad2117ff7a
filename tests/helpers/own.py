"""A network of a user's own whose one-step student is known, and recipes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The flow of N(mean, 0.5²) and a linear map of x_t. At t = 1 a student can say x̂ = mean + 0.5 z.
FLOW = """
import torch
from torch import nn

from teachers import Linear, Network, Pixels, Teacher

SIZE = 2


def linear(n):
    return nn.Linear(n, n)


class Net(nn.Module):
    def __init__(self, size=SIZE):
        super().__init__()
        self.size = size
        self.mean, self.log_std = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.extra = linear(size)
        nn.init.zeros_(self.extra.weight)
        nn.init.zeros_(self.extra.bias)

    def forward(self, x, t):
        a, s = (1 - t)[:, None], t[:, None]
        var = (2 * self.log_std).exp()
        gap, total = x - a * self.mean, a**2 * var + s**2
        return s / total * gap - self.mean - a * var / total * gap + s * self.extra(x)


def teacher():
    net = Net()
    with torch.no_grad():
        net.mean.copy_(torch.tensor([1.0, -1.0]))
        net.log_std.fill_(0.5).log_()
    return Teacher(Network(net, Linear(), "flow"), Pixels(), (SIZE,))


def data():
    draw = torch.Generator().manual_seed(0)
    return torch.tensor([1.0, -1.0]) + 0.5 * torch.randn(64, 2, generator=draw)


def score(samples, reference):
    gap = samples.mean(0) - reference.mean(0)
    return {"mean": gap.norm(), "std": (samples.std(0) - 0.5).norm()}
"""

# Convolutions of 1, 2 or 3 dimensions, labels, and a call of its own.
CONV = """
import torch
from torch import nn

from teachers import Karras, Network, Pixels, Teacher

SCALE = 0.25


def time_of(t):
    return (SCALE * t.log())[:, None]


class Net(nn.Module):
    def __init__(self, dims, classes=3):
        super().__init__()
        self.dims, self.classes = dims, classes
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.middle = conv(2, 8, 3, padding=1), conv(8, 8, 3, padding=1)
        self.last, self.told = conv(8, 2, 3, padding=1), nn.Linear(1, 8)
        self.label = nn.Embedding(classes, 8)

    def forward(self, x, sigma, label):
        told = self.told(time_of(sigma)) + self.label(label)
        h = self.first(x) + told.view(*told.shape, *(1,) * self.dims)
        return self.last(torch.tanh(self.middle(torch.tanh(h))))


class Mine(Network):
    gain = 1.5

    def call(self, x_t, t, cond, s):
        sigma = self.process_sigma * t + 0.01
        return self.gain * self.backbone(x_t, sigma, cond["class_labels"])

    process_sigma = 3.0


def of(dims):
    torch.manual_seed(0)
    network = Mine(Net(dims), Karras(0.02, 10.0), "edm")
    return Teacher(network, Pixels(classes=3), (2, 8) if dims == 1 else (2,) + (4,) * dims)


def one():
    return of(1)


def two():
    return of(2)


def three():
    return of(3)


def data():
    x = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(0))
    return x, [i % 3 for i in range(30)]
"""


def write(folder: Path, text: str = FLOW) -> Path:
    """A user's file, whose name differs from that of other tests: modules are read once."""
    path = folder / f"mine_{abs(hash(str(folder))) % 10**8}.py"
    path.write_text(text)
    return path


def recipe_tree(file: Path, name: str, teacher: str = "teacher", **changes: Any) -> dict:
    """A recipe of a few steps."""
    players = {"student": {"lr": 1e-2}}
    if name in ("dmd2", "sid", "fdistill"):
        players["fake"] = {"lr": 1e-2}
    tree: dict[str, Any] = {
        "teacher": f"{file}:{teacher}",
        "objective": {"name": name},
        "players": players,
        "train": {"steps": 4, "batch": 8, "save_every": 2, "log_every": 2},
    }
    return {k: {**tree.get(k, {}), **v} if isinstance(v, dict) else v
            for k, v in {**tree, **changes}.items()}  # fmt: skip
