"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752), SDXL (arXiv:2307.01952) and Kolors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE, Cond
from teachers.families.base import Pretrained, repeated


class StableDiffusion(Pretrained):
    """A UNet2DConditionModel; reads CLIP tokens."""

    PIPELINES = ("StableDiffusionPipeline",)
    PART, SEEDED, FLOWS = "unet", True, False
    BLOCKS = r".*(resnets|transformer_blocks)\.\d+"
    TIME = r"time_embedding\.linear_2"
    SINUSOIDS = "time_proj"
    LORA = r".*(attn\d\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out)"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        text, x_t = cond["text"].to(self.dtype), x_t.to(self.dtype)
        return self.backbone(
            x_t, self.time(t), text, timestep_cond=self.scale(x_t, cond), return_dict=False
        )[0]  # fmt: skip

    def scale(self, x_t: Tensor, cond: Cond) -> Tensor | None:
        """The embedding (B, D) of the guidance scale that a network with a `time_cond_proj_dim` D
        reads; None for other networks.

        The scale is the condition's `guidance_scale` (B,), by default 1, which is unguided.
        """
        config: Any = self.backbone.config
        if (width := config.time_cond_proj_dim) is None:
            return None
        given, _ = conditions.without(cond, GUIDANCE_SCALE)
        if given is not None:
            return scale_embedding(given.float(), width).to(x_t)
        half = width // 2
        embedding = x_t.new_zeros(len(x_t), width)
        embedding[:, half : 2 * half] = 1
        return embedding

    def add_scale_input(self) -> bool:
        self.unguided(self.backbone)
        return True

    @staticmethod
    def unguided(backbone: Any) -> None:
        """Add a guidance input with zero weights: these pipelines never guide such a network."""
        if backbone.config.time_cond_proj_dim is None:
            width = backbone.time_embedding.linear_1.in_features
            unused = nn.Linear(256, width, bias=False)  # 256: the pipelines' embedding of the scale
            nn.init.zeros_(unused.weight)
            backbone.time_embedding.cond_proj = unused.to(backbone.device, backbone.dtype)
            backbone.register_to_config(time_cond_proj_dim=256)

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        text, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
        return {"text": text.float()}


class SDXL(StableDiffusion):
    """SDXL: two text encoders, a pooled embedding, and six numbers for size and crop.

    The six have the stock pipeline's defaults: the image's own size, uncropped.
    """

    PIPELINES = ("StableDiffusionXLPipeline",)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        text, pooled = cond["text"].to(self.dtype), cond["pooled"].to(self.dtype)
        size, x_t = self.seen(x_t), x_t.to(self.dtype)
        sizes = repeated((*size, 0, 0, *size), x_t, self.dtype)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.backbone(
            x_t,
            self.time(t),
            text,
            timestep_cond=self.scale(x_t, cond),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        device = pipe.text_encoder_2.device
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False
        )
        if pipe.config.force_zeros_for_empty_prompt:  # as in its unconditional training
            empty = torch.tensor([not p for p in prompts], device=device)
            text = text.masked_fill(empty.view(-1, 1, 1), 0)
            pooled = pooled.masked_fill(empty.view(-1, 1), 0)
        return {"text": text.float(), "pooled": pooled.float()}


class Kolors(SDXL):
    """SDXL's UNet; reads 256 tokens of ChatGLM, and the last of them as its pooled embedding.

    Its tokenizer needs sentencepiece.
    """

    PIPELINES = ("KolorsPipeline",)
    LORA = r".*(attn\d\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|\.proj_in|\.proj_out)"

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        device = pipe.text_encoder.device
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False
        )
        if pipe.config.force_zeros_for_empty_prompt:  # of the text alone
            empty = torch.tensor([not p for p in prompts], device=device)
            text = text.masked_fill(empty.view(-1, 1, 1), 0)
        return {"text": text.float(), "pooled": pooled.float()}

    @staticmethod
    def kept(pipe: Any, limit: int) -> int:
        return min(limit, 256)


def scale_embedding(scale: Tensor, width: int) -> Tensor:
    """Sines and cosines (B, width) of guidance scales g (B,): diffusers' embedding of w = g - 1.

    Source: `get_guidance_scale_embedding` of diffusers' LatentConsistencyModelPipeline, in float32.
    """
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=scale.device) * -step)
    angles = (scale - 1)[:, None] * 1000.0 * rates
    embedding = torch.cat([angles.sin(), angles.cos()], 1)
    return nn.functional.pad(embedding, (0, width - 2 * half))
