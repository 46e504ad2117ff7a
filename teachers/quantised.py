"""Frozen weights in eight bits or in four: the linear layers of a network's repeated blocks.

| form | a weight | scales |
|---|---|---|
| fp8 | e4m3, 8 bits (arXiv:2209.05433) | one for each output: its largest is 448 |
| nf4 | the nearest of 16 normal quantiles, 4 bits (arXiv:2305.14314) | one for each 64 weights |

A product decodes the weight to the input's type, in the forward pass and again in the backward
pass; only the codes are kept in between. Embeddings, convolutions, norms and the last layer keep
their own precision; they are a small part, and the most sensitive.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["fp8", "nf4"]
FORMS: tuple[Form, ...] = ("fp8", "nf4")
Precision = Literal["fp32", "bf16", "fp16", "fp8", "nf4"]
# The type that weights load in; of quantised networks, the layers that are not quantised keep it.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    **dict.fromkeys(FORMS, torch.bfloat16),
}
BLOCK = 64  # nf4's weights to a scale
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
# Appendix E of arXiv:2305.14314: quantiles of N(0, 1) at equal steps on either side of an exact 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Quantised(nn.Linear):
    """A frozen linear layer that keeps codes and scales in its weight's place.

    `weight` is the weight (out, in) that the codes stand for, decoded at each access, in its
    original type.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, form: Form) -> None:
        nn.Module.__init__(self)  # without a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.dtype = form, linear.weight.dtype
        self.bias = linear.bias
        codes, scales = encode(linear.weight.detach(), form)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:  # pyright: ignore
        return self.decoded(self.dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""
        return decode(self.codes, self.scales, (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        out = _Product.apply(input, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form}"


class _Product(torch.autograd.Function):
    """x Wᵀ with a gradient for x alone; the backward pass decodes W again and keeps no copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:  # pyright: ignore
        ctx.layer, ctx.dtype = layer, x.dtype
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return F.linear(x.to(dtype), layer.decoded(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        return (grad @ ctx.layer.decoded(grad.dtype)).to(ctx.dtype), None


def encode(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a weight (out, in).

    For fp8, codes (out, in) and scales (out, 1). For nf4, codes (⌈out × in / 2⌉,) in pairs, the
    first in the higher bits, and scales (⌈out × in / 64⌉, 1).
    """
    weight = weight.float()
    if form == "fp8":
        scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
        return (weight / scales).to(FP8), scales
    flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = flat.abs().amax(1, keepdim=True).clamp(min=1e-12)
    levels = torch.tensor(NF4, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(flat / scales, between).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def decode(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that `encode`'s codes and scales stand for."""
    if codes.dtype == FP8:
        return codes.to(dtype) * scales.to(dtype)
    levels = torch.tensor(NF4).to(codes.device, non_blocking=True)  # each layer, at each call
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2), a byte's two weights in one look
    flat = F.embedding(codes.int(), pairs.to(dtype)).view(-1, BLOCK) * scales.to(dtype)
    return flat.flatten()[: shape[0] * shape[1]].view(shape)


def quantise(network: nn.Module, form: Form) -> nn.Module:
    """The network, each linear layer in its lists of blocks replaced by a `Quantised` one."""
    lists = [name for name, m in network.named_modules() if isinstance(m, nn.ModuleList)]
    for name, module in list(network.named_modules()):
        if type(module) is nn.Linear and any(name.startswith(f"{k}.") for k in lists):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, Quantised(module, form))
    return network


def is_quantised(network: nn.Module) -> bool:
    return any(isinstance(m, Quantised) for m in network.modules())


def parameters(network: nn.Module) -> int:
    """How many weights a network has, quantised ones included."""
    own = sum(p.numel() for p in network.parameters())
    layers = [m for m in network.modules() if isinstance(m, Quantised)]
    return own + sum(m.in_features * m.out_features for m in layers)
