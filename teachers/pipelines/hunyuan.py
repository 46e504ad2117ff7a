"""HunyuanDiT (arXiv:2405.08748): ε or v on the plain latents of SDXL's VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.families.base import repeated
from teachers.pipelines.generic import Generic


class HunyuanDiT(Generic):
    """A HunyuanDiT2DModel; reads 77 tokens of a bilingual CLIP and 256 of mT5, each masked.

    The size inputs are the stock pipeline's defaults: an original of 1024 pixels, uncropped.
    """

    PIPELINES = ("HunyuanDiTPipeline",)
    SEEDED, FLOWS, ROUNDED = True, False, True
    CLOCK = ("timestep", 1.0)
    TIME = r"time_extra_emb\.timestep_embedder\.linear_2"
    LORA = r".*(attn\d\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        told = super().told(tokens, cond, x_t)
        return {
            **{k: v.contiguous() for k, v in told.items()},  # the network views them
            "image_meta_size": repeated((1024, 1024, *self.seen(x_t), 0, 0), x_t, self.dtype),
            "style": torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device),
            "image_rotary_emb": self.rotary(x_t),
        }

    def rotary(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, centred as if cropped from 512 pixels."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit import pipeline_hunyuandit as stock

        backbone: Any = self.backbone
        patch = backbone.config.patch_size
        grid = tuple(n // patch for n in x_t.shape[-2:])
        crops = stock.get_resize_crop_region_for_grid(grid, 64 // patch)
        channels = backbone.inner_dim // backbone.num_heads
        return get_2d_rotary_pos_embed(channels, crops, grid, device=x_t.device, output_type="pt")  # pyright: ignore[reportReturnType]

    @classmethod
    def embed(cls, pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        entries = {}
        for end, index, length in (("", 0, 77), ("_t5", 1, 256)):
            given = {"text_encoder_index": index, "max_sequence_length": length}
            text, _, mask, _ = cls.encodings(pipe, prompts, **given)
            entries[f"encoder_hidden_states{end}"] = text.float()
            entries[f"text_embedding_mask{end}"] = mask
        return entries

    @classmethod
    def arguments(cls, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        # resolution binning would sample another size
        return {**super().arguments(prompts, size), "use_resolution_binning": False}
