"""UNet2DModel pipelines in pixel space as teachers, unconditional or class-conditional."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from teachers.denoiser import Cond
from teachers.errors import UserError, clipped, teacher_at
from teachers.families.base import Pretrained, check_schedule
from teachers.reduced.source import module_of
from teachers.storage import components
from teachers.storage.components import reduced_class
from teachers.storage.diffusers_config import Shift, read, shifted
from teachers.storage.files import read_json
from teachers.teacher import Pixels, Teacher

Network = TypeVar("Network", bound=nn.Module)
# Class name in config.json -> loader (folder, config, name in errors) -> (denoiser class, network).
Networks = Mapping[str, Callable[[Path, dict[str, Any], str], "tuple[type[UNet], Any]"]]


class SteadyType:
    """Mixin of diffusers' networks: their floating type, without a look at every layer.

    UNet2DModel asks for it in each pass. Stock code then walks through all modules, which with
    adapters takes about a tenth of the host's time. Here the first floating weight is looked up.
    """

    @property
    def dtype(self) -> torch.dtype:
        module, name = vars(self).get("_typed_by", (None, ""))
        weight = None if module is None else module._parameters[name]
        if weight is None or not weight.is_floating_point():
            return super().dtype  # pyright: ignore
        return weight.dtype


def steady_type(network: Network) -> Network:
    """The network, in place, as a subclass of its class, with the same name, whose type is read
    from one weight."""
    kind = type(network)
    names = (n for n, p in network.named_parameters() if p.is_floating_point())
    owner, _, name = next(names).rpartition(".")
    steady = type(kind.__name__, (SteadyType, kind), {"__module__": kind.__module__})
    network.__class__ = steady  # pyright: ignore
    vars(network)["_typed_by"] = (network.get_submodule(owner), name)  # no submodule of its own
    return network


class UNet(Pretrained):
    """A UNet2DModel as a denoiser."""

    PIPELINES = ("ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline", "PNDMPipeline")
    PART, SEEDED, SCALED, FLOWS = "unet", True, True, False
    BLOCKS = r".*(resnets|attentions)\.\d+"
    TIME = r"time_embedding\.linear_2"
    SINUSOIDS = "time_proj"
    LORA = r".*(to_q|to_k|to_v|to_out\.0|conv1|conv2|conv_shortcut|time_emb_proj)"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        if (sigma_data := self.schedule.sigma_data) is not None:
            _, sigma = self.process.at(t, x_t)
            x_t = x_t / (sigma**2 + sigma_data**2).sqrt()
        labels = None if cond is None else cond.get("class_labels")
        x_t = x_t.to(self.dtype)
        out = self.backbone(x_t, self.time(t), class_labels=labels, return_dict=False)[0]
        return out[:, : x_t.shape[1]]  # drop a learned variance

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of ConsistencyModelPipeline, the pipeline of every UNet2D student."""
        return {"batch_size": len(prompts), "class_labels": prompts}


def pipeline(codec: Any, network: Any, scheduler: Any) -> Any:
    """The pipeline that samples a network of a codec with this scheduler.

    A codec of latents has one of its own, which decodes.
    """
    import diffusers

    made = getattr(codec, "pipeline", diffusers.ConsistencyModelPipeline)
    return made(unet=network, scheduler=scheduler)


def load(
    own: Networks,
    folder: Path,
    source: str,
    null_label: int | None = None,
    shift: Shift | None = None,
) -> Teacher:
    """Load a UNet2D pipeline folder as a teacher.

    Args:
        own: Loaders of network classes other than UNet2DModel.
        shift: Of the noise levels that it was trained with: see `diffusers_config.shifted`.

    Raises:
        UserError: a file is missing or damaged, or the scheduler is not supported.
    """
    who = teacher_at(source)
    kind, backbone = backbone_of(own, inside(folder, "unet"), who)
    config = read_json(inside(folder, "scheduler") / "scheduler_config.json", who)
    config = {k: v for k, v in config.items() if not k.startswith("_diffusers")}
    name = str(config.pop("_class_name", ""))
    if shift is not None:
        config = shifted(name, config, shift, who)
    schedule = read(name, config, who)
    check_schedule(kind, schedule, "UNet2DModel", who)
    denoiser = kind(backbone, schedule)
    classes = backbone.config["num_class_embeds"] or 0
    if null_label is not None:
        if not 0 <= null_label < classes:
            raise UserError(
                f"{who}: null_label {null_label} is no class; give one of 0 to {classes - 1}"
            )
        if null_label == classes - 1:
            classes -= 1  # the null class cannot be sampled
    size = backbone.config["sample_size"]
    if type(size) is not int or size < 1:  # bool is a subclass of int
        raise UserError(
            f"{who}: unet/config.json: sample_size is {clipped(repr(size))}; expected a "
            "positive number of pixels: stock pipelines sample one square size"
        )
    shape = (backbone.config["in_channels"], size, size)
    return Teacher(denoiser, Pixels(classes, null_label), shape, source)


def inside(folder: Path, part: str) -> Path:
    """The folder of a pipeline component: its subfolder, or the pipeline's in old layouts."""
    return folder / part if (folder / part).is_dir() else folder


def backbone_of(own: Networks, folder: Path, who: str) -> tuple[type[UNet], Any]:
    """The denoiser class and the network in `folder`, from safetensors only."""
    from diffusers import UNet2DModel

    config = read_json(folder / "config.json", who)
    kind = str(config.get("_class_name"))
    if kind in own:
        return own[kind](folder, config, who)
    network_class = reduced_class([module_of(kind), kind]) or UNet2DModel
    if kind != network_class.__name__:
        raise UserError(f"{who}: {folder / 'config.json'} holds a {kind}; expected a UNet2DModel")
    if (embed := config.get("class_embed_type")) is not None:
        raise UserError(
            f"{who}: class_embed_type {embed!r} is not supported; only class labels are"
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{who}: no safetensors weights in {folder}; pickled weights are never loaded, "
            "convert them with diffusers' save_pretrained first"
        )
    network = steady_type(components.module(network_class, folder, who, low_cpu_mem_usage=False))
    channels, outputs = network.config["in_channels"], network.config["out_channels"]
    if outputs not in (channels, 2 * channels):
        raise UserError(
            f"{who}: {folder / 'config.json'}: out_channels is {outputs}; expected {channels}, or "
            f"{2 * channels} with a learned variance"
        )
    return UNet, network
