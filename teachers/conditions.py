"""Conditions: what a network reads beside the noisy data, entries (N, ...) by name, or None.

Source: this project's own convention; `Cond` is defined in `teachers/denoiser.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teachers.denoiser import Cond


def each(cond: Cond, change: Callable[[Tensor], Tensor]) -> Cond:
    """The condition with every entry changed; None stays None."""
    return None if cond is None else {name: change(entry) for name, entry in cond.items()}


def moved(cond: Cond, device: torch.device | str) -> Cond:
    """The condition on a device; entries that are there already are not copied."""
    return each(cond, lambda entry: entry.to(device))


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
