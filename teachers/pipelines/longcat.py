"""LongCat-Image: FLUX.1's blocks, prompted by Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.families.flux import Flux
from teachers.pipelines.generic import Generic, Patches, grid_ids

TOKENS = 512  # prompt length of the stock pipeline, and where its image positions begin


class LongCat(Patches, Generic):
    """A LongCatImageTransformer2DModel; text in quotation marks is read letter by letter.

    The stock pipeline rescales guided predictions to the conditional norm (`enable_cfg_renorm`);
    `Guided` does not. Prompts are not rewritten (`enable_prompt_rewrite`).
    """

    PIPELINES = ("LongCatImagePipeline",)
    GRID = "trailing"
    ENCODED = {"encoder_hidden_states": 0}
    TIME = r"time_embed\.timestep_embedder\.linear_2"
    LORA = Flux.LORA

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        height, width = x_t.shape[-2:]
        image = grid_ids(height // 2, width // 2, x_t.device, first=1)
        text = torch.arange(cond["encoder_hidden_states"].shape[1], device=x_t.device).float()
        shift = image.new_tensor([0, TOKENS, TOKENS])
        return {
            **super().told(tokens, cond, x_t),
            "txt_ids": torch.stack([torch.zeros_like(text), text, text], 1),
            "img_ids": image + shift,
            "guidance": None,
        }

    @classmethod
    def arguments(cls, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        return {**super().arguments(prompts, size), "enable_prompt_rewrite": False}
