"""Students of two times: the network reads where its step lands, beside where it starts.

Flow maps need it: CTM (arXiv:2310.02279), shortcut models (arXiv:2410.12557), MeanFlow
(arXiv:2505.13447), AYF (arXiv:2506.14603). An embedding of the landing time s is added to the
network's own embedding of t. Its last layer starts at zero, so the student starts as its teacher,
bit for bit. Or, as AnyFlow has it (arXiv:2605.13724), a copy of the time's embedder reads s, and
the two embeddings are mixed; then the student starts as its teacher where s = t. Most of these
methods differentiate along time, so that students keep to the smooth part of their time embedding
(`keep_slow`). `landing.py` exports such students to stock pipelines, which hand a network one time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from students.adapter_layers import base_layer
from students.generator import Generator
from students.lora import to_float32, unwrap
from teachers.denoiser import Cond, Denoiser, Wrapper
from teachers.errors import UserError
from teachers.families.base import Pretrained

FASTEST = 100.0  # radians per unit of s of the fastest sinusoid; the slowest has one
GATE = 0.25  # of s in a mixed embedding, AnyFlow's


class Shifts(NamedTuple):
    """What is added to the outputs of a backbone's time layers while it runs, or mixed with them.

    layers: the modules that `Pretrained.TIME` matches.
    values: for each of them, (B, channels).
    gates: for each of them, the value's share where it is mixed; None adds it.
    """

    layers: Sequence[nn.Module]
    values: Sequence[Tensor]
    gates: Sequence[float | None]


_SHIFTS: WeakKeyDictionary[nn.Module, Shifts] = WeakKeyDictionary()  # by backbone, while it runs


class NumberReading(Wrapper):
    """A denoiser whose network reads a number in [0, 1] beside its time, added to its embedding.

    Args:
        denoiser: A pretrained network, or an adapter on one.
        usual: The number with which stock pipelines call the network (`students/landing.py`).
        what: The number in words, for messages.

    Raises:
        UserError: its family names no time embedding.
    """

    embedding: nn.Module | None
    gate: float | None = None  # as `Shifts` has it

    def __init__(self, denoiser: Denoiser, usual: float, what: str) -> None:
        super().__init__(denoiser)
        self.usual = usual
        network = unwrap(denoiser)
        self.names = time_layers(network, what)
        self.embedding = self.new_embedding(network)
        self.embedding.to(next(network.backbone.parameters()).device)

    def new_embedding(self, network: Pretrained) -> nn.Module:
        """The embedding before training."""
        layers = [network.backbone.get_submodule(name) for name in self.names]
        return NumberEmbedding([channels(layer) for layer in layers])

    @property
    def device(self) -> torch.device:
        """That of the embedding."""
        assert self.embedding is not None
        return next(self.embedding.parameters()).device

    def embed(self, number: Tensor) -> Sequence[Tensor]:
        """The embedding (B, channels) of numbers (B,) for each of the time layers."""
        assert self.embedding is not None
        return self.embedding(number)

    def shifts(self, number: Tensor) -> Shifts:
        """What numbers (B,) add to the time layers of the backbone."""
        backbone = unwrap(self).backbone
        layers = [backbone.get_submodule(name) for name in self.names]
        return Shifts(layers, self.embed(number), [self.gate] * len(layers))

    def usual_shifts(self) -> Shifts:
        """What the number of stock pipelines adds, (1, channels) for each layer."""
        return self.shifts(torch.full((1,), self.usual, device=self.device))


class TwoTime(NumberReading):
    """A denoiser whose network reads the landing time s (B,); without s it lands at 0."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, 0.0, "a landing time")

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        s = torch.zeros_like(t) if s is None else s
        with shifted(unwrap(self).backbone, self.shifts(s)):
            return self.denoiser(x_t, t, cond, s)


class MixedTime(TwoTime):
    """A denoiser of two times whose network reads (1 - g) e(t) + g e'(s), where e' starts as e.

    AnyFlow's (arXiv:2605.13724). At s = t it starts as its teacher; at an earlier s, as if it had
    less noise.

    Raises:
        UserError: its family does not name the module of its time's sinusoids.
    """

    gate = GATE

    def new_embedding(self, network: Pretrained) -> nn.Module:
        if not network.SINUSOIDS:
            raise UserError(
                f"student.landing: {type(network).__name__} does not name the module that makes "
                "sinusoids of its time; leave landing out, or set its attribute SINUSOIDS"
            )
        parents = [name.rpartition(".")[0] for name in self.names]
        copies = [deepcopy(network.backbone.get_submodule(name)) for name in parents]
        return to_float32(nn.ModuleList(copies)).requires_grad_(True)

    def embed(self, number: Tensor) -> Sequence[Tensor]:
        assert isinstance(self.embedding, nn.ModuleList)
        network, dtype = unwrap(self), next(self.embedding.parameters()).dtype
        sinusoids = network.backbone.get_submodule(network.SINUSOIDS)
        features = sinusoids(network.time(number)).to(dtype)
        return [embedder(features) for embedder in self.embedding]


