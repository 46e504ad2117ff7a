"""Compiled networks: `torch.compile` on the blocks of a network, or on all of it, in place.

Only a module's `forward` is compiled. The module keeps its class, its names in the state dict and
its own hooks, and activation checkpointing recomputes it as before. Hooks on modules inside a
compiled forward would not run, and PyTorch gives no sign of it; `teachers/features.py` therefore
runs such a module eagerly, by `eagerly`, while it hooks something inside.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from teachers.errors import UserError, first_line, plural

Mode = Literal["off", "blocks", "full"]
BACKEND = "inductor"
# How many graphs of one block's code are kept: one for each of its shapes, adapters and modes of
# differentiation. PyTorch's own limit of 8 runs the rest eagerly.
GRAPHS = 512


class Compiled:
    """The forward of a module: its compiled code inside `running_compiled`, else its own code.

    Args:
        dynamic: As `torch.compile` takes it: False compiles each shape on its own, None makes the
            sizes that change symbolic.
    """

    running = False  # whether the process is inside `running_compiled`

    def __init__(self, module: nn.Module, dynamic: bool | None) -> None:
        self.module, self.dynamic = module, dynamic
        self.eager = 0  # contexts in which this module runs its own code
        self.original = MethodType(type(module).forward, module)
        self.compiled = torch.compile(self.original, backend=BACKEND, dynamic=dynamic)
        update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not Compiled.running or self.eager:
            return self.original(*args, **kwargs)
        if not torch.is_grad_enabled():
            mark_batch(*args, *kwargs.values())
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        return Compiled(memo[id(self.module)], self.dynamic)  # the copy is under construction


def mark_batch(*values: Any) -> None:
    """Have the first size of each tensor compiled as a symbol.

    Without gradients, a network sees batches of several sizes: twice as many samples under
    guidance, and those of a chain that have steps left. One graph then serves them all.
    """
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            torch._dynamo.maybe_mark_dynamic(value, 0)


class Counts(NamedTuple):
    """What has been compiled in this process.

    graphs: Compiled graphs, each of a forward pass and the backward pass that it may have.
    breaks: Places where a forward was cut into several graphs.
    """

    graphs: int
    breaks: int


def counts() -> Counts:
    """What has been compiled so far."""
    if "torch._dynamo" not in sys.modules:  # which takes seconds to import
        return Counts(0, 0)
    from torch._dynamo.utils import counters

    return Counts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


class GraphReport:
    """Says what has been compiled since it was last asked. It is made where training begins."""

    def __init__(self) -> None:
        self.start = self.last = counts()

    def columns(self) -> dict[str, float]:
        """As columns of metrics.jsonl: graphs and breaks since the start, where there are any."""
        now = counts()
        if now == self.start:
            return {}
        breaks = now.breaks - self.start.breaks
        return {"compile/graphs": now.graphs - self.start.graphs, "compile/breaks": breaks}

    def line(self, step: int) -> str | None:
        """What was compiled since the last line, at a step; None if nothing was."""
        before, self.last = self.last, counts()
        graphs, breaks = (a - b for a, b in zip(self.last, before))
        if not graphs:
            return None
        again = "compiled" if before == self.start else "train.compile: compiled again:"
        made = f"{graphs} {plural(graphs, 'graph')} with {breaks} {plural(breaks, 'break')}"
        return f"{again} {made}, up to step {step}"


def why_not_compiled(device: torch.device) -> str | None:
    """Why this machine cannot compile, found by compiling one sum; None if it can."""
    try:
        double: Callable[[Tensor], Tensor] = torch.compile(lambda x: x + x, backend=BACKEND)
        double(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no folder to write to
        return reason_of(error)
    return None


def reason_of(error: Exception) -> str:
    """Why compilation failed, in a line.

    PyTorch's own error may only name the backend; it holds what the backend raised.
    """
    return first_line(getattr(error, "inner_exception", error))


class CompileError(UserError):
    """PyTorch could not compile a network."""


@contextmanager
def compile_errors() -> Iterator[None]:
    """Raise PyTorch's errors of compilation, from inside this context, as one line.

    Raises:
        CompileError: naming the recipe's key.
    """
    try:
        yield
    except Exception as error:
        # Of a second gradient through compiled code, PyTorch says so in a plain RuntimeError.
        ours = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not ours and not str(error).startswith("torch.compile "):
            raise
        raise CompileError(
            f"train.compile: a network cannot be compiled: {reason_of(error)}; set it to off"
        ) from error


def compile_modules(modules: Iterable[nn.Module], dynamic: bool | None = False) -> int:
    """Compile the forward of each module, in place; how many there are.

    A module with a `forward` of its own, beside its class's, is left as it is: what that does is
    not known, and it would be lost.
    """
    raise_limits()
    count = 0
    for module in modules:
        if "forward" not in vars(module):
            module.forward = Compiled(module, dynamic)
            count += 1
    return count


def raise_limits() -> None:
    """Let PyTorch keep as many graphs of one code as a network's blocks need."""
    config: Any = torch._dynamo.config
    names = (
        ("recompile_limit", "cache_size_limit"),
        (
            "accumulated_recompile_limit",
            "accumulated_cache_size_limit",
        ),
    )
    for (new, old), limit in zip(names, (GRAPHS, 8 * GRAPHS), strict=True):
        setattr(config, new if hasattr(config, new) else old, limit)


def compiled_forward(module: nn.Module) -> Compiled | None:
    """The compiled forward of a module, or None."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, Compiled) else None


def listed_blocks(network: nn.Module) -> list[nn.Module]:
    """The items of the network's lists and dicts of modules, without those inside another item.

    PyTorch's own layers, such as a list of linear ones, are not worth a graph each.
    """
    blocks: list[nn.Module] = []
    for child in network.children():
        listed = isinstance(network, nn.ModuleList | nn.ModuleDict)
        own = next(child.children(), None) is not None or not type(child).__module__.startswith(
            "torch."
        )
        callable_ = type(child).forward is not nn.Module.forward
        blocks += [child] if listed and own and callable_ else listed_blocks(child)
    return list(dict.fromkeys(blocks))


def blocks_in(network: nn.Module, pattern: str) -> list[nn.Module]:
    """The modules whose name matches the regex, without those inside another of them."""
    names: list[str] = []
    for name, _ in network.named_modules():
        inside = any(name.startswith(f"{other}.") for other in names)
        if re.fullmatch(pattern, name) and not inside:
            names.append(name)
    return [network.get_submodule(name) for name in names]


@contextmanager
def running_compiled() -> Iterator[None]:
    """Inside it, compiled modules run their compiled code; everywhere else they run eagerly.

    Only training steps are inside. Sampling, evaluation and export have batches of other sizes, for
    each of which the code would be compiled again.
    """
    before, Compiled.running = Compiled.running, True
    try:
        yield
    finally:
        Compiled.running = before


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Inside it, no module runs compiled code, which has no forward-mode differentiation."""
    before, Compiled.running = Compiled.running, False
    try:
        yield
    finally:
        Compiled.running = before


def has_tangent(value: object) -> bool:
    """Whether this is a tensor that carries a tangent, inside forward-mode differentiation."""
    if not isinstance(value, Tensor) or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(value).tangent is not None


@contextmanager
def eagerly(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside it, these modules run eagerly, and the hooks on modules inside them run."""
    forwards = [f for m in modules if (f := compiled_forward(m)) is not None]
    for forward in forwards:
        forward.eager += 1
    try:
        yield
    finally:
        for forward in forwards:
            forward.eager -= 1
