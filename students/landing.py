"""Students that read a number beside the time, in stock pipelines, which hand a network one time.

At the steps of one chain, a time says where its step lands. So the embedding of s can be folded
into the last layer of the time embedding, which gives a stock network: into its bias where all
steps land at 0, and else into its weights as well, by an update that is exact at the times of the
chain. At other times that network is wrong. One guidance scale is folded into the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from students.adapter_layers import using
from students.generator import Generator
from students.lora import adapter_of, merged_backbone, unwrap
from students.two_time import NumberReading, TwoTime, readings
from teachers import conditions
from teachers.denoiser import Cond, Denoiser, Wrapper
from teachers.errors import UserError


class Fold(NamedTuple):
    """What a time layer's weights take up in place of an embedding of a number.

    layer: its name in the backbone.
    weight: added to its weight (out, in); None adds nothing.
    bias: added to its bias (out,).
    kept: what its own weight and bias are multiplied by first, where embeddings are mixed.
    """

    layer: str
    weight: Tensor | None
    bias: Tensor
    kept: float = 1.0


def landing_of(generator: Generator) -> TwoTime | None:
    """How a student reads its landing times; None if it does not."""
    return next((r for r in readings(generator.denoiser) if isinstance(r, TwoTime)), None)


def lands_at_0(generator: Generator) -> bool:
    """Whether all steps land at 0: of chains that renoise, and of a single step."""
    return generator.renoise in (True, "posterior") or max(generator.counts) == 1


def check_landing(generator: Generator) -> None:
    """Refuse a student that no stock pipeline can sample: one time has several landings.

    Raises:
        UserError: the student reads its landing times, which several chains along the ODE share.
    """
    if landing_of(generator) is None or lands_at_0(generator):
        return
    if len(generator.counts) > 1:
        raise UserError(
            "student.counts: stock pipelines hand a network one time, which can stand for the "
            "landing times of one step count only where steps follow the ODE; set it to "
            f"[{max(generator.counts)}], or student.renoise to true"
        )


@torch.no_grad()
def folds(generator: Generator, shape: Sequence[int], cond: Cond) -> list[Fold]:
    """What each time layer takes up where the student is sampled by a stock pipeline.

    Args:
        shape: Of one datum.
        cond: A condition of any batch, with which the network runs once for each step of a chain
            that does not always land at 0.

    Raises:
        UserError: the network does not tell the times of the chain apart.
    """
    found: list[Fold] = []
    for reading in readings(generator.denoiser):
        if isinstance(reading, TwoTime) and not lands_at_0(generator):
            times = generator.grids[max(generator.counts)]
            found += folded_chain(reading, times, shape, cond)
        else:
            share, kept = shares(reading)
            values = [share * v[0] for v in reading.usual_shifts().values]
            found += [Fold(n, None, v, kept) for n, v in zip(reading.names, values, strict=True)]
    return sorted(found, key=lambda fold: fold.kept == 1)  # what is added is not mixed


def shares(reading: NumberReading) -> tuple[float, float]:
    """What a number's embedding and the time's are multiplied by before they are added."""
    return (1.0, 1.0) if reading.gate is None else (reading.gate, 1 - reading.gate)


def folded_chain(
    student: TwoTime, times: Sequence[float], shape: Sequence[int], cond: Cond
) -> list[Fold]:
    """The smallest change of the time layers that is exact at these times, each to the next."""
    device, (share, kept) = student.device, shares(student)
    t = torch.tensor(times, device=device)
    s = torch.cat([t[1:], t.new_zeros(1)])
    backbone, inputs = unwrap(student).backbone, [[] for _ in student.names]
    layers = [backbone.get_submodule(name) for name in student.names]

    def noting(seen: list[Tensor]) -> Any:
        return lambda module, args: seen.append(args[0].detach().double().reshape(1, -1))

    hooks = [m.register_forward_pre_hook(noting(v)) for m, v in zip(layers, inputs, strict=True)]
    one = conditions.moved(conditions.rows(cond, slice(1)), device)
    try:
        for k in range(len(t)):
            student(torch.zeros(1, *shape, device=device), t[k : k + 1], one, s[k : k + 1])
            for seen in inputs:
                del seen[k + 1 :]  # some networks embed their time twice
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, seen, value in zip(student.names, inputs, student.embed(s), strict=True):
        rows, wanted = torch.cat(seen), share * value.double()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)  # the last is the bias
        change = torch.linalg.pinv(rows) @ wanted
        if not torch.allclose(rows @ change, wanted, atol=1e-6, rtol=1e-4):
            raise UserError(
                f"student.steps: the network does not tell the times of {len(t)} steps apart; "
                "train fewer steps, or set student.renoise to true"
            )
        found.append(
            Fold(name, change[:-1].T, change[-1], kept)
        )  # float64: rounded once, as weights
    return found


@contextmanager
def in_place(denoiser: Denoiser, changes: Sequence[Fold] = ()) -> Iterator[None]:
    """Within it, the backbone called by anyone is this student's, with what it reads folded.

    Args:
        changes: Its `folds`.
    """
    adapter, backbone = adapter_of(denoiser), unwrap(denoiser).backbone
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(using(adapter.denoiser, adapter.name))
        for change in changes:
            layer = backbone.get_submodule(change.layer)
            stack.callback(layer.register_forward_hook(adding_fold(change)).remove)
        yield


def adding_fold(change: Fold) -> Any:
    """A forward hook that gives a layer's output as if its weights had taken up the change."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        bias = change.bias.to(out.dtype)
        out = out if change.kept == 1 else change.kept * out
        if change.weight is None:
            return out + bias
        return out + nn.functional.linear(args[0].to(out.dtype), change.weight.to(out.dtype), bias)

    return hook


@torch.no_grad()
def stock_backbone(denoiser: Denoiser, changes: Sequence[Fold] = ()) -> nn.Module:
    """A student's backbone as stock pipelines call it: its adapter merged, what it reads folded.

    Other weights than those of time layers are shared with the student's where it is no adapter.

    Args:
        changes: Its `folds`.

    Raises:
        UserError: a time layer has no bias.
    """
    inner = denoiser
    while isinstance(inner, Wrapper):
        inner = inner.denoiser
    backbone = merged_backbone(inner)
    if not changes:
        return backbone
    backbone = deepcopy(backbone, {id(p): p for p in backbone.parameters()})
    for change in changes:
        layer: Any = backbone.get_submodule(change.layer)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise UserError(
                f"student: the time embedding of {type(unwrap(denoiser)).__name__}'s network has "
                "no bias to fold the landing time into; train an objective of one time and of one "
                "guidance scale"
            )
        bias, weight = change.kept * layer.bias, change.kept * layer.weight
        layer.bias = nn.Parameter((bias + change.bias).to(layer.bias.dtype))  # of the wider type
        if change.weight is not None:
            weight = weight + change.weight
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    return backbone
