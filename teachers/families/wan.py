"""Wan (arXiv:2503.20314): text to video. Latents are (C, F, H, W); UMT5 encodes prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.denoiser import Cond
from teachers.errors import UserError, teacher_at
from teachers.families import base
from teachers.families.base import Pretrained
from teachers.quantised import Precision
from teachers.storage.files import read_json
from teachers.teacher import Teacher

TOKENS = 512  # prompt length of the stock pipeline
FRAMES, HEIGHT, WIDTH = 81, 480, 832  # default size of videos


class Wan(Pretrained):
    """A WanTransformer3DModel."""

    PIPELINES = ("WanPipeline",)
    TIME = r"condition_embedder\.time_embedder\.linear_2"
    SINUSOIDS = "condition_embedder.timesteps_proj"
    LORA = r".*(attn\d\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        text = cond["text"].to(self.dtype)
        return self.backbone(x_t.to(self.dtype), self.time(t), text, return_dict=False)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights: a few, such as the first, always stay in float32."""
        return self.backbone.patch_embedding.weight.dtype  # pyright: ignore

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        text, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
            device=pipe.text_encoder.device,
        )
        return {"text": text.float()}

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        frames, *rest = size
        return Pretrained.arguments(prompts, tuple(rest)) | {"num_frames": frames}

    @classmethod
    def factor(cls, pipe: Any) -> int:
        return pipe.vae_scale_factor_spatial

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return max(16, cls.factor(pipe) * max(pipe.transformer.config.patch_size[1:]))

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        height, width = (HEIGHT, WIDTH) if size is None else (size, size)
        frames = 1 + (FRAMES - 1) // pipe.vae_scale_factor_temporal
        factor = cls.factor(pipe)
        channels = pipe.transformer.config.in_channels
        return (channels, frames, height // factor, width // factor)

    @classmethod
    def pixels(cls, pipe: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        frames = 1 + (shape[1] - 1) * pipe.vae_scale_factor_temporal
        return (frames, *super().pixels(pipe, shape))

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.blocks
        return f"backbone.blocks.{len(blocks) // 2}"


def load(
    folder: Path,
    source: str,
    negative_prompt: str = "",
    size: int | None = None,
    frames: int | None = None,
    precision: Precision = "fp32",
    adapters: Sequence[Any] = (),
) -> Teacher:
    """Load a Wan folder as a teacher.

    Args:
        negative_prompt, size, precision, adapters: As in `teachers.families.base.load`.
        frames: Frames per video; 81 by default.

    Raises:
        UserError: as in `teachers.families.base.load`; or the model uses two networks, reads one
            time per token, or `frames` is not 1 plus a multiple of the temporal compression.
    """
    who = teacher_at(source)
    index = read_json(folder / "model_index.json", who)
    if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0]:
        raise UserError(
            f"{who}: models of two networks (transformer_2) are not supported; give a model of one"
        )
    if index.get("expand_timesteps"):
        raise UserError(
            f"{who}: expand_timesteps: one time per token is not supported; give another model"
        )
    teacher = base.load(Wan, folder, source, negative_prompt, size, precision, adapters)
    if frames is None:
        return teacher
    codec: Any = teacher.codec
    every = codec.pipe.vae_scale_factor_temporal
    if frames < 1 or (frames - 1) % every:
        raise UserError(f"{who}: frames {frames} does not fit; give 1 plus a multiple of {every}")
    channels, _, *rest = teacher.shape
    teacher.shape = (channels, 1 + (frames - 1) // every, *rest)
    codec.size = Wan.pixels(codec.pipe, teacher.shape)
    return teacher
