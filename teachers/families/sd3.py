"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachers.denoiser import Cond
from teachers.families.base import Pretrained


class StableDiffusion3(Pretrained):
    """An SD3Transformer2DModel; reads tokens of two CLIPs and of T5, which may be missing."""

    PIPELINES = ("StableDiffusion3Pipeline",)
    TIME = r"time_text_embed\.timestep_embedder\.linear_2"
    SINUSOIDS = "time_text_embed.time_proj"
    LORA = (
        r".*(attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        text, pooled = cond["text"].to(self.dtype), cond["pooled"].to(self.dtype)
        return self.backbone(x_t.to(self.dtype), text, pooled, self.time(t), return_dict=False)[0]

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"text": text.float(), "pooled": pooled.float()}

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return cls.factor(pipe) * pipe.transformer.config.patch_size

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.transformer_blocks
        return f"backbone.transformer_blocks.{len(blocks) // 2}"
