"""A light decoder: an autoencoder of a few layers learns the pictures of the large one.

SnapFusion (arXiv:2306.00980), SDXS (arXiv:2403.16627) and TAESD replace the decoder of a pipeline:
at one step it is as much of the work as the network. Here it is diffusers' AutoencoderTiny, which
stock pipelines load in the place of theirs. Its decoder learns the teacher's pictures of latents,
half of them data, half the teacher's own x̂ at `times` (of a student of one step: its samples); its
encoder the latents of these pictures, for pipelines that read one.

`distill teach` trains it, with a student's folder as the teacher, and leaves a copy of the folder
with it inside (`distill/pretrain/decoder.py`). Costs a forward of the teacher for half a batch, and
one of its autoencoder.

Differs from SnapFusion: the network is TAESD's and not half as wide a copy, there is no data of the
teacher's 50 steps, and the loss is a mean of absolute differences (SDXS), or of squares (`loss`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.field_types import NonNegative, PositiveInt
from distill.objectives.base import Auxiliary, Batch, Learns, Loss, Objective, Turn
from distill.objectives.noise_levels import Times, Uniform
from teachers import conditions
from teachers.errors import UserError
from teachers.teacher import Teacher


class LightAutoencoder(Auxiliary):
    """An AutoencoderTiny of latents like a teacher's, which `shape` makes.

    Attributes:
        codec: The teacher's, in a tuple: its autoencoder is no part of this one.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        if teacher.codec.vae is None or len(teacher.shape) != 3:
            raise UserError(
                "objective.name: this teacher has no autoencoder of pictures, which a light one "
                "could stand for; name another objective"
            )
        self.codec, self.channels = (teacher.codec,), teacher.shape[0]
        self.tiny: Any = None

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        return cls(teacher)

    def shape(self, width: int, blocks: int, device: torch.device) -> None:
        """Make the autoencoder, of stages of equal width; one for each doubling of the sides."""
        from diffusers import AutoencoderTiny

        vae: Any = self.codec[0].vae
        stages, given = len(vae.config.block_out_channels), dict[str, Any]()
        for side in ("encoder", "decoder"):
            given[f"{side}_block_out_channels"] = (width,) * stages
            given[f"num_{side}_blocks"] = (blocks,) * stages
        made: Any = AutoencoderTiny(latent_channels=self.channels, **given)
        self.tiny = made.to(device).requires_grad_(True)


@dataclass(kw_only=True)
class LightDecoder(Objective):
    decoder: LightAutoencoder
    width: PositiveInt = 16  # channels of every layer; TAESD's are 64
    blocks: PositiveInt = 1  # residual blocks of a stage; TAESD has 3
    loss_of: Literal["l1", "mse"] = "l1"  # what a picture's distance is the mean of
    encoder: NonNegative = 1.0  # weight of the encoder's distance, in units of the latents
    times: Times = Uniform(0.95, 1.0)  # that the teacher's x̂ is taken at

    few_step: ClassVar[bool] = False
    trains: ClassVar[str] = "decoder"
    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        self.decoder.shape(self.width, self.blocks, next(self.teacher.parameters()).device)

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("decoder",), self.picture_loss)

    def picture_loss(self, batch: Batch) -> Loss:
        """The distance of pictures, and of the latents that are read off them."""
        with torch.no_grad():
            latents = self.latents(batch)
            pictures = self.decoder.codec[0].decode(latents)
        found = self.decoder.tiny.decode(latents).sample
        apart = self.distance(found, pictures)
        logs = {"picture": apart, "psnr": -10 * ((found - pictures) / 2).square().mean().log10()}
        value = apart
        if self.encoder:
            logs["latent"] = self.distance(self.decoder.tiny.encode(pictures).latents, latents)
            value = value + self.encoder * logs["latent"]
        return Loss(value, {k: v.detach() for k, v in logs.items()})

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The mean distance () of (B, ...)."""
        return (F.l1_loss if self.loss_of == "l1" else F.mse_loss)(ours, theirs)

    def latents(self, batch: Batch) -> Tensor:
        """Latents (B, ...): data, and in the second half the teacher's x̂ of them under noise."""
        x, half = batch.data, slice(len(batch.data) // 2, None)
        t = self.times.sample(x[half], self.teacher.process)
        x_t = self.teacher.process.noise(x[half], t, batch.noise[half])
        x_hat = self.teacher(x_t, t, conditions.rows(batch.cond, half))
        return torch.cat([x[: half.start], x_hat.to(x)])
