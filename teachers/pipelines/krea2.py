"""Krea 2: one stream of tokens; the text encoder's layers are fused inside the network."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from teachers.pipelines.generic import Generic, Patches, grid_ids


class Krea2(Patches, Generic):
    """A Krea2Transformer2DModel; reads several layers of Qwen3-VL, under a mask.

    The pipeline's guidance counts from 0: its scale w is g - 1.
    """

    PIPELINES = ("Krea2Pipeline",)
    GRID, FRAMED, UNGUIDED = "trailing", True, 0.0
    ENCODED = {"encoder_hidden_states": 0, "encoder_attention_mask": 1}
    BOOLEAN = frozenset({"encoder_attention_mask"})
    CLOCK, PIXELS = ("timestep", 0), 1024
    TIME = r"time_embed\.linear_2"
    BLOCKS = r"transformer_blocks\.\d+|text_fusion\.\w+_blocks\.\d+"
    LORA = r".*attn\.(to_q|to_k|to_v|to_gate|to_out\.0)|.*ff\.(gate|up|down)"

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        text = cond["encoder_hidden_states"]
        height, width = x_t.shape[-2:]
        grid = grid_ids(height // 2, width // 2, x_t.device)
        ids = pad(grid, (0, 0, text.shape[1], 0))  # the text's positions are all 0
        return {**super().told(tokens, cond, x_t), "position_ids": ids}
