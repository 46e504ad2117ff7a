"""Conditions: what a network reads beside the noisy data, entries (N, ...) by name, or None.

A network reads the entries that it knows and ignores the others. One entry may stand in any
condition: `guidance_scale` (N,), each sample's own scale g of guidance, where 1 is unguided.
`teachers.denoiser.Guided` guides by it; a UNet with a `time_cond_proj_dim` reads it as an input.

A network that takes a picture as a condition reads the entry `picture` (N, C, H, W), in the layout
that its family gives it. Guidance keeps it in both branches, as stock pipelines do. Where texts are
encoded with the picture, so is the negative prompt: an entry `negative.NAME` (N, ...) is what the
negative branch reads as NAME.

Source: this project's own convention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Cond = dict[str, Any] | None
GUIDANCE_SCALE = "guidance_scale"
PICTURE = "picture"
NEGATIVE = "negative."


@dataclass(frozen=True, eq=False)
class Pictured:
    """A prompt with the picture that is edited or painted in. As a string it is its text.

    Args:
        picture: (3, H, W) in [-1, 1].
        mask: (1, H, W), 1 where the picture is painted anew and 0 where it stays; None: no mask.
    """

    text: str
    picture: Tensor
    mask: Tensor | None = None

    def __str__(self) -> str:
        return self.text

    @classmethod
    def blank(cls, text: str, height: int, width: int) -> Pictured:
        """A prompt with a grey picture, all of which is painted anew."""
        return cls(text, torch.zeros(3, height, width), torch.ones(1, height, width))


def each(cond: Cond, change: Callable[[Tensor], Tensor]) -> Cond:
    """The condition with every entry changed; None stays None."""
    return None if cond is None else {name: change(entry) for name, entry in cond.items()}


def moved(cond: Cond, device: torch.device | str) -> Cond:
    """The condition on a device; entries that are there already are not copied."""
    return each(cond, lambda entry: entry.to(device))


def branches(cond: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A condition without its entries of the negative branch, and these under their plain names."""
    plain = {k: v for k, v in cond.items() if not k.startswith(NEGATIVE)}
    return plain, {k.removeprefix(NEGATIVE): v for k, v in cond.items() if k not in plain}


def rows(cond: Cond, index: Any) -> Cond:
    """The condition of some samples.

    Args:
        index: A slice, or a tensor of integers or booleans, of the first dimension.
    """
    return each(cond, lambda entry: entry[index])


def joined(*conds: Cond) -> Cond:
    """The conditions of several batches, one after the other; None if one of them is None.

    Raises:
        KeyError: a later one lacks an entry of the first.
    """
    given = [cond for cond in conds if cond is not None]
    if len(given) < len(conds):
        return None
    return {name: torch.cat([cond[name] for cond in given]) for name in given[0]}


def tiled(cond: Cond, size: int) -> Cond:
    """The condition of a batch for `size` samples that are this batch once or several times.

    Raises:
        ValueError: `size` is no multiple of the batch's.
    """
    if not cond:
        return cond
    count, rest = divmod(size, len(next(iter(cond.values()))))
    if rest:
        raise ValueError(f"tiled: {size} samples are no multiple of the condition's")
    return cond if count == 1 else joined(*[cond] * count)


def with_scale_one(cond: Cond, rows: Tensor) -> Cond:
    """The condition with the guidance scale 1 for some samples; itself where it has no scales.

    Args:
        rows: Which samples, booleans (N,).
    """
    if cond is None or GUIDANCE_SCALE not in cond:
        return cond
    return {**cond, GUIDANCE_SCALE: cond[GUIDANCE_SCALE].masked_fill(rows, 1.0)}


def without(cond: Cond, name: str) -> tuple[Tensor | None, Cond]:
    """One entry, and the condition of the others.

    Returns:
        The entry, None where there is none of this name; and the rest, None where nothing remains.
    """
    if cond is None or name not in cond:
        return None, cond
    return cond[name], {k: v for k, v in cond.items() if k != name} or None
