"""A stand-in for the optional package gguf, and files that it reads."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class Reader:
    """A stand-in for GGUFReader, of what `torch.save` wrote: by name, data, form and shape."""

    def __init__(self, file):
        content = torch.load(file, weights_only=True)
        self.fields: dict[str, Any] = {
            f"comfy.gguf.orig_shape.{k}": SimpleNamespace(parts=[[n] for n in shape],
                                                          data=range(len(shape)))
            for k, (_, form, shape) in content.items() if form == "flat"
        }  # fmt: skip
        self.tensors = [
            SimpleNamespace(name=k, data=v.numpy(), tensor_type=form, shape=v.shape[::-1])
            for k, (v, form, _) in content.items()
        ]


def dequantize(data, form):
    if form == "unknown":
        raise NotImplementedError(f"{form} is not decoded")
    return data.astype("float32") / (64 if form == "bytes" else 1)


def stand_in() -> Any:
    """The package, with two forms of its own."""
    module: Any = ModuleType("gguf")
    module.GGUFReader = Reader
    module.quants = SimpleNamespace(dequantize=dequantize)
    return module


def write(state, path, forms=("bytes",)):
    """A stand-in's file: matrices as bytes, the rest in float32; and the weights that it is of."""
    content, exact = {}, {}
    for i, (k, v) in enumerate(state.items()):
        form, value = "plain", v
        if v.ndim >= 2:
            form = forms[i % len(forms)]
            value = (v * 64).round().clamp(-127, 127).to(torch.int8)
            exact[k] = value.float() / 64
            if form == "flat":
                value, form = value.float().flatten() / 64, "flat"
        exact.setdefault(k, v)
        content[k] = (value, form, list(v.shape))
    torch.save(content, path)
    return str(path), exact
