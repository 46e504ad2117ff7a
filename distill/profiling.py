"""Counters of work and memory: FLOPs, bytes of tensors, network evaluations, peak memory."""

from __future__ import annotations

import platform
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from teachers.compiled import has_tangent
from teachers.denoiser import computes


class FlopMeter(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside it.

    They come from torch's own formulas, those of FlopCounterMode. That mode itself does not serve:
    its hooks on modules keep what gradient checkpointing recomputes alive until the mode ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class Meter(FlopMeter):
    """Tracks the bytes of live tensors that were made inside it, and adds up FLOPs.

    Args:
        known: Keys of the storages that do not count.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.most = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
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
    """Attention with the memory of fused kernels: queries, keys, values and output are kept.

    It adds FLOPs to `meter`: 4 N M d forward, and 10 N M d backward, where kernels compute the
    matrix once more.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meter: Meter) -> Tensor:  # pyright: ignore
        out = q.new_empty(*q.shape[:-1], v.shape[-1])  # shapes alone matter
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
    """Multiplications of queries with keys: batch × heads × N × M × d."""
    return q.numel() * k.shape[-2]


class FusedAttention(TorchFunctionMode):
    """Inside it, attention never makes its N × M matrix, and its FLOPs are added to `meter`.

    It is a mode of functions, since torch decomposes attention before a mode of dispatch sees it.
    Outputs have shapes and no values: for fake tensors. Queries that carry a tangent make the
    matrix, as in a run, where fused kernels have no forward mode. Of a group norm with a tangent,
    torch's own derivative has no fake tensors, so it is written out. `loss.backward()` keeps the
    mode for what gradient checkpointing recomputes; `torch.autograd.grad` does not.
    """

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = (*args, *kwargs.values())
        if func is F.scaled_dot_product_attention and not any(map(has_tangent, inputs)):
            return _Attention.apply(*_inputs(*args, **kwargs), self.meter)
        if func is F.group_norm and any(map(has_tangent, inputs)):
            return _group_norm(*args, **kwargs)
        if func is Tensor.backward:
            with self:  # torch leaves the mode to call this handler
                return _backward(*args, **kwargs)
        return func(*args, **kwargs)


class EagerAutocast(FusedAttention):
    """`FusedAttention` in which CPU's autocast computes what CUDA's does in float32.

    These are the norms and softmax, whose float32 outputs are kept for the backward pass. Compiled
    code recomputes them. With it, plans of EDM's network, which has a norm before each convolution,
    are 4 % below what an H200 takes, and without it 40 %.
    """

    PRECISE = (F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.PRECISE or not torch.is_autocast_enabled("cpu"):
            return super().__torch_function__(func, types, args, kwargs)
        args = [v.float() if isinstance(v, Tensor) else v for v in args]
        kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in (kwargs or {}).items()}
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = x.reshape(len(x), num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = (centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(x.shape)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    normed = normed if weight is None else normed * weight.view(shape)
    return normed if bias is None else normed + bias.view(shape)


def _inputs(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention's queries, keys and values, given by position or by name."""
    return query, key, value


def _backward(loss: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """`loss.backward`, in which torch looks for no mode: newer versions look at tensors only."""
    root: Any = get_gradient_edge(loss) if torch.__version__ >= "2.8" else loss
    torch.autograd.backward(root, gradient, *args, **kwargs)


class EvaluationCounter:
    """Counts the samples that pass through networks, under each name, while it is entered.

    A sample that carries a tangent counts twice: forward-mode differentiation computes as much for
    the derivative as for the value.

    Its hooks stay until `remove`: a deep copy of a network then counts as its original does,
    whenever it was made.

    Args:
        modules: By name, the modules of which each call is an evaluation.

    Attributes:
        counts: Samples by name.
        with_gradients: Of these, those whose output has a graph.
    """

    def __init__(self, modules: Mapping[str, Iterable[nn.Module]]) -> None:
        self.counts = dict.fromkeys(modules, 0)
        self.with_gradients = dict.fromkeys(modules, 0)
        self.active = False
        pairs = [(name, module) for name, group in modules.items() for module in group]
        self._hooks = [
            *(m.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, m in pairs),
            *(m.register_forward_hook(self._hook_after(name)) for name, m in pairs),
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.active:
                inputs = (*args, *kwargs.values())
                samples = len(next(v for v in inputs if isinstance(v, Tensor | list)))
                self.counts[name] += samples * (2 if any(map(has_tangent, inputs)) else 1)

        return count

    def _hook_after(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if self.active and isinstance(output, Tensor) and output.requires_grad:
                self.with_gradients[name] += len(output)

        return count

    def __enter__(self) -> dict[str, int]:
        self.active = True
        return self.counts

    def __exit__(self, *error: object) -> None:
        self.active = False

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def evaluations_of(modules: Mapping[str, Iterable[nn.Module]]) -> Iterator[dict[str, int]]:
    """Inside it, count the samples that pass through modules, as `EvaluationCounter` does."""
    counter = EvaluationCounter(modules)
    try:
        with counter as counts:
            yield counts
    finally:
        counter.remove()


def denoisers_in(networks: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """The denoisers in networks that compute, by network: each under the first of its names."""
    seen: set[nn.Module] = set()
    denoisers: dict[str, list[nn.Module]] = {}
    for name, network in networks.items():
        denoisers[name] = [m for m in network.modules() if computes(m) and m not in seen]
        seen.update(denoisers[name])
    return denoisers


def unique(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def peak_memory(device: torch.device) -> float:
    """The process's peak memory in GB: on the GPU, or the host's where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts in bytes


def start_peak(device: torch.device) -> None:
    """Return a GPU's unused memory to it, and measure `peak_memory` from now on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's, or the machine's type where it has none."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
