"""Lumina-Image 2.0 (arXiv:2503.21758): a joint transformer with time 0 at noise and 1 at data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachers.denoiser import Cond
from teachers.families.base import Pretrained


class Lumina2(Pretrained):
    """A Lumina2Transformer2DModel; Gemma encodes the prompt after a system prompt.

    The stock pipeline rescales guided predictions to the conditional norm (`cfg_normalization`);
    `Guided` does not.
    """

    PIPELINES = ("Lumina2Pipeline",)
    GRID = "trailing"
    TIME = r"time_caption_embed\.timestep_embedder\.linear_2"
    LORA = r".*(attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.linear_\d)"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        time = 1 - self.time(t) / self.schedule.config["num_train_timesteps"]
        x_t, text = x_t.to(self.dtype), cond["text"].to(self.dtype)
        return -self.backbone(x_t, time, text, cond["mask"], return_dict=False)[0]

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        text, mask, _, _ = pipe.encode_prompt(prompts, False, device=pipe.text_encoder.device)
        return {"text": text.float(), "mask": mask}

    @classmethod
    def embed_negative(cls, pipe: Any, prompt: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        device = pipe.text_encoder.device  # the negative prompt has no system prompt
        text, mask = pipe._get_gemma_prompt_embeds([prompt], device)
        return {"text": text.float(), "mask": mask}

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return 2 * pipe.vae_scale_factor

    @staticmethod
    def tokens(shape: tuple[int, ...]) -> int:
        return shape[0]  # the pipeline's shift uses the number of channels

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.layers
        return f"backbone.layers.{len(blocks) // 2}"
