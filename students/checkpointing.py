"""Activation checkpointing: the backward pass recomputes blocks as they ran before.

PyTorch's own checkpoint (`use_reentrant=False`) calls Python twice for every tensor that autograd
keeps. In a network with hundreds of small layers that costs more than the recomputation. Here one
autograd function stands for a block: the forward pass keeps the block's inputs alone, and the
backward pass runs it again with gradients. PyTorch's runs where that is not enough: a closure or an
object hides the tensors that it holds, and hooks inside a block read values with a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from students.adapter_layers import active_adapter, parameters_of, using
from students.two_time import Shifts, current_shifts, shifted
from teachers.compiled import has_tangent
from teachers.errors import UserError
from teachers.features import hooked_modules, replaced

PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
         type(None))  # fmt: skip
# Keywords of PyTorch's checkpoint, which backbones written for it may pass.
KEYWORDS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug",
            "early_stop")  # fmt: skip
_CHECKED: WeakSet[nn.Module] = WeakSet()  # blocks whose graph `check_sources` has walked


def checkpointing(backbone: Any) -> None:
    """Keep no activations inside the backbone's blocks; recompute them.

    A block is recomputed under the adapter and the landing time of its forward pass, since another
    network may have used the backbone in between.

    Raises:
        UserError: the backbone's class does not support checkpointing.
    """
    if not hasattr(backbone, "enable_gradient_checkpointing"):
        raise UserError(
            f"train.checkpointing: {type(backbone).__name__} has no method "
            "enable_gradient_checkpointing(function), by which its blocks are called as "
            "function(block, *inputs); add it, or set the key to false"
        )

    def run_block(block: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k not in KEYWORDS}
        name, shifts = active_adapter(backbone), current_shifts(backbone)
        if isinstance(block, nn.Module) and not hooked_inside(block, shifts):
            values, spec = tree_flatten((args, kwargs))
            if all(isinstance(v, PLAIN) for v in values):
                return recomputed(block, backbone, values, spec)
        call = block.__call__ if isinstance(block, nn.Module) else block
        if any(map(has_tangent, (*args, *kwargs.values()))):  # PyTorch's would find other tensors
            return call(*args, **kwargs)
        contexts = lambda: (nullcontext(), replayed(backbone, name, shifts))  # noqa: E731
        return checkpoint(partial(call, **kwargs), *args, use_reentrant=False, context_fn=contexts)

    try:
        backbone.enable_gradient_checkpointing(run_block)
    except ValueError as error:
        raise UserError(f"train.checkpointing: {str(error).splitlines()[0]}") from None


def hooked_inside(block: nn.Module, shifts: Shifts | None) -> bool:
    """Whether something reads or changes the outputs of modules inside the block."""
    hooked = [*hooked_modules(), *(shifts.layers if shifts else ())]
    return bool(hooked) and any(m in hooked for m in block.modules() if m is not block)


@contextmanager
def replayed(backbone: nn.Module, adapter: str | None, shifts: Shifts | None) -> Iterator[None]:
    """Run the backbone under this adapter and with these shifts of its time embedding."""
    with using(backbone, adapter), shifted(backbone, shifts):
        yield


class Call(NamedTuple):
    """A call of a block, to be repeated.

    block: The module that is called.
    forward: Of the block, without its hooks, which run once and outside.
    backbone, adapter: The network, and the adapter that it runs with.
    spec: How the block's arguments are built from the flat list.
    count: The length of that list, which the learning weights follow.
    known: The flat outputs, where a derivative was computed with them; else they are computed.
    """

    block: nn.Module
    forward: Any
    backbone: nn.Module
    adapter: str | None
    spec: TreeSpec
    count: int
    known: tuple[list[Any], TreeSpec] | None = None

    def run(self, values: Sequence[Any]) -> tuple[list[Any], TreeSpec]:
        """The flat outputs, and how they are put together."""
        args, kwargs = tree_unflatten(list(values), self.spec)
        return tree_flatten(self.forward(*args, **kwargs))

    def backbone_as_then(self) -> AbstractContextManager[None]:
        """The context that the backbone ran in; landing times are added outside of the block."""
        return using(self.backbone, self.adapter)


def recomputed(block: nn.Module, backbone: nn.Module, values: list[Any], spec: TreeSpec) -> Any:
    """The block's outputs; the backward pass computes them again.

    Args:
        values, spec: The positional and keyword arguments, as a flat list of `PLAIN` values.
    """
    learning = [p for p in parameters_of(block) if p.requires_grad]
    forward, name = block.forward, active_adapter(backbone)

    def keep_inputs(*args: Any, **kwargs: Any) -> Any:  # a hook may have changed them
        values, spec = tree_flatten((args, kwargs))
        call = Call(block, forward, backbone, name, spec, len(values))
        out: list[TreeSpec] = []
        if any(map(has_tangent, values)):
            return with_tangents(call, values, learning)
        outputs = _Recomputed.apply(call, out, *values, *learning)
        return tree_unflatten(list(outputs), out[0])  # pyright: ignore

    args, kwargs = tree_unflatten(values, spec)
    with replaced(block, keep_inputs):
        return block(*args, **kwargs)


def with_tangents(call: Call, values: list[Any], learning: list[nn.Parameter]) -> Any:
    """The block's outputs with their tangents; the backward pass recomputes the outputs alone.

    The tangents have no graph, so a derivative keeps as little as a plain call does.
    """
    with torch.no_grad():
        outputs, spec = call.run(values)
    pairs = [forward_ad.unpack_dual(v) if isinstance(v, Tensor) else (v, None) for v in outputs]
    known = [v.detach() if isinstance(v, Tensor) else v for v, _ in pairs]
    call = call._replace(known=(known, spec))
    plain = [forward_ad.unpack_dual(v).primal if isinstance(v, Tensor) else v for v in values]
    results: Any = _Recomputed.apply(call, [], *plain, *learning)
    both = zip(results, (tangent for _, tangent in pairs), strict=True)
    duals = [v if tangent is None else forward_ad.make_dual(v, tangent) for v, tangent in both]
    return tree_unflatten(duals, spec)


class _Recomputed(torch.autograd.Function):
    """A block's outputs, from its inputs and the weights in it that learn."""

    @staticmethod
    def forward(ctx: Any, call: Call, out: list[TreeSpec], *values: Any) -> Any:  # pyright: ignore
        inputs = values[: call.count]
        ctx.call, ctx.learning = call, values[call.count :]
        tensors = [v if isinstance(v, Tensor) else None for v in inputs]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(v, Tensor) else v for v in inputs]
        device = next(t.device for t in tensors if t is not None)
        ctx.autocast = autocast_now(device.type)
        ctx.random = Random.now(device)
        outputs, spec = call.known or call.run(inputs)
        ctx.call = call._replace(known=None)
        out.append(spec)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # a gradient of this gradient would leave out the block, in silence
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore
        call, learning = ctx.call, ctx.learning
        saved = [v if v is None else v.detach() for v in ctx.saved_tensors]
        needs = ctx.needs_input_grad[2:]
        sources = [v.requires_grad_() for v, n in zip(saved, needs) if v is not None and n]
        values = [o if v is None else v for v, o in zip(saved, ctx.others, strict=True)]
        with torch.enable_grad(), ctx.autocast(), ctx.random.restored(), call.backbone_as_then():
            outputs, _ = call.run(values)
        check_sources(call.block, outputs, sources)
        learned = [isinstance(o, Tensor) and o.requires_grad for o in outputs]
        pairs = [(o, g) for o, g, learns in zip(outputs, grads, learned) if learns]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [*sources, *learning], [g for _, g in pairs], allow_unused=True
        )
        gradients = iter(found)
        to_inputs = [next(gradients) if v is not None and n else None for v, n in zip(saved, needs)]
        return None, None, *to_inputs, *gradients


