"""Teachers: a denoiser with its codec, and the one function that loads any of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.files import home

TERMS = ("README.md", "LICEN[SC]E*")  # files of a model's folder that may state its licence
EMBEDDED = {name: Path(__file__).parent / name for name in ("digits", "shapes")}


class Codec(Protocol):
    """Prompts or labels, and pixels, to and from what the denoiser sees."""

    @property
    def null(self) -> Cond:
        """What stands for no condition, each entry shaped (1, ...); None: there is none."""
        ...

    def condition(self, prompts: Sequence[Any]) -> Cond:
        """The condition of N prompts, each entry shaped (N, ...)."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Data (N, ...) of images (N, 3|1, H, W) in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3|1, H, W) in [-1, 1] of data (N, ...)."""
        ...


def labels_of(prompts: Sequence[Any], classes: int) -> list[int]:
    """Class labels, given as integers or as decimal strings.

    Raises:
        UserError: one is not an integer in [0, classes).
    """
    for p in prompts:
        text = str(p).strip()
        digits = text.isdecimal() and len(text) <= 18  # Python reads no number of thousands
        if not digits or int(text) >= classes:
            raise UserError(f"labels: {clipped(p)} is outside 0 to {classes - 1}")
    return [int(p) for p in prompts]


class Pixels:
    """A codec for models of pixels: data are images. Labels, where there are any, are integers.

    Args:
        classes: How many labels there are, not counting the null one; 0 for unconditional models.
        null: The label that stands for no label, if the network was trained with one.
    """

    def __init__(self, classes: int = 0, null: int | None = None) -> None:
        self.classes, self.null_label = classes, null
        self.null: Cond = None if null is None else {"class_labels": torch.tensor([null])}

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


@dataclass
class Teacher:
    """A pretrained model: its denoiser, its codec, and the shape of one datum without the batch."""

    denoiser: Denoiser
    codec: Codec
    shape: tuple[int, ...]
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # what it was loaded with


def load(source: str, **options: Any) -> Teacher:
    """The teacher at `source`, frozen and in eval mode.

    Args:
        source: "digits" or "shapes" (embedded), "analytic:NAME" (closed form), a diffusers folder,
            a Hub id, a published EDM or EDM2 .pkl, the folder that it was converted to, or
            "path/to/file.py:function" for a function that returns a Teacher.
        options: The family's own: `null_label`, the class that means none, for UNet2D pipelines;
            that and `vae`, the folder of their latents' AutoencoderKL, for EDM and EDM2;
            `negative_prompt`, `size` (pixels) and `precision` (fp32, bf16, fp16, fp8, nf4) for the
            others,
            `frames` for videos, and `embedded_guidance` for FLUX.1-dev.

    Raises:
        UserError: nothing is there, the files are not whole, the family is not supported, or it
            does not know the option.
    """
    if source.startswith("analytic:"):
        if options:
            raise UserError(f"{teacher_at(source)} takes no options; leave out {min(options)}")
        return _analytic(source)
    if source.rpartition(":")[0].endswith(".py"):
        if options:
            raise UserError(f"{teacher_at(source)} takes no options; leave out {min(options)}")
        return _own(source)
    if source == "digits":
        options.setdefault("null_label", 10)
    pickled = source.endswith(".pkl")
    at = partial(home, who="teacher") if pickled else find
    folder = EMBEDDED.get(source) or at(source)
    family, loader = loader_of(folder, source)
    takes = list(signature(loader).parameters)[2:]
    if unknown := sorted(options.keys() - set(takes)):
        raise UserError(
            f"{teacher_at(source)}: {family} has no option {clipped(unknown[0])!r}; "
            f"{nearest(unknown[0], takes)}"
        )
    teacher = loader(folder, source, **options)
    teacher.options = options
    teacher.denoiser.eval().requires_grad_(False)
    return teacher


