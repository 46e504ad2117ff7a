"""Stock diffusers pipelines as teachers: one loader and one codec; a family states what differs.

A family is a `Pretrained` subclass of a few lines: how its network is called, and how prompts
become conditions. VAE scale and shift, timestep shift, time units and prediction type come from the
checkpoint's configs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from teachers.adapters.fuse import fuse
from teachers.conditions import Pictured
from teachers.denoiser import Cond, Network, coefficients
from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.prompt_limits import Cuts
from teachers.quantised import DTYPES, FORMS, Precision, quantise
from teachers.storage import single_files
from teachers.storage.components import check_parts, check_vocabulary, quiet, stock
from teachers.storage.diffusers_config import Schedule, Shift, read, shifted
from teachers.teacher import PLAIN, Codec, Teacher, is_tokenizer, labels_of, prefixed

__all__ = ["Pretrained", "Prompted", "check_vocabulary", "images_of", "load", "quiet", "stock"]


class Pretrained(Network):
    """The network of a diffusers folder. A family overrides `call` and whatever else differs.

    Image height and width, where the network reads them, come from the shape of x_t in `call`, not
    from the condition: batches of different shapes each get their own.

    Args:
        schedule: Process, prediction type and time units of the network.
        per_latent: Pixels per latent cell along one side.
    """

    PIPELINES: ClassVar[tuple[str, ...]] = ()  # classes that model_index.json may name
    PART: ClassVar[str] = "transformer"  # the pipeline component that is the network
    # How the pipeline sets timesteps: by the scheduler's default, or σ from 1 to 1/n.
    GRID: ClassVar[Literal["own", "trailing"]] = "own"
    SEEDED: ClassVar[bool] = False  # the pipeline passes its generator to scheduler.step
    FRAMED: ClassVar[bool] = False  # a video VAE, used for images of one frame
    SQUARE: ClassVar[bool] = False  # the pipeline samples one square size only
    SCALED: ClassVar[bool] = False  # works with EDM schedulers, which scale the input
    FLOWS: ClassVar[bool] = True  # the pipeline works with rectified-flow schedulers
    PICTURES: ClassVar[Literal["", "edit", "mask"]] = ""  # as `Codec.pictures`
    # Regex of the layers whose output embeds the time; a landing time is added there
    # (students/two_time.py).
    TIME: ClassVar[str] = ""
    # The module that makes sinusoids of `time(t)`, for the embedders around the layers of TIME;
    # networks that hand it another number have none.
    SINUSOIDS: ClassVar[str] = ""
    # Regex of the modules that are compiled one by one. Activation checkpointing calls them, or
    # modules around them: a call of it inside compiled code would not restore the adapter.
    BLOCKS: ClassVar[str] = r"\w+\.\d+"
    LORA: ClassVar[str] = r".*attn\d?\.(to_q|to_k|to_v|to_out\.0)"  # regex of layers that get LoRA

    def __init__(self, backbone: nn.Module, schedule: Schedule, per_latent: int = 1) -> None:
        super().__init__(backbone, schedule.process, schedule.predicts)
        self.schedule, self.per_latent = schedule, per_latent

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        with native(x_t.device, self.dtype):
            return super().forward(x_t, t, cond, s)

    def twin(self, backbone: nn.Module, schedule: Schedule) -> Self:
        """Another network of this family with the same pixels per latent cell and shared times."""
        twin = type(self)(backbone, schedule)
        twin.per_latent, twin.share_times = self.per_latent, self.share_times
        return twin

    def seen(self, x_t: Tensor) -> tuple[int, int]:
        """Height and width in pixels of the images that latents x_t (B, C, ..., H, W) decode to."""
        return x_t.shape[-2] * self.per_latent, x_t.shape[-1] * self.per_latent

    def adopt(self, schedule: Schedule) -> Self:
        """Switch to another schedule: process, prediction type and times."""
        self.process, self.schedule = schedule.process, schedule
        self.coefficients = coefficients(schedule.predicts)
        return self

    def time(self, t: Tensor) -> Tensor:
        """The network's time input (B,) for process times t (B,)."""
        return self.schedule.time(t)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, to which inputs are cast."""
        return next(self.backbone.parameters()).dtype

    def add_scale_input(self) -> bool:
        """Give the network an input of the guidance scale that its stock pipeline passes, with zero
        weights; whether there is such an input."""
        return False

    @classmethod
    def of(cls, pipe: Any, size: int | None, who: str) -> type[Pretrained]:
        """The family of this pipeline: this one, unless it is found by looking at the pipeline."""
        return cls

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        """The condition of N prompts: entries (N, ...), with the same shapes at every call.

        Args:
            size: Height and width in pixels; (frames, height, width) for videos.
        """
        raise NotImplementedError

    @classmethod
    def embed_negative(cls, pipe: Any, prompt: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        """The negative prompt's condition: entries (1, ...)."""
        return cls.embed(pipe, [prompt], size)

    @classmethod
    def embed_pictures(cls, codec: Prompted, prompts: list[Pictured]) -> dict[str, Tensor]:
        """The entries (N, ...) of N prompts' pictures, beside those of their texts."""
        raise NotImplementedError

    @classmethod
    def picture_arguments(cls, prompts: list[Pictured]) -> dict[str, Any]:
        """Keyword arguments for the stock pipeline that are these prompts' pictures."""
        raise NotImplementedError

    @staticmethod
    def kept(pipe: Any, limit: int) -> int:
        """How many of the tokenizer's `limit` tokens the pipeline passes to the text encoder."""
        return limit

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        """Keyword arguments for the stock pipeline to sample these prompts without guidance."""
        height, width = size
        return {"prompt": prompts, "guidance_scale": 1.0, "height": height, "width": width}

    @staticmethod
    def classes(pipe: Any) -> int:
        """The number of class labels, which is also the null label; 0 for text prompts."""
        return 0

    @classmethod
    def factor(cls, pipe: Any) -> int:
        """Pixels per latent cell along one side."""
        return pipe.vae_scale_factor

    @classmethod
    def grain(cls, pipe: Any) -> int:
        """The number of pixels that height and width must be a multiple of."""
        return cls.factor(pipe)

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        """The shape of one latent for images of `size` pixels; None: the checkpoint's own size."""
        backbone = getattr(pipe, cls.PART)
        side = backbone.config.sample_size
        if size is not None:
            side = size // cls.factor(pipe)
        return (backbone.config.in_channels, side, side)

    @classmethod
    def pixels(cls, pipe: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width in pixels of images decoded from latents of this shape."""
        return (shape[-2] * cls.factor(pipe), shape[-1] * cls.factor(pipe))

    @staticmethod
    def tokens(shape: tuple[int, ...]) -> int:
        """The sequence length for the scheduler's dynamic shift: number of 2×2 patches."""
        return shape[-1] * shape[-2] // 4

    @classmethod
    def configured(
        cls, config: dict[str, Any], shape: tuple[int, ...], backbone: Any
    ) -> dict[str, Any]:
        """The scheduler's config, with what the pipeline sets in place of the scheduler's own."""
        return config

    @staticmethod
    def stock_scheduler(scheduler: Any) -> Any:
        """A student's stock scheduler in the form that the pipeline calls."""
        return scheduler

    @staticmethod
    def unguided(backbone: Any) -> None:
        """Configure a student's network so that its pipeline applies no guidance, where it can.

        The student's weights already contain the teacher's guidance.
        """

    @property
    def middle(self) -> str:
        """The block that a critic reads by default."""
        backbone: Any = self.backbone
        if getattr(backbone, "mid_block", None) is None:  # some UNets have no middle block
            return f"backbone.down_blocks.{len(backbone.down_blocks) - 1}"
        return "backbone.mid_block"

    @staticmethod
    def cells(latents: Tensor) -> Tensor:
        """The VAE's latents (B, C, H, W) in the layout of the data."""
        return latents

    @staticmethod
    def uncelled(x: Tensor) -> Tensor:
        """The inverse of `cells`."""
        return x

    @staticmethod
    def moments(vae: Any) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation (C,) by which data are normalised; None: as the VAE's config says."""
        return None

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """x (B, C, H, W) in the layout in which the pipeline samples the noise of later steps."""
        return x

    @staticmethod
    def unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack`."""
        return x


def native(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Run a network as stock pipelines run it: weights of 16 bits without autocast.

    Autocast converts between float32 and 16 bits around every normalisation, which nearly doubles
    the time of SDXL's forward pass. Networks in 16 bits have their own islands in float32, such as
    the embedding of the time. Float32 weights, which are those that learn, run under the autocast
    of the training.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def repeated(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` for every sample of `like` (B, ...), as (B, len(values)).

    Filled on the device, because a copy from the host would stall every call of the network.
    """
    columns = [torch.full((len(like),), v, dtype=dtype, device=like.device) for v in values]
    return torch.stack(columns, 1)


class Prompted(Codec):
    """The codec of a stock pipeline: its text encoders and its VAE.

    Args:
        pipe: The pipeline.
        kind: Its family.
        size: Height and width in pixels; (frames, height, width) for videos.
        negative: The negative prompt, or the null label.
        classes: The number of class labels; 0 for text prompts.
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
        self.negative, self.classes, self.pictures = negative, classes, kind.PICTURES
        self._null: dict[str, Tensor] | None = None
        self._cuts: Cuts | None = None

    @property
    def vae(self) -> nn.Module:
        """The autoencoder."""
        return self.pipe.vae

    @property
    def grain(self) -> int:
        """The number of pixels that height and width must be a multiple of."""
        return self.kind.grain(self.pipe)

    @property
    def null(self) -> dict[str, Tensor]:
        """The negative prompt's condition: entries (1, ...). Encoded once."""
        if self._null is None:
            with torch.no_grad(), quiet(), self._watched([str(self.negative)]):
                self._null = self.kind.embed_negative(self.pipe, self.negative, self.size)
                self._null |= self._pictured([self.negative])
        return self._null

    def condition(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """The condition of N prompts: entries (N, ...).

        Raises:
            UserError: a label is not an integer in [0, classes).
        """
        if self.classes:
            return self._embed(labels_of(prompts, self.classes))
        return self._embed([str(p) for p in prompts]) | self._pictured(prompts)

    def with_pictures(self, prompts: Sequence[Any]) -> list[Pictured]:
        """The prompts, those that are texts alone with a grey picture."""
        height, width = self.size[-2:]
        return [
            p if isinstance(p, Pictured) else Pictured.blank(str(p), height, width) for p in prompts
        ]

    @torch.no_grad()
    def _pictured(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        if not self.pictures:
            return {}
        return self.kind.embed_pictures(self, self.with_pictures(prompts))

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
        """Keyword arguments for the stock pipeline to sample these prompts."""
        if not self.pictures:
            return self.kind.arguments(prompts, self.size)
        pictures = self.kind.picture_arguments(self.with_pictures(prompts))
        return {**self.kind.arguments([str(p) for p in prompts], self.size), **pictures}

    @contextmanager
    def counting(self) -> Iterator[Cuts]:
        """Count encoded prompts inside this context, and those that a tokenizer truncates."""
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
        latent = self.kind.cells(latent.float())
        shift, scale = self.affine(latent)
        return (latent - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] of latents (N, ...)."""
        return self.decode_with_graph(latents)

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        shift, scale = self.affine(latents)
        latents = self.kind.uncelled(latents / scale + shift).to(vae.dtype).to(vae.device)
        if self.kind.FRAMED:
            return vae.decode(latents.unsqueeze(2)).sample.float().squeeze(2)
        return vae.decode(latents).sample.float()

    def affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is taken from the VAE's own latents, and what the rest is multiplied by."""
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        factor = config.get("scaling_factor") or 1.0
        if (own := self.kind.moments(self.pipe.vae)) is not None:
            mean, std = (v.to(like).view(1, -1, 1, 1) for v in own)
            return mean, 1 / std
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, factor
        view = (1, -1, *(1,) * (like.ndim - 2))
        mean, std = (torch.tensor(v, device=like.device).view(view) for v in (mean, std))
        return mean, factor / std

    def to(self, device: torch.device) -> Prompted:
        """Move text encoders and VAE to a device; the network stays where it is."""
        for name, part in self.pipe.components.items():
            if name != self.kind.PART and isinstance(part, nn.Module):
                part.to(device)
        return self


def images_of(output: Any) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] from a pipeline called with output_type="pt"; or videos.

    Before diffusers 0.41, DiT's pipeline ignores output_type and returns NumPy (N, H, W, 3).
    """
    images = next(iter(output.values()))
    return images if isinstance(images, Tensor) else torch.from_numpy(images).movedim(-1, 1)


def mode(encoded: Any) -> Tensor:
    """The mode of the latents that an autoencoder's `encode` returns.

    Deterministic autoencoders return latents directly: DC-AE as `latent`, tiny ones as `latents`.

    Raises:
        UserError: the output has none of these fields.
    """
    if "latent_dist" in encoded:
        return encoded.latent_dist.mode()
    for name in ("latent", "latents"):
        if name in encoded:
            return encoded[name]
    kind = type(encoded).__name__.removesuffix("Output")
    raise UserError(f"vae: a {kind} gives none of latent_dist, latent and latents; give another")


def load(
    kind: type[Pretrained],
    folder: Path,
    source: str,
    negative_prompt: str = "",
    size: int | None = None,
    precision: Precision = "fp32",
    adapters: Sequence[Any] = (),
    file: Path | None = None,
    shift: Shift | None = None,
) -> Teacher:
    """Load a pipeline folder as a teacher.

    Args:
        file: A single file of weights; the folder then says what the file does not.
        negative_prompt: The prompt that guidance moves away from.
        size: Image side in pixels; by default the checkpoint's own.
        precision: Storage of the network's frozen weights; fp8 and nf4 allow adapters only.
        adapters: LoRA files that become part of the weights, as {"file": …, "strength": …}.
        shift: Of the noise levels, see `diffusers_config.shifted`; by default the scheduler's.

    Raises:
        UserError: a file is missing or damaged, the scheduler is not supported, or the family does
            not take the option.
    """
    who = teacher_at(source)
    if precision not in DTYPES:
        raise UserError(f"{who}: precision {precision!r}: {nearest(precision, DTYPES)}")
    check_parts(folder, who)
    dtypes = {kind.PART: DTYPES[precision], "default": torch.float32}
    if file is None:
        pipe = stock(folder, who, dtypes)
    else:
        pipe = single_files.stock(file, folder, who, dtypes)
    backbone = getattr(pipe, kind.PART)
    # of a single file, the folder's own weights are another model's
    fusion = fuse(pipe, kind.PART, adapters, folder if file is None else None)
    kind = kind.of(pipe, size, who)
    if precision in FORMS:
        quantise(backbone, precision)
    if size is not None and (size <= 0 or size % kind.grain(pipe)):
        raise UserError(
            f"{who}: size {size} does not fit; give a multiple of {kind.grain(pipe)} pixels"
        )
    shape = shape_of(kind, pipe, size, who)
    config = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    config = kind.configured(config, shape, backbone)
    name = type(pipe.scheduler).__name__
    if shift is not None:
        config = shifted(name, config, shift, who)
        pipe.scheduler = type(pipe.scheduler).from_config(config)
    schedule = read(name, config, who, kind.tokens(shape))
    check_schedule(kind, schedule, type(pipe).__name__, who)
    network = kind(backbone, schedule, kind.factor(pipe))
    classes = kind.classes(pipe)
    if classes and negative_prompt:
        raise UserError(f"{who}: negative_prompt: this model takes class labels; remove it")
    codec = Prompted(pipe, kind, kind.pixels(pipe, shape), classes or negative_prompt, classes)
    codec.folder = folder
    return Teacher(network, codec, shape, source, fusion=fusion)


def shape_of(kind: type[Pretrained], pipe: Any, size: int | None, who: str) -> tuple[int, ...]:
    """The shape of one latent, without the batch.

    Raises:
        UserError: the network's config does not give positive integers.
    """
    try:
        shape = kind.shape(pipe, size)
    except TypeError:  # for example sample_size: null
        shape = ()
    if not shape or any(type(v) is not int or v < 1 for v in shape):  # bool is a subclass of int
        config = getattr(pipe, kind.PART).config
        raise UserError(
            f"{who}: {kind.PART}/config.json: sample_size is "
            f"{clipped(repr(config.get('sample_size')))} and in_channels "
            f"{clipped(repr(config.get('in_channels')))}; expected positive integers"
        )
    return shape


def check_schedule(kind: type[Pretrained], schedule: Schedule, pipeline: str, who: str) -> None:
    """Refuse a scheduler that misreads the family's network, or that its pipeline cannot run.

    Args:
        pipeline: The pipeline class named in the folder, for messages.

    Raises:
        UserError: the scheduler is not supported for this family.
    """
    if schedule.sigma_data is not None and not kind.SCALED:
        raise UserError(
            f"{who}: scheduler: {schedule.name} (EDM) under a {pipeline} is not supported; give an "
            "EDM network as a UNet2DModel or in EDM's own files"
        )
    if schedule.predicts == "flow" and not kind.FLOWS:
        raise UserError(
            f"{who}: scheduler: {schedule.name} (flow matching) under a {pipeline} is not "
            "supported: the pipeline cannot run the students' schedulers; give a checkpoint with "
            "ε or v prediction, whose scheduler has betas"
        )
