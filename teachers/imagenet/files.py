"""Published weight files, of which only tensors and plain data are read."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.edm.checkpoints import open_weights
from teachers.errors import UserError, clipped, first_line

# Where training scripts keep their weights, best first.
PLACES = ("ema", "nnet_ema", "model", "nnet", "state_dict")
PREFIXES = ("module.", "_orig_mod.")  # of parallel and of compiled networks


def open_file(path: Path, who: str) -> dict[str, Any]:
    """The content of a weight file.

    Raises:
        UserError: it is missing, damaged, or holds more than tensors and plain data.
    """
    if path.suffix == ".safetensors":
        return dict(open_weights(path, who, "give another file"))
    if not path.is_file():
        raise UserError(f"{who}: {path} is missing; give another file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of training scripts
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # damaged files raise many types
        raise UserError(
            f"{who}: {path} cannot be read as tensors and plain data ({reason(error)}); copy it "
            "again, or save its weights alone as safetensors"
        ) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{who}: {path} holds a {kind}; expected weights by name")
    return content


def reason(error: Exception) -> str:
    """Why torch's reader refuses a file, in a few words; its own message is many lines."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds a {clipped(named[1])}"
    if "Weights only" in str(error):
        return "it is damaged, or no file of PyTorch's"
    return clipped(first_line(error), 120)


def pick(content: Any, who: str) -> dict[str, Tensor]:
    """The weights in a file's content: its moving average, where it has one.

    Raises:
        UserError: something in their place is no tensor.
    """
    for place in PLACES:
        if isinstance(content, dict) and isinstance(content.get(place), dict):
            content = content[place]
            break
    if not isinstance(content, dict) or not content:
        raise UserError(f"{who}: the file holds no weights; expected them by name")
    weights = {}
    for name, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise UserError(
                f"{who}: {clipped(name)} is no tensor; expected a file of weights by name"
            )
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        weights[name] = value
    return weights


def settings(content: dict[str, Any]) -> dict[str, Any]:
    """The options that a training script saved beside its weights."""
    args = content.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else {}