def loader_of(path: Path, source: str) -> tuple[str, Any]:
    """The family of a folder or pickle, by name, and its loader."""
    if path.suffix == ".pkl" or (path / "config.json").is_file():
        from teachers import edm_files

        if edm_files.recognises(path):
            return "an EDM network", edm_files.load
    index = read_json(path / "model_index.json", teacher_at(source))
    family = str(index.get("_class_name", "a nameless class"))
    known = families()
    if family not in known:
        raise UserError(
            f"{teacher_at(source)}: {clipped(family)} is not supported; {nearest(family, known)}"
        )
    return family, known[family]


def families() -> dict[str, Any]:
    """Loaders by the pipeline class that a folder's model_index.json names."""
    from teachers import (
        dit,
        flux,
        lumina,
        pipeline,
        pixart,
        qwen,
        sana,
        sd3,
        stable,
        unet,
        wan,
        zimage,  # all of them only when something is loaded
    )

    table: dict[str, Any] = dict.fromkeys(unet.UNet.PIPELINES, unet.load)
    for kind in (
        stable.StableDiffusion,
        stable.SDXL,
        dit.DiT,
        pixart.PixArtAlpha,
        pixart.PixArtSigma,
        sd3.StableDiffusion3,
        sana.Sana,
        lumina.Lumina2,
        qwen.QwenImage,
        zimage.ZImage,
    ):
        table |= dict.fromkeys(kind.PIPELINES, partial(pipeline.load, kind))
    table |= dict.fromkeys(flux.Flux.PIPELINES, flux.load)
    return table | dict.fromkeys(wan.Wan.PIPELINES, wan.load)


def find(source: str) -> Path:
    """The folder of a local path or of a Hub id, downloading once what its pipeline is loaded from,
    and its licence with it.

    Raises:
        UserError: there is none, or it is a single file.
    """
    folder = home(source, "teacher")
    if isdir(folder):  # for the longest of names too, at which Path's own raises
        return folder
    from teachers import download

    who = teacher_at(source)
    download.refuse_file(source, who)
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        if isfile(folder):
            raise UserError(f"{who}: it is a file; give a diffusers pipeline folder")
        raise UserError(f"{who}: no such folder, and not a Hub id (OWNER/NAME)")
    return download.fetch(source)


def read_json(path: Path, who: str) -> dict[str, Any]:
    """A JSON object from a file that must be there and be one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{who}: {path} is missing; give a diffusers pipeline folder") from None
    except OSError as error:  # such as a folder of that name
        raise UserError(f"{who}: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else clipped(error)
        raise UserError(f"{who}: {path} is not valid JSON ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{who}: {path} is not a JSON object")
    return content


def _analytic(source: str) -> Teacher:
    from teachers.analytic import ANALYTIC

    name = source.removeprefix("analytic:")
    if name not in ANALYTIC:
        raise UserError(f"{teacher_at(source)} is unknown: {nearest(name, ANALYTIC)}")
    denoiser = ANALYTIC[name]()
    return Teacher(denoiser.eval(), Pixels(), tuple(denoiser.sample(1).shape[1:]), source)


def _own(source: str) -> Teacher:
    """What a user's own function returns."""
    from teachers.plugin import import_file

    place, _, name = source.rpartition(":")
    try:
        module = import_file(home(place, "teacher"))
        function = getattr(module, name, None)
        teacher = function() if callable(function) else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{teacher_at(source)}: {clipped(place)} raised {clipped(reason, 200)}"
        ) from None
    if function is None:
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UserError(
            f"{teacher_at(source)}: no function {clipped(name)!r} in it; {nearest(name, known)}"
        )
    if not isinstance(teacher, Teacher):
        kind = type(teacher).__name__
        raise UserError(f"{teacher_at(source)}: {name} must return a Teacher, not {kind}")
    teacher.denoiser.eval().requires_grad_(False)
    teacher.source = teacher.source or source
    return teacher
