"""A guide: a ControlNet beside a frozen model whose one evaluation is then the guided one.

Plug-and-play diffusion distillation, Hsiao et al. 2024 (arXiv:2406.01954). The model stays as it
is; a second network, which reads the same x_t, t and caption, adds to the features of its decoder:

    |x̂_{base+guide}(x_t, c) - [x̂(∅) + g (x̂(c) - x̂(∅))]|²

in the units of the network's own loss, at one scale g (`teacher.guidance`). So one evaluation of
both takes the place of two of the base, and a guide that was trained with a base can be put beside
others that were tuned from it.

The guide is diffusers' ControlNetModel with a blank control image, started from the base's weights:
its last layers are zero, so that at first nothing is added. `distill teach` trains it, and leaves a
StableDiffusionControlNetPipeline (`distill/pretrain/guide.py`). Costs two forwards of the teacher,
one of the base and one of the guide.

Differs from the paper: there is one scale for each guide, since a ControlNet reads none; the guide
is as large as the base's encoder, and there is no small one; fewer steps are other objectives'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from distill.objectives.base import Auxiliary, Batch, Learns, Loss, Objective, Turn
from distill.objectives.losses import mean_square
from distill.objectives.noise_levels import Times, Uniform
from students.lora import network_of
from teachers.denoiser import Denoiser, Guided
from teachers.errors import UserError
from teachers.teacher import Teacher

WIDTH = 16  # channels of the layers that read the control image, which is blank


class Beside(nn.Module):
    """A denoiser's UNet with a ControlNet beside it, in its place; a blank image controls it."""

    def __init__(self, network: Any, controlnet: Any) -> None:
        super().__init__()
        self.unet = (network.backbone,)  # in a tuple: its weights are none of this module's
        self.controlnet, self.pixels = controlnet, network.per_latent
        self.config = network.backbone.config

    def forward(self, x_t: Tensor, time: Tensor, text: Tensor, **arguments: Any) -> Any:
        height, width = (side * self.pixels for side in x_t.shape[-2:])
        blank = x_t.new_zeros(len(x_t), 3, height, width)
        down, middle = self.controlnet(x_t, time, text, blank, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet[0](x_t, time, text, **added, **arguments)


class ControlGuide(Auxiliary):
    """A ControlNet, in `beside`, which is the teacher's network with it as a denoiser."""

    def __init__(self, beside: Denoiser) -> None:
        super().__init__()
        self.beside = beside

    @property
    def controlnet(self) -> Any:
        """diffusers' network."""
        return network_of(self.beside).backbone.controlnet

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        """A guide that adds nothing yet.

        Raises:
            UserError: no stock pipeline has a ControlNet beside such a network.
        """
        network: Any = network_of(teacher.denoiser)
        if "StableDiffusionPipeline" not in getattr(network, "PIPELINES", ()):
            raise UserError(
                "objective.name: guide: a guide is beside the UNet of a StableDiffusionPipeline, "
                "which this teacher is not; name another objective"
            )
        if network.backbone.config.time_cond_proj_dim is not None:
            raise UserError(
                "objective.name: guide: this network reads a guidance scale itself; take its "
                "guidance_scale, or another teacher"
            )
        if network.dtype != torch.float32:
            raise UserError(
                "teacher.precision: a guide learns beside float32 weights; set fp32, or remove it"
            )
        return cls(network.twin(Beside(network, controlnet_of(network)), network.schedule))


def controlnet_of(network: Any) -> Any:
    """A ControlNet with the weights of a denoiser's UNet, which adds nothing yet.

    Raises:
        UserError: diffusers makes none of such a UNet.
    """
    from diffusers import ControlNetModel

    halvings = network.per_latent.bit_length() - 1  # of the image's sides, as the VAE's
    widths = (WIDTH,) * (halvings + 1)
    try:
        made: Any = ControlNetModel.from_unet(
            network.backbone, conditioning_embedding_out_channels=widths
        )
    except Exception as error:  # whatever an odd configuration breaks in diffusers
        raise UserError(
            f"objective.name: guide: diffusers makes no ControlNet of this teacher's UNet "
            f"({type(error).__name__}); name another teacher"
        ) from None
    return made


@dataclass(kw_only=True)
class Guide(Objective):
    guide: ControlGuide
    times: Times = Uniform(0.0, 1.0)

    few_step: ClassVar[bool] = False
    trains: ClassVar[str] = "guide"
    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        guided = [m for m in self.teacher.modules() if isinstance(m, Guided) and m.null is not None]
        if not guided or any(m.scale == 1 for m in guided):
            raise UserError(
                "teacher.guidance: 1: there is no guidance to learn; give the scale that one "
                "evaluation is to have, such as 3"
            )

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("guide",), self.guide_loss)

    def guide_loss(self, batch: Batch) -> Loss:
        """The distance to the guided x̂, in the units of the network's loss."""
        x, network = batch.data, self.guide.beside
        t = self.times.sample(x, network.process)
        x_t = network.process.noise(x, t, batch.noise)
        with torch.no_grad():
            target = self.teacher(x_t, t, batch.cond)
        error = mean_square(network(x_t, t, batch.cond), target)
        return Loss((network.weight(t) * error).mean())
