"""Gates: a network whose units count in part, for each sample its own, with a gradient to gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from teachers.compiled import eagerly
from teachers.denoiser import Denoiser
from teachers.features import blocks_of, changed, hooked, modules_around
from teachers.process import expand

BACKBONE = "backbone."  # of the names of a network's modules
STREAMS = ("encoder_hidden_states", "hidden_states")  # of a block, in the order that it returns


@contextmanager
def gated(denoiser: Denoiser, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, a unit of input x gives m · unit(x) + (1 - m) x: all of it at 1, nothing at 0.

    Units run whatever m is. A call of several times B rows, as guidance makes, repeats the gates.

    Args:
        denoiser: The network, or an adapter or a wrapper around it.
        keep: The gates m (B,) of units, by the names that `units` gives them.

    Raises:
        UserError: as `teachers.features.changed`.
    """
    key, names = "objective.keep", [BACKBONE + name for name in keep]
    of = dict(zip(blocks_of(denoiser, names, key).values(), keep.values(), strict=True))

    def blend(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = {**kwargs, **({STREAMS[-1]: args[0]} if args else {})}
        if isinstance(output, Tensor):
            return between(output, given[STREAMS[-1]], of[block])
        streams = zip(output, STREAMS[-len(output) :], strict=True)
        return tuple(v if v is None else between(v, given[k], of[block]) for v, k in streams)

    with changed(denoiser, names, blend, key):
        yield


def between(output: Tensor, x: Tensor, gates: Tensor) -> Tensor:
    """m output + (1 - m) x of (R, ...), with gates m (B,) for each B of the rows."""
    m = expand(gates.repeat(len(output) // len(gates)).to(output), output)
    return m * output + (1 - m) * x


@contextmanager
def narrowed(denoiser: Denoiser, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, inputs of linear layers are multiplied by gates: what a gate of 0 stands for is
    not there. Calls of several times B rows repeat the gates, as in `gated`.

    Args:
        denoiser: As `gated` has it.
        keep: The gates m (B, U) of a layer's inputs, in U parts of equal width, by its name.

    Raises:
        UserError: as `teachers.features.changed`.
    """
    key, names = "objective.prune", [BACKBONE + name for name in keep]
    with ExitStack() as stack:
        stack.enter_context(eagerly(modules_around(denoiser, names)))
        for name, module in blocks_of(denoiser, names, key).items():
            before = partial(parts_of, keep[name.removeprefix(BACKBONE)])
            stack.enter_context(hooked(module, lambda *_: None, before))
        yield


def parts_of(gates: Tensor, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer's arguments, the first (R, ..., F) of them with each of U parts times its gate."""
    x, (rows, units) = args[0], gates.shape
    m = gates.repeat(len(x) // rows, 1).to(x).repeat_interleave(x.shape[-1] // units, 1)
    return (x * m.view(len(x), *(1,) * (x.ndim - 2), -1), *args[1:])
