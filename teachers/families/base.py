"""Stock diffusers pipelines as teachers: one loader and one codec; a family says what differs.

A family is a `Pretrained` subclass of a few lines: how its network is called, and how prompts
become conditions. VAE scale and shift, timestep shift, time units and prediction type are read from
the checkpoint's configs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from teachers.denoiser import Network, coefficients
from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.prompt_limits import Cuts
from teachers.quantised import DTYPES, FORMS, Precision, quantise
from teachers.storage.components import check_parts, check_vocabulary, quiet, stock
from teachers.storage.diffusers_config import Schedule, read
from teachers.teacher import PLAIN, Codec, Teacher, is_tokenizer, labels_of, prefixed

__all__ = ["Pretrained", "Prompted", "check_vocabulary", "images_of", "load", "quiet", "stock"]


class Pretrained(Network):
    """A network out of a diffusers folder. A family overrides `call`, and what else differs.

    What its pipeline tells it of a picture's height and width it is told in `call`, from the shape
    of x_t, and by no condition: batches of several shapes are all told their own.

    Args:
        schedule: How its outputs and times are to be read.
        per_latent: How many pixels of a side become one of a latent's.
    """

    PIPELINES: ClassVar[tuple[str, ...]] = ()  # classes that model_index.json may name
    PART: ClassVar[str] = "transformer"  # where the pipeline keeps the network
    # How its pipeline asks for times: of the scheduler's own making, or σ from 1 to 1/n.
    GRID: ClassVar[Literal["own", "trailing"]] = "own"
    SEEDED: ClassVar[bool] = False  # whether it hands its generator on to the scheduler's steps
    FRAMED: ClassVar[bool] = False  # whether its VAE is one for videos, of which it makes pictures
    SQUARE: ClassVar[bool] = False  # whether its pipeline draws squares of one size alone
    SCALED: ClassVar[bool] = False  # whether it knows EDM's schedulers, which scale its input
    FLOWS: ClassVar[bool] = True  # whether its pipeline runs with schedulers of rectified flow
    LORA: ClassVar[str] = r".*attn\d?\.(to_q|to_k|to_v|to_out\.0)"  # what adapters adapt: a regex

    def __init__(self, backbone: nn.Module, schedule: Schedule, per_latent: int = 1) -> None:
        super().__init__(backbone, schedule.process, schedule.predicts)
        self.schedule, self.per_latent = schedule, per_latent

    def twin(self, backbone: nn.Module, schedule: Schedule) -> Self:
        """Another network of this family, whose pictures are as many pixels large."""
        twin = type(self)(backbone, schedule)
        twin.per_latent = self.per_latent
        return twin

    def seen(self, x_t: Tensor) -> tuple[int, int]:
        """Height and width in pixels of the pictures that x_t (B, C, ..., H, W) becomes."""
        return x_t.shape[-2] * self.per_latent, x_t.shape[-1] * self.per_latent

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
    def kept(pipe: Any, limit: int) -> int:
        """How many of the `limit` tokens that a tokenizer makes at most its pipeline hands on."""
        return limit

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
        backbone: Any = self.backbone
        if getattr(backbone, "mid_block", None) is None:  # some UNets go straight up again
            return f"backbone.down_blocks.{len(backbone.down_blocks) - 1}"
        return "backbone.mid_block"

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """x (B, C, H, W) in the layout that the pipeline draws its noise for returns in."""
        return x

    @staticmethod
    def unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack`."""
        return x


