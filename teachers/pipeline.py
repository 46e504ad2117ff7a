"""Stock diffusers pipelines as teachers: one loader and one codec; a family says what differs.

A family is a `Pretrained` subclass of a few lines: how its network is called, and how prompts
become conditions. VAE scale and shift, timestep shift, time units and prediction type are read from
the checkpoint's configs.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from teachers.denoiser import Network, coefficients
from teachers.errors import UserError, nearest
from teachers.quantised import DTYPES, FORMS, Precision, quantise
from teachers.schedule import Schedule, read
from teachers.teacher import Teacher, labels_of, read_json


class Pretrained(Network):
    """A network out of a diffusers folder. A family overrides `call`, and what else differs.

    Args:
        schedule: How its outputs and times are to be read.
    """

    PIPELINES: ClassVar[tuple[str, ...]] = ()  # classes that model_index.json may name
    PART: ClassVar[str] = "transformer"  # where the pipeline keeps the network
    # How its pipeline asks for times: of the scheduler's own making, or σ from 1 to 1/n.
    GRID: ClassVar[Literal["own", "trailing"]] = "own"
    SEEDED: ClassVar[bool] = False  # whether it hands its generator on to the scheduler's steps
    FRAMED: ClassVar[bool] = False  # whether its VAE is one for videos, of which it makes pictures
    # The tokenizer whose length is all that is read of a prompt; where a longer one reads on, none.
    READER: ClassVar[str] = ""
    LORA: ClassVar[str] = r".*attn\d?\.(to_q|to_k|to_v|to_out\.0)"  # what adapters adapt: a regex

    def __init__(self, backbone: nn.Module, schedule: Schedule) -> None:
        super().__init__(backbone, schedule.process, schedule.predicts)
        self.schedule = schedule

    def adopt(self, schedule: Schedule) -> Self:
        """Read the network by another schedule from now on."""
        self.process, self.schedule = schedule.process, schedule
        self.coefficients = coefficients(schedule.predicts)
        return self

    def time(self, t: Tensor) -> Tensor:
        """The time (B,) that the network reads at t (B,)."""
        return self.schedule.time(t)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of what the network is fed."""
        return next(self.backbone.parameters()).dtype

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        """The condition of N prompts, each entry (N, ...) and of a shape that never varies.

        Args:
            size: Height and width of the pictures, in pixels; a video's frames come before them.
        """
        raise NotImplementedError

    @classmethod
    def embed_negative(cls, pipe: Any, prompt: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        """The condition of what guidance moves away from, each entry (1, ...)."""
        return cls.embed(pipe, [prompt], size)

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        """How the stock pipeline is asked for pictures of the prompts, without guidance."""
        height, width = size
        return {"prompt": prompts, "guidance_scale": 1.0, "height": height, "width": width}

    @staticmethod
    def classes(pipe: Any) -> int:
        """How many labels there are, where prompts are labels and the one after is the null label;
        0 where prompts are text."""
        return 0

    @classmethod
    def factor(cls, pipe: Any) -> int:
        """How many pixels of a side become one of a latent's."""
        return pipe.vae_scale_factor

    @classmethod
    def grain(cls, pipe: Any) -> int:
        """What the side of a picture must be a multiple of, in pixels."""
        return cls.factor(pipe)

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        """Of one latent, for pictures of `size` pixels (None: what the checkpoint was made for)."""
        backbone = getattr(pipe, cls.PART)
        side = backbone.config.sample_size
        if size is not None:
            side = size // cls.factor(pipe)
        return (backbone.config.in_channels, side, side)

    @classmethod
    def pixels(cls, pipe: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The size of the pictures that latents of this shape become."""
        return (shape[-2] * cls.factor(pipe), shape[-1] * cls.factor(pipe))

    @staticmethod
    def tokens(shape: tuple[int, ...]) -> int:
        """What its pipeline takes for the length of such a latent's sequence: patches of 2×2."""
        return shape[-1] * shape[-2] // 4

    @staticmethod
    def unguided(backbone: Any) -> None:
        """Make a student's network one that its pipeline never guides, where that can be said.

        A student has its teacher's guidance in its weights already.
        """

    @property
    def middle(self) -> str:
        """The block whose output a critic reads unless told otherwise."""
        return "backbone.mid_block"

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """x (B, C, H, W) in the layout that the pipeline draws its noise for returns in."""
        return x

    @staticmethod
    def unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack`."""
        return x


class Prompted:
    """The codec of a stock pipeline: its text encoders and its VAE.

    Args:
        pipe: The pipeline.
        kind: Its family.
        size: Height and width of the pictures, in pixels; a video's frames come before them.
        negative: What guidance moves away from.
        classes: How many labels there are, where prompts are labels; 0 where they are text.
    """

    def __init__(
        self,
        pipe: Any,
        kind: type[Pretrained],
        size: tuple[int, ...],
        negative: str | int = "",
        classes: int = 0,
    ) -> None:
        self.pipe, self.kind, self.size = pipe, kind, size
        self.negative, self.classes = negative, classes
        self._null: dict[str, Tensor] | None = None

    @property
    def vae(self) -> nn.Module:
        """What makes latents of pictures and pictures of latents."""
        return self.pipe.vae

    @property
    def null(self) -> dict[str, Tensor]:
        """The negative prompt's condition, each entry (1, ...); encoded once."""
        if self._null is None:
            with torch.no_grad(), quiet():
                self._null = self.kind.embed_negative(self.pipe, self.negative, self.size)
        return self._null

    def condition(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """The condition of N prompts, each entry (N, ...).

        Raises:
            UserError: a label is not an integer in [0, classes).
        """
        if not self.classes:
            return self._embed([str(p) for p in prompts])
        return self._embed(labels_of(prompts, self.classes))

    def arguments(self, prompts: list[Any]) -> dict[str, Any]:
        """How the stock pipeline is asked for the pictures that these conditions mean."""
        return self.kind.arguments(prompts, self.size)

    def truncated(self, prompts: Sequence[Any]) -> int:
        """How many of these prompts the text encoder does not read to their end."""
        if not self.kind.READER:
            return 0
        tokenizer = getattr(self.pipe, self.kind.READER)
        with quiet():
            found = tokenizer([str(p) for p in prompts]).input_ids
        return sum(len(ids) > tokenizer.model_max_length for ids in found)

    @torch.no_grad()
    def _embed(self, prompts: list[Any]) -> dict[str, Tensor]:
        with quiet():  # of prompts that are cut, of which `truncated` tells
            return self.kind.embed(self.pipe, prompts, self.size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (N, ...) of images (N, 3, H, W) in [-1, 1]: the mode of the VAE's posterior.

        Videos are (N, 3, F, H, W).
        """
        vae = self.pipe.vae
        if self.kind.FRAMED:
            images = images.unsqueeze(2)
        encoded = vae.encode(images.to(vae.dtype).to(vae.device))
        # deterministic autoencoders (DC-AE) say it outright
        latent = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
        if self.kind.FRAMED:
            latent = latent.squeeze(2)
        shift, scale = self.affine(latent.float())
        return (latent.float() - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] of latents (N, ...)."""
        vae = self.pipe.vae
        shift, scale = self.affine(latents)
        latents = (latents / scale + shift).to(vae.dtype).to(vae.device)
        if self.kind.FRAMED:
            return vae.decode(latents.unsqueeze(2)).sample.float().squeeze(2)
        return vae.decode(latents).sample.float()

    def affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is taken from the VAE's own latents, and what the rest is multiplied by."""
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        factor = config.get("scaling_factor") or 1.0
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, factor
        view = (1, -1, *(1,) * (like.ndim - 2))
        mean, std = (torch.tensor(v, device=like.device).view(view) for v in (mean, std))
        return mean, factor / std

    def to(self, device: torch.device) -> Prompted:
        """Move text encoders and VAE; the network stays where it is."""
        for name, part in self.pipe.components.items():
            if name != self.kind.PART and isinstance(part, nn.Module):
                part.to(device)
        return self


def load(
    kind: type[Pretrained],
    folder: Path,
    source: str,
    negative_prompt: str = "",
    size: int | None = None,
    precision: Precision = "fp32",
) -> Teacher:
    """A pipeline folder as a teacher.

    Args:
        negative_prompt: What guidance moves away from.
        size: Of the pictures, in pixels; by default what the checkpoint was made for.
        precision: Of the network's frozen weights; in fp8 and nf4 they carry adapters only.

    Raises:
        UserError: a file is missing or damaged, the scheduler is of an unknown kind, or the family
            has no use for the option.
    """
    who = f"teacher {source!r}"
    if precision not in DTYPES:
        raise UserError(f"{who}: precision {precision!r}: {nearest(precision, DTYPES)}")
    pipe = stock(folder, who, {kind.PART: DTYPES[precision], "default": torch.float32})
    backbone = getattr(pipe, kind.PART)
    if precision in FORMS:
        quantise(backbone, precision)
    if size is not None and (size <= 0 or size % kind.grain(pipe)):
        raise UserError(f"{who}: size {size} is no multiple of {kind.grain(pipe)} pixels")
    shape = kind.shape(pipe, size)
    config = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    name = type(pipe.scheduler).__name__
    schedule = read(name, config, who, kind.tokens(shape))
    network = kind(backbone, schedule)
    classes = kind.classes(pipe)
    if classes and negative_prompt:
        raise UserError(f"{who}: it takes labels and not prompts; leave out negative_prompt")
    codec = Prompted(pipe, kind, kind.pixels(pipe, shape), classes or negative_prompt, classes)
    return Teacher(network, codec, shape, source)


def stock(folder: Path, who: str, dtypes: dict[str, torch.dtype]) -> Any:
    """The pipeline in a folder, from safetensors only, without a safety checker.

    Raises:
        UserError: it cannot be read, or weights of some part are not there: diffusers would leave
            them without values, and transformers would draw them at random.
    """
    import diffusers

    index = read_json(folder / "model_index.json", who)
    for part, entry in index.items():
        if not isinstance(entry, list) or part == "safety_checker":
            continue
        if len(entry) != 2:
            raise UserError(f"{who}: model_index.json: {part}: expected two names, not {entry}")
        if entry[0] is None:
            continue
        if not (folder / part).is_dir():
            raise UserError(f"{who}: {folder / part} is missing, which model_index.json names")
        if entry[1].endswith(("Tokenizer", "TokenizerFast")):
            check_vocabulary(folder / part, who)
        pickled = [*(folder / part).glob("*.bin"), *(folder / part).glob("*.pt")]
        if pickled and not list((folder / part).glob("*.safetensors")):
            raise UserError(
                f"{who}: {pickled[0]} is pickled, and pickles are never loaded; "
                "convert the folder with diffusers' save_pretrained first"
            )
    # a part that is listed as null must be passed as None where its class does not call it optional
    absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is None]
    absent += [k for k in index if k == "safety_checker"]
    try:
        with quiet(), silent("diffusers.models.modeling_utils"), invented() as lacking:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=dtypes,
                **dict.fromkeys(absent),
            )
    except Exception as error:  # diffusers and transformers wrap a damaged file in various types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{who}: the pipeline in {folder} cannot be read ({reason})") from None
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            lacking += [f"{part}.{k}" for k, v in module.state_dict().items() if v.is_meta]
    if lacking:
        raise UserError(
            f"{who}: the weights in {folder} are not whole: {lacking[0]} is missing"
            + f", and {len(lacking) - 1} more" * (len(lacking) > 1)
        )
    return pipe


def check_vocabulary(folder: Path, who: str) -> None:
    """Refuse a tokenizer's folder without its vocabulary: transformers would make an empty one.

    Raises:
        UserError: there is none in any of the forms that tokenizers are saved in.
    """
    words = {p.name for p in folder.iterdir()}
    whole = {"tokenizer.json"} & words or {"vocab.json", "merges.txt"} <= words
    if not (whole or "vocab.txt" in words or any(w.endswith(".model") for w in words)):
        raise UserError(
            f"{who}: {folder} lacks its vocabulary: tokenizer.json, vocab.json and merges.txt, "
            "vocab.txt, or a sentencepiece .model; copy it there"
        )


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Without a word from one logger, whose errors are raised as well."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def invented() -> Iterator[list[str]]:
    """The names of weights that transformers had to make up; it only says so in its log."""
    found: list[str] = []
    log = logging.getLogger("transformers.modeling_utils")

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.extend(re.findall(r"^(\S.*?)\s*\| MISSING", record.getMessage(), re.MULTILINE))

    listener, level, passes = Listener(), log.level, log.propagate
    log.addHandler(listener)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield found
    finally:
        log.removeHandler(listener)
        log.setLevel(level)
        log.propagate = passes


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and notes that diffusers and transformers show for every file they touch."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = ours.get_verbosity(), theirs.get_verbosity()
    for part in (ours, theirs):
        part.set_verbosity_error()
        part.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for part, level in zip((ours, theirs), levels, strict=True):
            part.set_verbosity(level)
            part.enable_progress_bar()
