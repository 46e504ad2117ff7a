"""SiT, LightningDiT and U-ViT as denoisers of DiT's pipeline."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from teachers.families.dit import DiT
from teachers.imagenet.lightningdit import LightningDiTModel
from teachers.imagenet.schedule import FlowEuler
from teachers.imagenet.sit import SiTModel
from teachers.imagenet.uvit import UViTModel


class SiT(DiT):
    """SiT, and LightningDiT, whose names are the same."""

    PIPELINES = ()
    BLOCKS = r"blocks\.\d+"
    TIME, SINUSOIDS = r"time\.2", ""
    LORA = r".*(attention\.(qkv|out)|mlp\.(0|2|both|out))"

    @staticmethod
    def classes(pipe: Any) -> int:
        return pipe.transformer.config.num_classes

    @staticmethod
    def stock_scheduler(scheduler: Any) -> Any:
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return FlowEuler.from_config(scheduler.config)
        return scheduler

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.blocks
        return f"backbone.blocks.{len(blocks) // 2}"


class UViT(SiT):
    """U-ViT. Its time has no layer in the published networks, so there is none to add to."""

    BLOCKS = r"(first|middle|last)\.\d+"
    LORA = r".*(attention\.(qkv|out)|mlp\.(0|2)|skip)"

    @property
    def middle(self) -> str:
        return "backbone.middle.0"


MODELS: dict[str, tuple[type[SiT], Any]] = {
    "SiTModel": (SiT, SiTModel),
    "LightningDiTModel": (SiT, LightningDiTModel),
    "UViTModel": (UViT, UViTModel),
}  # by class name: the denoiser and the network