def check_sources(block: nn.Module, outputs: Sequence[Any], sources: Sequence[Tensor]) -> None:
    """Refuse a block that computes with what is neither its own nor among its inputs.

    Recomputing it would lose the gradients of that. Each block is checked once.

    Raises:
        UserError: naming the block's class.
    """
    if block in _CHECKED:
        return
    _CHECKED.add(block)
    known = {id(v) for v in (*sources, *block.parameters())}
    nodes = [v.grad_fn for v in outputs if isinstance(v, Tensor)]
    seen = set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only nodes of leaves have it
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            raise UserError(
                f"train.checkpointing: a {type(block).__name__} computes with weights or tensors "
                "that are neither its own nor among its arguments, and recomputing it would lose "
                "their gradients; pass them to the block as arguments, or set the key to false"
            )
        nodes += [source for source, _ in node.next_functions]


def autocast_now(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast of this moment on a kind of device, to be entered again."""
    if not torch.is_autocast_enabled(kind):
        return partial(torch.autocast, kind, enabled=False)
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), cache_enabled=False)


class Random(NamedTuple):
    """The states of the random generators that a block may draw from."""

    device: torch.device
    host: Tensor
    there: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Random:
        cuda = device.type == "cuda"
        return cls(
            device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside it, the generators give again what they gave then."""
        devices = [] if self.there is None else [self.device]
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.host)
            if self.there is not None:
                torch.cuda.set_rng_state(self.there, self.device)
            yield
