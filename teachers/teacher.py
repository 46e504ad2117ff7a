"""Teachers: a denoiser with its codec, and the one function that loads any of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError, clipped

TERMS = ("README.md", "LICEN[SC]E*")  # files of a model's folder that may state its licence
EMBEDDED = {name: Path(__file__).parent / name for name in ("digits", "shapes")}


class Codec:
    """Prompts or labels, and pixels, to and from what the denoiser sees.

    A codec defines `condition`, `encode` and `decode`, and sets the fields that differ from the
    defaults. A class with these three and `null` that does not derive from this one is accepted
    too: `Teacher` gives its object the other fields where it lacks them.
    """

    null: Cond = None  # the condition that means no condition, each entry (1, ...); None: no such
    classes: int = 0  # how many labels there are, without the null label; 0 where there are none
    null_label: int | None = None  # the label that means no label
    vae: Any = None  # the network between pixels and latents, where there is one
    pipe: Any = None  # the stock diffusers pipeline that it belongs to
    folder: Path | None = None  # the folder that it was loaded from
    # The picture that each prompt comes with (a `conditions.Pictured`): one to "edit", or one with
    # a "mask" where it is painted anew; empty where prompts have none.
    pictures: Literal["", "edit", "mask"] = ""

    def condition(self, prompts: Sequence[Any]) -> Cond:
        """The condition of N prompts, each entry shaped (N, ...)."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Data (N, ...) of images (N, 3|1, H, W) in [-1, 1]."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3|1, H, W) in [-1, 1] of data (N, ...)."""
        raise NotImplementedError

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        """As `decode`, with the latents' graph, through which rewards have gradients."""
        return self.decode(latents)

    def parts(self) -> dict[str, Any]:
        """All that its results depend on, by name: networks, tokenizers, tensors, plain settings.

        What it encoded, which is cached, is valid while these stay the same. The default looks
        them up among its attributes; a codec that knows its own names them.
        """
        return dict(parts_of(self))


FIELDS = ("classes", "null_label", "vae", "pipe", "folder", "pictures")  # of a codec, with defaults
PLAIN = (str, int, float, bool, type(None))
DEPTH = 4  # how many attributes deep a part may be: codec.pipe.text_encoder is 2 deep
SETTING_DEPTH = 2  # the same of tensors and plain settings: deeper ones change in use


def is_tokenizer(value: Any) -> bool:
    """Whether it is a tokenizer of transformers, which need not be imported for that."""
    transformers = sys.modules.get("transformers.tokenization_utils_base")
    return transformers is not None and isinstance(value, transformers.PreTrainedTokenizerBase)


def parts_of(codec: Any) -> Iterator[tuple[str, Any]]:
    """The parts of any object that serves as a codec, by its attributes' names.

    Private tensors and settings are left out, and fields that have their default.
    """
    seen: set[int] = set()
    todo: list[tuple[str, Any, int]] = [("", codec, 0)]
    while todo:
        path, value, depth = todo.pop()
        if id(value) in seen and not isinstance(value, PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, type):
            yield path, value.__qualname__
        elif _is_part(path, value, depth):
            yield path, value
        inner = [] if depth >= DEPTH else _attributes(value, depth)
        todo += [(f"{path}.{k}" if path else str(k), v, depth + 1) for k, v in inner]


def _is_part(path: str, value: Any, depth: int) -> bool:
    if isinstance(value, nn.Module) or is_tokenizer(value):
        return True
    private = any(name.startswith("_") for name in path.split("."))
    return isinstance(value, (Tensor, *PLAIN)) and depth <= SETTING_DEPTH and not private


def _attributes(value: Any, depth: int) -> list[tuple[Any, Any]]:
    """What is looked at inside a value: nothing of networks, but for a codec that is one itself."""
    if isinstance(value, nn.Module):
        own = {} if depth else vars(value)
        inner = [(k, v) for k, v in own.items() if isinstance(v, PLAIN) and k != "training"]
    elif is_tokenizer(value) or isinstance(value, (Tensor, type, *PLAIN)):
        return []
    elif isinstance(value, dict):
        return [*value.items()]
    elif isinstance(value, list | tuple):
        return [*enumerate(value)]
    else:
        inner = [*vars(value).items()] if hasattr(value, "__dict__") else []  # not of slots
    return inner if depth else [(k, v) for k, v in inner if not _is_default(k, v)]


def _is_default(name: str, value: Any) -> bool:
    return name in FIELDS and isinstance(value, PLAIN) and value == vars(Codec)[name]


def labels_of(prompts: Sequence[Any], classes: int) -> list[int]:
    """Class labels, given as integers or as decimal strings.

    Raises:
        UserError: one is not an integer in [0, classes).
    """
    for p in prompts:
        text = str(p).strip()
        digits = text.isdecimal() and len(text) <= 18  # int() refuses thousands of digits
        if not digits or int(text) >= classes:
            raise UserError(
                f"labels: {clipped(p)} is outside 0 to {classes - 1}; give one of those"
            )
    return [int(p) for p in prompts]


class Pixels(Codec):
    """The codec of models of pixels: data are images. Labels, where there are any, are integers.

    Args:
        classes: How many labels there are, without the null label; 0 for unconditional models.
        null: The label that means no label, if the network was trained with one.
    """

    def __init__(self, classes: int = 0, null: int | None = None) -> None:
        self.classes, self.null_label = classes, null
        self.null = None if null is None else {"class_labels": torch.tensor([null])}

    def condition(self, prompts: Sequence[Any]) -> Cond:
        """Labels as {"class_labels": (N,) int64}; None for unconditional models.

        Raises:
            UserError: a label is not an integer in [0, classes).
        """
        if not self.classes:
            return None
        return {"class_labels": torch.tensor(labels_of(prompts, self.classes))}

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def parts(self) -> dict[str, Any]:
        null = {"null": None} if self.null is None else prefixed("null", self.null)
        return {"classes": self.classes, "null_label": self.null_label, **null}


def prefixed(name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries under dotted names that begin with `name`."""
    return {f"{name}.{k}": v for k, v in entries.items()}


@dataclass
class Teacher:
    """A pretrained model: its denoiser, its codec, and the shape of one datum without the batch."""

    denoiser: Denoiser
    codec: Codec
    shape: tuple[int, ...]
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # what it was loaded with
    fusion: Any = None  # LoRA files in its weights: a teachers.adapters.fuse.Fusion

    def __post_init__(self) -> None:
        """Give a codec whose class does not derive from `Codec` the fields that it lacks."""
        if isinstance(self.codec, Codec):
            return
        for name in FIELDS:
            if not hasattr(self.codec, name):
                setattr(self.codec, name, vars(Codec)[name])
