"""One adapter for pipelines that pass their prompts' encodings to a network by name.

A condition's entries are arguments of the network, as the pipeline passes them. A family declares
which results of its pipeline's `encode_prompt` they are, the units of time, the sign of the output
and the layout of latents. `reading.py` finds the same declarations for pipelines never seen.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Cond
from teachers.families.base import Pretrained
from teachers.families.flux import Flux

# Settings of `encode_prompt` under which it returns the encodings of the prompts alone.
ALONE = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}


class Plain:
    """Latents (B, C, H, W) as they are."""

    pack = staticmethod(Pretrained.pack)
    unpack = staticmethod(Pretrained.unpack)


class Patches:
    """Patches of 2×2 as tokens (B, HW / 4, 4 C)."""

    pack = staticmethod(Flux.pack)
    unpack = staticmethod(Flux.unpack)


class Tokens:
    """One token for each cell: (B, HW, C)."""

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    @staticmethod
    def unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.transpose(1, 2).unflatten(2, shape[-2:])


class Cells:
    """Data are 2×2 cells of the VAE's latents, normalised by the VAE's own batch statistics."""

    @staticmethod
    def cells(latents: Tensor) -> Tensor:
        return pixel_unshuffle(latents, 2)

    @staticmethod
    def uncelled(x: Tensor) -> Tensor:
        return pixel_shuffle(x, 2)

    @staticmethod
    def moments(vae: Any) -> tuple[Tensor, Tensor]:
        return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


class Generic(Pretrained):
    """A network whose pipeline differs from others in what is declared here, and in little else."""

    INPUT: ClassVar[str] = "hidden_states"  # the argument that is the latents
    ENCODED: ClassVar[dict[str, int]] = {}  # arguments, by their index in encode_prompt's results
    BOOLEAN: ClassVar[frozenset[str]] = frozenset()  # those of them that are booleans
    LENGTH: ClassVar[int | None] = None  # max_sequence_length, where the pipeline passes its own
    # The argument that is time, and what the scheduler's index is divided by; 0: by its last one.
    CLOCK: ClassVar[tuple[str, float]] = ("timestep", 1000.0)
    REVERSED: ClassVar[bool] = False  # time is 1 at data: 1 minus that quotient
    ROUNDED: ClassVar[bool] = False  # the network wants time in the dtype of its weights
    SIGN: ClassVar[int] = 1  # -1: the pipeline negates the network's output
    PIXELS: ClassVar[int | None] = None  # the pipeline's own image side, where no config has it
    UNGUIDED: ClassVar[float] = 1.0  # the guidance_scale at which the pipeline does not guide

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        _, cond = conditions.without(cond, GUIDANCE_SCALE)
        assert cond is not None
        name, units = self.CLOCK
        units = units or self.schedule.config["num_train_timesteps"]
        time = (units - self.time(t) if self.REVERSED else self.time(t)) / units
        time = time.to(self.dtype) if self.ROUNDED else time
        told = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in cond.items()}
        arguments = self.told(self.pack(x_t).to(self.dtype), told, x_t)
        out = self.backbone(**arguments, **{name: time}, return_dict=False)[0]
        out = self.unpack(out, tuple(x_t.shape[1:]))[:, : x_t.shape[1]]  # drop a learned variance
        return out if self.SIGN == 1 else -out

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        """The network's arguments beside time.

        Args:
            tokens: The latents in the network's layout and dtype.
            cond: The condition in the network's dtype.
            x_t: (B, C, H, W), for positions that depend on the size.
        """
        masks = {k: cond[k].bool() for k in self.BOOLEAN}
        return {self.INPUT: tokens, **cond, **masks}

    @classmethod
    def embed(cls, pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        results = cls.encodings(pipe, prompts)
        return {k: as_entry(results[i], len(prompts)) for k, i in cls.ENCODED.items()}

    @classmethod
    def encodings(cls, pipe: Any, prompts: list[Any], **more: Any) -> Any:
        """What the pipeline's own `encode_prompt` returns for these prompts, without guidance."""
        known = inspect.signature(pipe.encode_prompt).parameters
        given = {**ALONE, "device": pipe.text_encoder.device, **more}
        if cls.LENGTH is not None:
            given["max_sequence_length"] = cls.LENGTH
        return pipe.encode_prompt([*prompts], **{k: v for k, v in given.items() if k in known})

    @classmethod
    def arguments(cls, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        height, width = size
        scale = {"guidance_scale": cls.UNGUIDED}
        return {"prompt": prompts, **scale, "height": height, "width": width}

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return cls.factor(pipe) * (1 if cls.pack is Tokens.pack else 2)

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        config = getattr(pipe, cls.PART).config
        channels = config.in_channels // (4 if cls.pack is Patches.pack else 1)
        if size is None and cls.PIXELS is None:
            side = getattr(pipe, "default_sample_size", None) or config.sample_size
        else:
            side = (size or cls.PIXELS or 0) // cls.factor(pipe)
        return (channels, side, side)

    @property
    def middle(self) -> str:
        return middle_of(self.backbone)


def middle_of(backbone: Any) -> str:
    """The middle block of a network whose blocks are in lists, which run one after the other."""
    lists = {
        name: module
        for name, module in backbone.named_children()
        if isinstance(module, torch.nn.ModuleList) and (name.endswith("blocks") or name == "layers")
    }
    blocks = [f"backbone.{name}.{i}" for name, these in lists.items() for i in range(len(these))]
    return blocks[len(blocks) // 2]


def as_entry(value: Any, count: int) -> Tensor:
    """A result of `encode_prompt` as a condition's entry (N, ...): float32, or integers."""
    assert isinstance(value, Tensor) and len(value) == count
    return value.float() if value.is_floating_point() else value.to(torch.int64)


def grid_ids(height: int, width: int, device: torch.device, first: Tensor | int = 0) -> Tensor:
    """Positions (H W, 3) of an image's tokens: `first`, row and column, as floats."""
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.full_like(grid[:, :1], int(first)), grid], 1).float()
