"""What is held and done among tensors made in a context: bytes and FLOPs, of fake tensors too.

And what a process holds on its device, and what that device is called.
"""

from __future__ import annotations

import platform
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Follows the bytes that are alive among tensors made inside it, and adds up FLOPs.

    FLOPs are torch's own formulas', as FlopCounterMode has them; not by that mode itself, whose
    hooks on modules keep all that gradient checkpointing recomputes alive until it ends.

    Args:
        known: Keys of the storages that do not count.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.most, self.flops = known, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._born(tensor)
        return out

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage._cdata)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """Attention as fused kernels hold it: queries, keys, values, output; never the N × M matrix.

    Its FLOPs go to `meter`: 4 N M d forward and, where matrix and products are redone, 10 backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meter: Meter) -> Tensor:  # pyright: ignore
        out = q.new_empty(*q.shape[:-1], v.shape[-1])  # fake, like all that is played
        ctx.save_for_backward(q, k, v, out)
        ctx.meter = meter
        meter.flops += 4 * pairs(q, k)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        q, k, v, _ = ctx.saved_tensors
        ctx.meter.flops += 10 * pairs(q, k)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def pairs(q: Tensor, k: Tensor) -> int:
    """Products of a query's and a key's entries: heads × N × M × d, over the batch."""
    return q.numel() * k.shape[-2]


@contextmanager
def fused(meter: Meter) -> Iterator[None]:
    """Attention without its matrix, its FLOPs added to `meter`."""
    before = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
        return _Attention.apply(query, key, value, meter)  # pyright: ignore[reportReturnType]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def unique(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held, in GB: the device's, or its own on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts in bytes


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's, or what machines like it are called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
