"""FLUX.2: dev, which is guidance-distilled, and klein, whose base checkpoints are guided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from teachers.errors import UserError, teacher_at
from teachers.families import base
from teachers.families.base import Prompted
from teachers.families.flux import GuidanceCodec
from teachers.pipelines.generic import Generic, Tokens, grid_ids
from teachers.quantised import Precision
from teachers.teacher import Teacher

STEPS = 50  # of the stock pipelines; their shift depends on it


class Cells:
    """Data are 2×2 cells of the VAE's latents, normalised by the VAE's own batch statistics."""

    @staticmethod
    def cells(latents: Tensor) -> Tensor:
        return pixel_unshuffle(latents, 2)

    @staticmethod
    def uncelled(x: Tensor) -> Tensor:
        return pixel_shuffle(x, 2)

    @staticmethod
    def moments(vae: Any) -> tuple[Tensor, Tensor]:
        return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


class Flux2(Cells, Tokens, Generic):
    """A Flux2Transformer2DModel; reads three layers of a language model, 512 tokens long."""

    PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline")
    GRID = "trailing"
    ENCODED = {"encoder_hidden_states": 0}
    PIXELS = 1024
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
        guidance = cond.get("guidance")  # a float32 input in every precision
        return {**super().told(tokens, cond, x_t), **batched, "guidance": guidance}

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


def load(
    folder: Path,
    source: str,
    negative_prompt: str = "",
    size: int | None = None,
    precision: Precision = "fp32",
    embedded_guidance: float | None = None,
    adapters: Sequence[Any] = (),
) -> Teacher:
    """Load a FLUX.2 folder as a teacher.

    Args:
        negative_prompt, size, precision, adapters: As in `teachers.families.base.load`.
        embedded_guidance: The guidance input of dev; by default 4, as in the stock pipeline.

    Raises:
        UserError: as in `teachers.families.base.load`; or the network has no guidance input.
    """
    teacher = base.load(Flux2, folder, source, negative_prompt, size, precision, adapters)
    assert isinstance(teacher.codec, Prompted)
    pipe = teacher.codec.pipe
    if type(pipe).__name__ == "Flux2Pipeline" and pipe.transformer.config.guidance_embeds:
        guidance = 4.0 if embedded_guidance is None else embedded_guidance
        teacher.codec = GuidanceCodec(teacher.codec, guidance)
    elif embedded_guidance is not None:
        raise UserError(
            f"{teacher_at(source)}: embedded_guidance: the network has no such input; remove it"
        )
    return teacher
