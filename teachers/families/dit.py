"""DiT (arXiv:2212.09748): class-conditional latents of ImageNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.families.base import Pretrained


class DiT(Pretrained):
    """A DiTTransformer2DModel; the null label follows the last class."""

    PIPELINES = ("DiTPipeline",)
    SQUARE = True
    TIME = r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2"
    SINUSOIDS = "transformer_blocks.0.norm1.emb.time_proj"
    LORA = r".*(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        labels, x_t = cond["class_labels"], x_t.to(self.dtype)
        out = self.backbone(x_t, self.time(t), labels, return_dict=False)[0]
        return out[:, : x_t.shape[1]]  # drop a learned variance

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor(prompts)}

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        return {"class_labels": prompts, "guidance_scale": 1.0}

    @staticmethod
    def classes(pipe: Any) -> int:
        return pipe.transformer.config.num_embeds_ada_norm

    @classmethod
    def factor(cls, pipe: Any) -> int:
        return 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        shape = super().shape(pipe, None)
        only = shape[-1] * cls.factor(pipe)
        if size not in (None, only):
            raise UserError(f"size: {size}: DiTPipeline samples {only} pixels only; remove size")
        return shape

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.transformer_blocks
        return f"backbone.transformer_blocks.{len(blocks) // 2}"
