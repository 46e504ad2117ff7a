"""FLUX.1: rectified flow on packed latents; the dev checkpoint is guidance-distilled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.denoiser import Cond
from teachers.errors import UserError, teacher_at
from teachers.families import base
from teachers.families.base import Pretrained, Prompted
from teachers.quantised import Precision
from teachers.storage.diffusers_config import Shift
from teachers.teacher import Teacher


class Flux(Pretrained):
    """A FluxTransformer2DModel; reads 2×2 patches, T5 tokens and CLIP's pooled embedding."""

    PIPELINES = ("FluxPipeline",)
    GRID = "trailing"
    GUIDANCE = 3.5  # the stock pipeline's own guidance input
    TIME = r"time_text_embed\.timestep_embedder\.linear_2"
    LORA = (
        r".*(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.(proj_mlp|proj_out))"
    )

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        text, pooled = cond["text"].to(self.dtype), cond["pooled"].to(self.dtype)
        tokens, grid = self.image(x_t, cond)
        out = self.backbone(
            tokens.to(self.dtype),
            text,
            pooled,
            self.time(t) / 1000,  # the network multiplies by 1000
            grid,
            torch.zeros(text.shape[1], 3, device=x_t.device),
            cond.get("guidance"),
            return_dict=False,
        )[0]
        count = x_t.shape[-2] * x_t.shape[-1] // 4  # of a picture, which may follow, none is read
        return self.unpack(out[:, :count], tuple(x_t.shape[1:]))

    def image(self, x_t: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The tokens (B, N, 4 C) that the network reads beside text, and their places (N, 3)."""
        return self.pack(x_t), places(x_t)

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        text, pooled, _ = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
        return {"text": text.float(), "pooled": pooled.float()}

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        side = pipe.default_sample_size if size is None else size // cls.factor(pipe)
        return (pipe.transformer.config.in_channels // 4, side, side)

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return 2 * cls.factor(pipe)

    @property
    def middle(self) -> str:
        backbone: Any = self.backbone
        double, single = backbone.transformer_blocks, backbone.single_transformer_blocks
        half = (len(double) + len(single)) // 2
        if half < len(double):
            return f"backbone.transformer_blocks.{half}"
        return f"backbone.single_transformer_blocks.{half - len(double)}"

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """Patches (B, H W / 4, 4 C) of x (B, C, H, W)."""
        patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H/2, 2, W/2, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    @staticmethod
    def unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        channels, height, width = shape
        patches = x.unflatten(2, (channels, 2, 2)).unflatten(1, (height // 2, width // 2))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def places(x: Tensor, first: int = 0) -> Tensor:
    """The places (H W / 4, 3) of the patches of x (B, C, H, W): `first`, row and column."""
    rows, columns = (torch.arange(n // 2, device=x.device) for n in x.shape[-2:])
    return torch.cartesian_prod(torch.full_like(rows[:1], first), rows, columns)


class GuidanceCodec(Prompted):
    """A codec that adds the guidance input of guidance-distilled networks to conditions."""

    def __init__(self, codec: Prompted, guidance: float) -> None:
        super().__init__(codec.pipe, codec.kind, codec.size, codec.negative)
        self.guidance, self.folder = guidance, codec.folder

    @property
    def null(self) -> dict[str, Tensor]:
        return self._tell(super().null)

    def condition(self, prompts: Any) -> dict[str, Tensor]:
        return self._tell(super().condition(prompts))

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "guidance": self.guidance}

    def arguments(self, prompts: list[Any]) -> dict[str, Any]:
        return {**super().arguments(prompts), "guidance_scale": self.guidance}

    def _tell(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        like = next(iter(cond.values()))
        return {**cond, "guidance": like.new_full((len(like),), self.guidance)}


def load(
    kind: Any,
    folder: Path,
    source: str,
    negative_prompt: str = "",
    size: int | None = None,
    precision: Precision = "fp32",
    embedded_guidance: float | None = None,
    adapters: Sequence[Any] = (),
    file: Path | None = None,
    shift: Shift | None = None,
) -> Teacher:
    """Load a FLUX.1 or FLUX.2 folder as a teacher.

    Args:
        kind: The family, which says its pipeline's own guidance input.
        negative_prompt, size, precision, adapters, file, shift: As in `base.load`.
        embedded_guidance: The guidance input of a guidance-distilled network; by default that of
            the stock pipeline. This is not classifier-free guidance.

    Raises:
        UserError: as in `teachers.families.base.load`; or the network has no guidance input.
    """
    teacher = base.load(
        kind, folder, source, negative_prompt, size, precision, adapters, file, shift
    )
    assert isinstance(teacher.codec, Prompted)
    if teacher.codec.pipe.transformer.config.guidance_embeds:
        teacher.codec = GuidanceCodec(
            teacher.codec, kind.GUIDANCE if embedded_guidance is None else embedded_guidance
        )
    elif embedded_guidance is not None:
        raise UserError(
            f"{teacher_at(source)}: embedded_guidance: the network has no such input; remove it"
        )
    return teacher
