"""SANA (arXiv:2410.10629): linear attention, 32-fold compressed latents, Gemma for prompts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from teachers.denoiser import Cond
from teachers.families.base import Pretrained


class Sana(Pretrained):
    """A SanaTransformer2DModel; Gemma gets the stock pipeline's instruction with each prompt."""

    PIPELINES = ("SanaPipeline",)
    SEEDED = True
    TIME = r"time_embed\.(emb\.)?timestep_embedder\.linear_2"
    LORA = r".*(attn\d\.(to_q|to_k|to_v|to_out\.0)|conv_inverted|conv_point)"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        config: Any = self.backbone.config
        time = self.time(t) * config.timestep_scale
        x_t, text = x_t.to(self.dtype), cond["text"].to(self.dtype)
        out = self.backbone(
            x_t, text, time, encoder_attention_mask=cond["mask"], return_dict=False
        )[0]  # fmt: skip
        return out[:, : x_t.shape[1]]  # drop a learned variance

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        stock = inspect.signature(type(pipe).__call__).parameters
        return _embed(pipe, prompts, stock["complex_human_instruction"].default)

    @classmethod
    def embed_negative(cls, pipe: Any, prompt: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        return _embed(pipe, [prompt], None)

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        exact = {"use_resolution_binning": False}  # resolution binning would sample another size
        return Pretrained.arguments(prompts, size) | exact

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return max(32, pipe.vae_scale_factor)

    @staticmethod
    def tokens(shape: tuple[int, ...]) -> int:
        return shape[-1] * shape[-2]  # patches of 1×1

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.transformer_blocks
        return f"backbone.transformer_blocks.{len(blocks) // 2}"


def _embed(pipe: Any, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
    text, mask, _, _ = pipe.encode_prompt(
        prompts, False, device=pipe.text_encoder.device, complex_human_instruction=instruction
    )
    return {"text": text.float(), "mask": mask.to(torch.int64)}
