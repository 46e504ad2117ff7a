"""FLUX.2: dev, which is guidance-distilled, and klein, whose base checkpoints are guided."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from teachers.pipelines.generic import Cells, Generic, Tokens, grid_ids

STEPS = 50  # of the stock pipelines; their shift depends on it


class Flux2(Cells, Tokens, Generic):
    """A Flux2Transformer2DModel; reads three layers of a language model, 512 tokens long."""

    PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline")
    GRID, GUIDANCE = "trailing", 4.0
    ENCODED, PIXELS = {"encoder_hidden_states": 0}, 1024
    TIME = r"time_guidance_embed\.timestep_embedder\.linear_2"
    LORA = (
        r".*(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out)|single_\w+\.\d+\.attn\.(to_qkv_mlp_proj|to_out))"
    )

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        text = torch.arange(cond["encoder_hidden_states"].shape[1], device=x_t.device)
        image = grid_ids(x_t.shape[-2], x_t.shape[-1], x_t.device).long()
        places = {  # four axes: which image, row, column, and the place in the text
            "txt_ids": torch.stack([*[torch.zeros_like(text)] * 3, text], 1),
            "img_ids": torch.cat([image, torch.zeros_like(image[:, :1])], 1),
        }
        batched = {k: v.expand(len(x_t), -1, -1) for k, v in places.items()}
        return {"guidance": None, **super().told(tokens, cond, x_t), **batched}

    @classmethod
    def factor(cls, pipe: Any) -> int:
        return 2 * pipe.vae_scale_factor

    @classmethod
    def configured(cls, config: dict[str, Any], shape: tuple[int, ...], backbone: Any):
        if not config.get("use_dynamic_shifting"):
            return config
        mu = empirical_mu(shape[-1] * shape[-2], STEPS)
        return {**config, "use_dynamic_shifting": False, "shift": math.exp(mu)}


def empirical_mu(tokens: int, steps: int) -> float:
    """log of the shift in the stock pipelines: linear in tokens, and in steps between 10 and 200.

    Source: `compute_empirical_mu` of diffusers' Flux2Pipeline.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190
    return many + slope * (steps - 200)
