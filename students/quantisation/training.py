"""Students that are trained through the rounding that they leave with.

Every weight is rounded in each forward pass, and its gradient passes straight through (Bengio et
al. 2013, arXiv:1308.3432): what learns are the weights before rounding. The export has those after.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.generator import Generator
from students.lora import network_of
from students.quantisation.layers import layers
from students.quantisation.rounding import rounded_weight, straight_through
from teachers.errors import UserError
from teachers.families.base import Pretrained

KEY = "student.format"  # the recipe key, which begins error messages


class RoundedLinear(nn.Linear):
    """A linear layer of a rounded weight; `rounding` makes it of another in place."""

    bits: int
    split: int

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, straight_through(self.weight, self.bits, self.split), self.bias)


class RoundedConv(nn.Conv2d):
    """A convolution of a rounded weight."""

    bits: int
    split: int

    def forward(self, input: Tensor) -> Tensor:
        weight = straight_through(self.weight, self.bits, self.split)
        return self._conv_forward(input, weight, self.bias)


ROUNDED: dict[type[nn.Module], Any] = {nn.Linear: RoundedLinear, nn.Conv2d: RoundedConv}
PLAIN = {kind: plain for plain, kind in ROUNDED.items()}


def rounding(student: Generator, bits: int) -> Generator:
    """The student, in place, whose linear layers and convolutions compute with rounded weights.

    They keep their names and weights.

    Raises:
        UserError: it is no network of diffusers.
    """
    network = network_of(student.denoiser)
    if not isinstance(network, Pretrained):
        raise UserError(
            f"{KEY}: only networks of diffusers leave with rounded weights; remove it, and round "
            "the weights of your own network yourself"
        )
    for layer in layers(network.backbone).values():
        split = layer.split
        layer.module.__class__ = ROUNDED[type(layer.module)]
        layer.module.bits, layer.module.split = bits, split
    return student


@torch.no_grad()
def with_rounded_weights(student: Generator) -> Generator:
    """A student of plain layers that computes the same; one that rounds nothing is returned."""
    if not any(type(m) in PLAIN for m in student.modules()):
        return student
    made = deepcopy(student)
    for module in made.modules():
        if (kind := PLAIN.get(type(module))) is not None:
            rounded: Any = module
            rounded.weight.copy_(rounded_weight(rounded.weight, rounded.bits, rounded.split))
            del rounded.bits, rounded.split
            module.__class__ = kind
    return made
