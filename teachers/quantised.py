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
from torch.utils.checkpoint import checkpoint

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
    pairs: Tensor | None

    def __init__(self, linear: nn.Linear, form: Form) -> None:
        nn.Module.__init__(self)  # without a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.dtype = form, linear.weight.dtype
        self.bias = linear.bias
        codes, scales = encode(linear.weight.detach(), form)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        if form == "nf4":
            self.register_buffer("pairs", level_pairs(codes.device), persistent=False)
        else:
            self.pairs = None

    @property
    def weight(self) -> Tensor:  # pyright: ignore
        return decode(*self.parts, self.dtype)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
        """What `decode` takes before the type."""
        return self.codes, self.scales, self.pairs, (self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        device, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x = input.to(dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            out: Any = product(x, *self.parts)
        elif torch.compiler.is_compiling():
            # The compiler would keep the weight of an autograd function for its backward pass. In
            # a checkpoint it does not, and it fuses the steps of the decoding.
            out = checkpoint(product, x, *self.parts, use_reentrant=False)
        else:
            out = _Product.apply(x, *self.parts)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form}"


def product(
    x: Tensor, codes: Tensor, scales: Tensor, pairs: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """x Wᵀ (..., out) in the type of x (..., in), where W is decoded from the codes."""
    return F.linear(x, decode(codes, scales, pairs, shape, x.dtype))


class _Product(torch.autograd.Function):
    """`product` with a gradient for x alone; the backward pass decodes W again, and keeps no copy.

    PyTorch's checkpoint does the same, but its cost for each layer is high in eager mode.
    """

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        pairs: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, pairs)
        ctx.shape = shape
        return product(x, codes, scales, pairs, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        codes, scales, pairs = ctx.saved_tensors
        return grad @ decode(codes, scales, pairs, ctx.shape, grad.dtype), None, None, None, None


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
    levels = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(flat / scales, between).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def level_pairs(device: torch.device) -> Tensor:
    """The two levels (256, 2) that each byte of nf4's codes stands for, in float32."""
    levels = torch.tensor(NF4, dtype=torch.float32, device=device)
    return torch.cartesian_prod(levels, levels)


def decode(
    codes: Tensor,
    scales: Tensor,
    pairs: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight that `encode`'s codes and scales stand for.

    Args:
        pairs: `level_pairs` of nf4; None of fp8.
    """
    if pairs is None:
        return codes.to(dtype) * scales.to(dtype)
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