def readings(denoiser: Denoiser) -> list[NumberReading]:
    """The numbers that a student reads beside its time, the outermost wrapper first."""
    chain: list[NumberReading] = []
    while isinstance(denoiser, Wrapper):
        if isinstance(denoiser, NumberReading) and denoiser.embedding is not None:
            chain.append(denoiser)
        denoiser = denoiser.denoiser
    return chain


class NumberEmbedding(nn.Module):
    """An embedding of a number for each of a network's time layers, zero at first.

    Args:
        widths: The number of output channels of each of the layers.
    """

    def __init__(self, widths: Sequence[int], sinusoids: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.widths, self.sinusoids = list(widths), sinusoids
        self.hidden = nn.Linear(2 * sinusoids, hidden)
        self.out = nn.Linear(hidden, sum(widths))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, s: Tensor) -> tuple[Tensor, ...]:
        """For each layer (B, channels), of numbers s (B,) in [0, 1]."""
        weight = self.hidden.weight
        powers = torch.linspace(0, 1, self.sinusoids, device=s.device)
        angle = s.float()[:, None] * FASTEST**powers
        features = torch.cat([angle.cos(), angle.sin()], 1).to(weight.dtype)
        return self.out(nn.functional.silu(self.hidden(features))).split(self.widths, 1)


def two_time(generator: Generator, mixed: bool = False) -> Generator:
    """Have a student read its landing times, in place: the student.

    Args:
        mixed: Mix their embedding with that of the time, in place of adding it.

    Raises:
        UserError: the student is no pretrained network, or its family names no time embedding.
    """
    generator.denoiser = (MixedTime if mixed else TwoTime)(generator.denoiser)
    return generator


def keep_slow(denoiser: Denoiser) -> None:
    """Have a network train with those sinusoids of its time that its first layer reads now.

    Students of EDM in the time units of consistency models read the slow ones only (`retime`). The
    fast ones have thousands of radians in the range of times: weights that training moves away from
    0 would make derivatives along time as large. Gradients to these weights become 0.
    """
    embedders = [getattr(module, "time_embedding", None) for module in denoiser.modules()]
    for reading in readings(denoiser):
        if isinstance(reading, MixedTime):
            embedders += [*reading.embedding.children()] if reading.embedding else []
    for embedder in embedders:
        first = getattr(embedder, "linear_1", None)
        if isinstance(first, nn.Linear) and first.weight.requires_grad:
            hold_unread(first.weight)


def hold_unread(weight: Tensor) -> None:
    """Make gradients 0 to those columns of a weight (out, in) that are 0 now.

    A plan's weights have no values, and its gradients are only counted.
    """
    if is_fake(weight):
        return
    read = weight.detach().any(0)
    if not read.all():
        weight.register_hook(lambda grad: grad * read.to(grad.device))


def time_layers(network: Pretrained, what: str = "a landing time") -> list[str]:
    """The names of the layers whose outputs are the network's embedding of its time, in order.

    Args:
        what: What is to be added to them, for the message.

    Raises:
        UserError: there are none.
    """
    modules = dict(network.backbone.named_modules())
    names = [name for name in modules if re.fullmatch(network.TIME, name)]
    if not (network.TIME and names):
        raise UserError(
            f"student: {type(network).__name__} names no time embedding, so it cannot read {what}; "
            "set its attribute TIME, or train an objective and a guidance that need none"
        )
    return names


def channels(layer: nn.Module) -> int:
    """How many channels a time layer gives."""
    base: Any = base_layer(layer)
    return base.out_features if isinstance(base, nn.Linear) else len(base.weight)


@contextmanager
def shifted(backbone: nn.Module, shifts: Shifts | None) -> Iterator[None]:
    """Run the backbone with these shifts added to its time layers' outputs; None adds nothing.

    Within another use, both are added. What is mixed is mixed with a layer's own output, first.
    """
    if shifts is None:
        yield
        return

    def adding(value: Tensor, gate: float | None) -> Any:
        if gate is None:
            return lambda module, args, out: out + value.to(out.dtype)
        return lambda module, args, out: out + gate * (value.to(out.dtype) - out)

    handles = [
        module.register_forward_hook(adding(value, gate), prepend=gate is not None)
        for module, value, gate in zip(*shifts, strict=True)
    ]
    outer = _SHIFTS.get(backbone)
    both = shifts
    if outer is not None:
        both = Shifts(
            [*outer.layers, *shifts.layers],
            [*outer.values, *shifts.values],
            [*outer.gates, *shifts.gates],
        )
    _SHIFTS[backbone] = both
    try:
        yield
    finally:
        _SHIFTS.pop(backbone)
        if outer is not None:
            _SHIFTS[backbone] = outer
        for handle in handles:
            handle.remove()


def current_shifts(backbone: nn.Module) -> Shifts | None:
    """What `shifted` now adds in this backbone, for recomputing a part of it later."""
    return _SHIFTS.get(backbone)