def repeated(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers for every sample of `like` (B, ...), as (B, len(values)).

    Filled in on its device: a copy from the host would be made at every call of the network.
    """
    columns = [torch.full((len(like),), v, dtype=dtype, device=like.device) for v in values]
    return torch.stack(columns, 1)


class Prompted(Codec):
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
        self._cuts: Cuts | None = None

    @property
    def vae(self) -> nn.Module:
        """What makes latents of pictures and pictures of latents."""
        return self.pipe.vae

    @property
    def grain(self) -> int:
        """What the side of a picture must be a multiple of, in pixels."""
        return self.kind.grain(self.pipe)

    @property
    def null(self) -> dict[str, Tensor]:
        """The negative prompt's condition, each entry (1, ...); encoded once."""
        if self._null is None:
            with torch.no_grad(), quiet(), self._watched([str(self.negative)]):
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

    def parts(self) -> dict[str, Any]:
        """Its own settings, and of the pipeline its encoders, tokenizers and plain settings."""
        kinds = (nn.Module, Tensor, *PLAIN)
        of_pipe = {
            name: part
            for name, part in vars(self.pipe).items()
            if name != self.kind.PART and not name.startswith("_")
            if isinstance(part, kinds) or is_tokenizer(part)
        }
        settings = {"classes": self.classes, "kind": self.kind.__qualname__}
        sizes = {f"size.{i}": side for i, side in enumerate(self.size)}
        return {**settings, "negative": self.negative, **sizes, **prefixed("pipe", of_pipe)}

    def arguments(self, prompts: list[Any]) -> dict[str, Any]:
        """How the stock pipeline is asked for the pictures that these conditions mean."""
        return self.kind.arguments(prompts, self.size)

    @contextmanager
    def counting(self) -> Iterator[Cuts]:
        """Within it, what is encoded is counted, and what of it an encoder does not read to its
        end."""
        before, self._cuts = self._cuts, Cuts()
        try:
            yield self._cuts
        finally:
            self._cuts = before

    def _watched(self, prompts: list[str]) -> AbstractContextManager[None]:
        return (
            nullcontext()
            if self._cuts is None
            else self._cuts.counting(self.pipe, self.kind, prompts)
        )

    @torch.no_grad()
    def _embed(self, prompts: list[Any]) -> dict[str, Tensor]:
        with quiet(), self._watched([str(p) for p in prompts]):
            return self.kind.embed(self.pipe, prompts, self.size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (N, ...) of images (N, 3, H, W) in [-1, 1]: the mode of the VAE's posterior.

        Videos are (N, 3, F, H, W).
        """
        vae = self.pipe.vae
        if self.kind.FRAMED:
            images = images.unsqueeze(2)
        latent = mode(vae.encode(images.to(vae.dtype).to(vae.device)))
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


def images_of(output: Any) -> Tensor:
    """The images (N, 3, H, W) in [0, 1] of a pipeline that was asked for "pt", or its videos.

    DiT's pipeline before diffusers 0.41 gives NumPy's (N, H, W, 3), whatever it is asked.
    """
    made = next(iter(output.values()))
    return made if isinstance(made, Tensor) else torch.from_numpy(made).movedim(-1, 1)


def mode(encoded: Any) -> Tensor:
    """The likeliest latent of what an autoencoder's `encode` returns.

    Deterministic ones say it outright: DC-AE as `latent`, the tiny ones as `latents`.

    Raises:
        UserError: it returns something else.
    """
    if "latent_dist" in encoded:
        return encoded.latent_dist.mode()
    for name in ("latent", "latents"):
        if name in encoded:
            return encoded[name]
    kind = type(encoded).__name__.removesuffix("Output")
    raise UserError(f"vae: a {kind} gives no latents (latent_dist, latent or latents)")


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
    who = teacher_at(source)
    if precision not in DTYPES:
        raise UserError(f"{who}: precision {precision!r}: {nearest(precision, DTYPES)}")
    check_parts(folder, who)
    pipe = stock(folder, who, {kind.PART: DTYPES[precision], "default": torch.float32})
    backbone = getattr(pipe, kind.PART)
    if precision in FORMS:
        quantise(backbone, precision)
    if size is not None and (size <= 0 or size % kind.grain(pipe)):
        raise UserError(f"{who}: size {size} is no multiple of {kind.grain(pipe)} pixels")
    shape = shape_of(kind, pipe, size, who)
    config = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    name = type(pipe.scheduler).__name__
    schedule = read(name, config, who, kind.tokens(shape))
    check_schedule(kind, schedule, type(pipe).__name__, who)
    network = kind(backbone, schedule, kind.factor(pipe))
    classes = kind.classes(pipe)
    if classes and negative_prompt:
        raise UserError(f"{who}: it takes labels and not prompts; leave out negative_prompt")
    codec = Prompted(pipe, kind, kind.pixels(pipe, shape), classes or negative_prompt, classes)
    codec.folder = folder
    return Teacher(network, codec, shape, source)


def shape_of(kind: type[Pretrained], pipe: Any, size: int | None, who: str) -> tuple[int, ...]:
    """Of one latent, without the batch.

    Raises:
        UserError: the network's config gives no whole numbers for it.
    """
    try:
        shape = kind.shape(pipe, size)
    except TypeError:  # such as of a sample_size that is null
        shape = ()
    if not shape or any(type(v) is not int or v < 1 for v in shape):  # a bool is an int as well
        config = getattr(pipe, kind.PART).config
        raise UserError(
            f"{who}: {kind.PART}/config.json: sample_size is "
            f"{clipped(repr(config.get('sample_size')))} and in_channels "
            f"{clipped(repr(config.get('in_channels')))}; expected whole numbers from 1"
        )
    return shape


def check_schedule(kind: type[Pretrained], schedule: Schedule, pipeline: str, who: str) -> None:
    """Refuse a scheduler that the family's network would be read wrongly under, or its pipeline
    cannot run with.

    Args:
        pipeline: The class that the folder names, for messages.

    Raises:
        UserError: naming the scheduler.
    """
    if schedule.sigma_data is not None and not kind.SCALED:
        raise UserError(
            f"{who}: scheduler: {schedule.name} (EDM) under a {pipeline} is not supported: EDM's "
            "networks can be distilled where they are a UNet2DModel or in EDM's own files"
        )
    if schedule.predicts == "flow" and not kind.FLOWS:
        raise UserError(
            f"{who}: scheduler: {schedule.name} (flow matching) under a {pipeline} is not "
            "supported: that pipeline cannot run the schedulers of its students; give a checkpoint "
            "of ε or v, whose scheduler has betas"
        )
