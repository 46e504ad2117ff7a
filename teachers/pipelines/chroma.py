"""Chroma: FLUX.1's blocks without its guidance input, on T5 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.families.flux import Flux
from teachers.pipelines.generic import Generic, Patches, grid_ids


class Chroma(Patches, Generic):
    """A ChromaTransformer2DModel; its attention sees the prompt and one token of padding.

    It has no embedding of the time of its own: one small network gives all blocks their shifts.
    """

    PIPELINES = ("ChromaPipeline",)
    GRID = "trailing"
    ENCODED = {"encoder_hidden_states": 0, "attention_mask": 2}
    LORA = Flux.LORA

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        text, mask = cond["encoder_hidden_states"], cond["attention_mask"]
        height, width = x_t.shape[-2:]
        return {
            **super().told(tokens, cond, x_t),
            "attention_mask": torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1),
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": grid_ids(height // 2, width // 2, x_t.device).to(text),
        }
