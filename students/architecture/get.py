"""GET: a transformer of noise whose last blocks are iterated towards a fixed point.

Geng et al. 2023, "One-Step Diffusion Distillation via Deep Equilibrium Models" (arXiv:2401.08639;
code: locuslab/get). Injection blocks read the noise once. They give each equilibrium block
something to add to its queries, keys and values; those blocks are applied again and again, first to
a random z. Each of the iterates is decoded to an x̂ of its own, and all of them learn
(`objective.output_decay`). More iterations than in training can be run at sampling.

Differs from the paper: z is no new draw at every call but a function of the noise, so that a sample
depends on its noise alone, and another process draws equal ones. It is another normal z for other
noise. The paper's sizes are for 32 × 32 pixels; here are those for 8 × 8.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.denoiser import Network
from teachers.errors import UserError
from teachers.teacher import Teacher

KEY = "student.architecture.network"  # the recipe key
LABELS = "class_labels"  # the condition that it reads


def get(teacher: Teacher) -> Network:
    """A new GET for a teacher's data, which predicts x.

    Raises:
        UserError: they are no images with even sides, or their condition is no label.
    """
    shape, codec = teacher.shape, teacher.codec
    if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
        raise UserError(
            f"{KEY}: get cuts images into patches of 2 × 2, and this teacher's data are "
            f"{'×'.join(map(str, shape))}; write a network for them in a file of your own"
        )
    if (cond := codec.condition([0])) is not None and (not codec.classes or set(cond) != {LABELS}):
        raise UserError(
            f"{KEY}: get reads labels, and this teacher's condition is {', '.join(cond)}; write a "
            "network that reads it in a file of your own"
        )
    process = teacher.denoiser.process
    labels = 0 if cond is None else codec.classes + (codec.null_label is not None)
    backbone = GET(list(shape), labels)
    backbone.scale = process.scales(torch.ones((), dtype=torch.float64))[1].reciprocal().float()
    return Network(backbone, process, "x")


class GET(nn.Module):
    """F(x_t, t, cond): x̂ of noise x_t. It reads no time.

    Args:
        shape: Channels, height and width of the data; the sides are even.
        labels: How many labels there are; 0 reads none.
        width, heads: Of the tokens, one for 2 × 2 pixels.
        injection, equilibrium: How many blocks of each kind.
        iterations: How often the equilibrium blocks are applied.
        ratio: Of the equilibrium blocks' hidden width to `width`; the injection blocks' is 4.

    Attributes:
        scale: What x_t is multiplied by to be unit noise, a number.
    """

    def __init__(
        self,
        shape: list[int],
        labels: int = 0,
        width: int = 64,
        heads: int = 4,
        injection: int = 3,
        equilibrium: int = 2,
        iterations: int = 6,
        ratio: int = 6,
    ) -> None:
        super().__init__()
        self.shape, self.labels, self.width, self.heads = shape, labels, width, heads
        self.injection, self.equilibrium = injection, equilibrium
        self.iterations, self.ratio = iterations, ratio
        self.scale: Tensor
        self.places: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.embed = nn.Conv2d(shape[0], width, 2, 2)
        self.register_buffer("places", positions(shape[1] // 2, shape[2] // 2, width))
        self.label = nn.Embedding(labels, 3 * width) if labels else None
        self.blocks = nn.ModuleList(Block(width, heads, 4) for _ in range(injection))
        self.inject = nn.Linear(width, 3 * width * equilibrium, bias=False)
        self.steps = nn.ModuleList(Block(width, heads, ratio) for _ in range(equilibrium))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * shape[0])
        self.apply(begin)
        nn.init.zeros_(self.head.weight)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """x̂ (B, C, H, W) of the last iterate."""
        return self.outputs(x_t, t, cond)[:, -1]

    def outputs(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """x̂ (B, K, C, H, W) of each of K iterates."""
        noise = self.scale * x_t
        h = self.embed(noise).flatten(2).transpose(1, 2) + self.places
        c = None
        if self.label is not None and cond is not None:
            c = self.label(cond["class_labels"])[:, None]
        for block in self.blocks:
            h = block(h, c)
        added = self.inject(h).chunk(self.equilibrium, -1)
        z = normal_of(noise, h[0].numel()).to(h.dtype).view_as(h)
        outputs = []
        for _ in range(self.iterations):
            z = self.step(z, c, added)
            outputs.append(self.decoded(z))
        return torch.stack(outputs, 1)

    def step(self, z: Tensor, c: Tensor | None, added: tuple[Tensor, ...]) -> Tensor:
        """The next iterate (B, N, width) after z, by all equilibrium blocks."""
        for block, u in zip(self.steps, added, strict=True):
            z = block(z, c, u)
        return z

    def decoded(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) of tokens (B, N, width)."""
        channels, height, width = self.shape
        x = self.head(self.norm(z)).view(-1, height // 2, width // 2, 2, 2, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)


class Block(nn.Module):
    """A transformer's block, to whose queries, keys and values something is added."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, c: Tensor | None = None, u: Tensor | None = None) -> Tensor:
        """Tokens (B, N, width); c (B, 1, 3 width) and u (B, N, 3 width) are added."""
        qkv = self.qkv(self.first(x))
        for more in (c, u):
            qkv = qkv if more is None else qkv + more
        parts = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in qkv.chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


def begin(module: nn.Module) -> None:
    """Draw a module's weights before training, as the paper's code does."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def positions(height: int, width: int, size: int) -> Tensor:
    """Sines and cosines (height · width, size) of rows and columns."""
    rates = 10000 ** -(torch.arange(size // 4) / (size / 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)


def normal_of(x: Tensor, size: int) -> Tensor:
    """Unit normal numbers (B, size), in float32, that each sample of x (B, ...) alone decides.

    They are those of a counter-based generator whose seed is a sum over the sample, rounded to a
    thousandth: rounding errors rarely change it, and other noise has another one.
    """
    values = (x.detach().float().flatten(1) * 1024).round().long()
    seed = (values * mixed(torch.arange(values.shape[1], device=x.device))).sum(1)
    bits = mixed(seed[:, None] + mixed(torch.arange(size, device=x.device) + (1 << 40)))
    uniform = (((bits >> 41) & ((1 << 23) - 1)).float() + 0.5) / (1 << 23)
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


def mixed(n: Tensor) -> Tensor:
    """Integers of 64 bits that look random, of integers; the finaliser of SplitMix64."""
    n = n * -7046029254386353131
    n = (n ^ ((n >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    n = (n ^ ((n >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return n ^ ((n >> 31) & ((1 << 33) - 1))
