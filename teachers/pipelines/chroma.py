"""Chroma: FLUX.1's blocks without its guidance input, on T5 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.denoiser import Cond
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

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        backbone: Any = self.backbone
        if not getattr(backbone, "gradient_checkpointing", False) or not torch.is_grad_enabled():
            return super().call(x_t, t, cond, s)
        assert cond is not None
        mask, own = self.mask(cond["attention_mask"], x_t), backbone._gradient_checkpointing_func

        def recomputed(block: Any, *args: Any) -> Any:
            """diffusers 0.42 leaves the mask out of single blocks that are recomputed."""
            return own(block, *args, mask) if len(args) == 3 else own(block, *args)

        backbone._gradient_checkpointing_func = recomputed
        try:
            return super().call(x_t, t, cond, s)
        finally:
            backbone._gradient_checkpointing_func = own

    def mask(self, text: Tensor, x_t: Tensor) -> Tensor:
        """The mask of the text's and the image's tokens, in the network's dtype."""
        text = text.to(self.dtype)
        return torch.cat([text, text.new_ones(len(x_t), x_t.shape[-1] * x_t.shape[-2] // 4)], 1)

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        text = cond["encoder_hidden_states"]
        height, width = x_t.shape[-2:]
        return {
            **super().told(tokens, cond, x_t),
            "attention_mask": self.mask(cond["attention_mask"], x_t),
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": grid_ids(height // 2, width // 2, x_t.device).to(text),
        }
