"""GGUF files: one network's weights in blocks of few bits, decoded by the package `gguf`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.errors import UserError, clipped, first_line

SUFFIX = ".gguf"
SHAPE = "comfy.gguf.orig_shape."  # before a name: the shape of a weight that is stored flattened


def names_of(file: Path, who: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a file's weights.

    Raises:
        UserError: it cannot be read, or the package is not installed.
    """
    return {tensor.name: shape for tensor, shape in _tensors(file, who)}


def read(file: Path, dtype: torch.dtype, who: str) -> dict[str, Tensor]:
    """The weights that a file's blocks stand for, decoded in float32, as `dtype`.

    Raises:
        UserError: as `names_of`; or a weight has a form that the package does not decode.
    """
    from gguf import quants  # pyright: ignore[reportMissingImports]

    weights = {}
    for tensor, shape in _tensors(file, who):
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            weights[tensor.name] = torch.from_numpy(values.copy()).view(shape).to(dtype)
        except Exception as error:  # of unknown forms and of damaged blocks
            raise UserError(
                f"{who}: {file}: {clipped(tensor.name)} cannot be decoded "
                f"({clipped(first_line(error))}); give a file in another form, such as Q8_0"
            ) from None
    return weights


def _tensors(file: Path, who: str) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The reader's tensors, each with the shape of its weight."""
    try:
        from gguf import GGUFReader  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{who}: reading GGUF takes the package gguf, which is not installed; "
            "pip install 'fewstep[gguf]'"
        ) from None
    try:
        reader = GGUFReader(file)
    except Exception as error:  # damaged files raise many types
        raise UserError(
            f"{who}: {file} cannot be read as GGUF ({clipped(first_line(error))}); copy it again"
        ) from None
    for tensor in reader.tensors:
        field = reader.fields.get(f"{SHAPE}{tensor.name}")
        if field is not None:
            shape = [int(field.parts[i][0]) for i in field.data]
        else:
            shape = [int(n) for n in reversed(tensor.shape)]  # columns come first in the file
        yield tensor, tuple(shape)
