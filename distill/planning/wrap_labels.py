"""The data and labels that `distill wrap` is given, and how a network reads the labels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from teachers.denoiser import Cond
from teachers.errors import UserError, clipped, first_line
from teachers.storage.plugin import called

# Usual names of the argument of forward that takes labels.
NAMES = {"y", "label", "labels", "class_label", "class_labels", "classes", "cond", "c"}
ENTRY = 'cond["class_labels"]'  # the labels in the condition that `Pixels(classes=...)` gives


@dataclass(frozen=True)
class LabelReading:
    """How a network reads labels.

    value: What it is given, as the adapter's source has it: ENTRY, "cond", or nothing.
    name: The argument's name where it is not the third one; else "".
    classes, null: Arguments of `Pixels`; no classes where there are no labels.
    """

    value: str = ""
    name: str = ""
    classes: int = 0
    null: int | None = None

    @property
    def source(self) -> str:
        """What follows the time in a call of the backbone."""
        return f", {self.name}={self.value}" if self.value and self.name else f", {self.value}"

    @property
    def codec(self) -> str:
        """The source of the codec."""
        null = f", null={self.null}" if self.null is not None else ""
        return f"Pixels(classes={self.classes}{null})" if self.classes else "Pixels()"

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        """The network's output, for its own time."""
        if not self.value:
            return network(x_t, t)
        value = cond["class_labels"] if cond and self.value == ENTRY else cond
        return network(x_t, t, **{self.name: value}) if self.name else network(x_t, t, value)

    def fault(self, network: nn.Module, x: Tensor, labels: Tensor | None) -> str:
        """Why the network cannot be called so for data x (N, ...) and labels (N,); "" if it can."""
        cond = None if labels is None else {"class_labels": labels}
        try:
            with torch.no_grad():
                out = self.call(network, x, x.new_full((len(x),), 0.5), cond)
        except (Exception, SystemExit) as error:  # a user's own code may raise anything
            return f"{type(error).__name__}: {clipped(first_line(error), 150)}"
        return "" if isinstance(out, Tensor) else f"forward returned {type(out).__name__}"


def label_reading(
    kind: type[nn.Module], network: nn.Module | None, x: Tensor | None, labels: Tensor | None
) -> LabelReading:
    """The first way to give labels (N,) with data x (N, ...) that does not raise; else the usual.

    Args:
        network: None if the class needs arguments.
    """
    ways = [*readings(kind, labels)]
    if labels is not None:
        classes = int(labels.max()) + 1
        layers = () if network is None else network.modules()
        sizes = {m.num_embeddings for m in layers if isinstance(m, nn.Embedding)}
        null = classes if classes + 1 in sizes else None
        ways = [replace(w, classes=classes, null=null) if w.value else w for w in ways]
    if network is None or x is None:
        return ways[0]
    few = x[:2].float(), None if labels is None else labels[:2]
    return next((w for w in ways if not w.fault(network, *few)), ways[0])


def readings(kind: type[nn.Module], labels: Tensor | None) -> Iterator[LabelReading]:
    """The ways to give labels to a network's class, the usual one first."""
    argument, is_third = label_argument(kind)
    if argument is None:
        yield LabelReading()
        return
    values = ("cond", ENTRY) if labels is None or argument == "cond" else (ENTRY, "cond")
    for value in values if labels is not None else values[:1]:
        yield LabelReading(value, "" if is_third else argument)


def label_argument(kind: type[nn.Module]) -> tuple[str | None, bool]:
    """The argument of a class's forward that takes labels, and whether it is the third by place.

    It has a usual name, or else is the first after the time; an argument with a default other than
    None is a setting.
    """
    every = [p for p in inspect.signature(kind.forward).parameters.values() if p.name != "self"]
    others = [p for p in every[2:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    free = [p for p in others if p.default is p.empty or p.default is None]
    named = [p for p in others if p.name in NAMES]
    if not (candidates := named or free):
        return None, False
    first = candidates[0]
    return first.name, first is every[2] and first.kind is not first.KEYWORD_ONLY


def own_data(place: str) -> tuple[Tensor, Tensor | None]:
    """Data (N, ...) that a function in a user's file returns, and their labels (N,), if any.

    Prompts are no labels: what a network reads of them is not known here.

    Raises:
        UserError: it raises an exception, or returns something else.
    """
    result = called(place, "--data")
    x, labels = result, None
    if isinstance(result, tuple) and result:
        x, labels = result[0], result[1] if len(result) == 2 else None
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise UserError(f"--data {place}: it returned {type(x).__name__}; return data (N, ...)")
    if not len(x) or not x.isfinite().all():
        fault = "NaN or infinity" if len(x) else "no items"
        raise UserError(f"--data {place}: its data hold {fault}; return data (N, ...)")
    labels = integers(labels)
    if labels is not None and len(labels) != len(x):
        raise UserError(
            f"--data {place}: {len(x)} data and {len(labels)} labels; return as many of each"
        )
    return x, labels


def integers(labels: Any) -> Tensor | None:
    """Labels (N,) in int64; None if they are no integers from 0."""
    if labels is None:
        return None
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # prompts
        return None
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long() if whole and labels.ndim == 1 and (labels >= 0).all() else None
