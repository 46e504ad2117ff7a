"""Kolors: SDXL's UNet on ChatGLM's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.families.stable_diffusion import SDXL


class Kolors(SDXL):
    """A UNet2DConditionModel; reads 256 tokens of ChatGLM, and its last token as pooled embedding.

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
