"""Qwen-Image (arXiv:2508.02324): two-stream transformer, packed latents of a video autoencoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from teachers.denoiser import Cond
from teachers.families.base import Pretrained

TOKENS = 512  # prompt length limit of the stock pipeline


class QwenImage(Pretrained):
    """A QwenImageTransformer2DModel; Qwen2.5-VL encodes the prompt.

    The stock pipeline rescales guided predictions to the conditional norm, token by token.
    """

    PIPELINES = ("QwenImagePipeline",)
    GRID, FRAMED = "trailing", True
    TIME = r"time_text_embed\.timestep_embedder\.linear_2"
    LORA = r".*attn\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        tokens, shapes = self.image(x_t, cond)
        out = self.backbone(
            tokens.to(self.dtype),
            cond["text"].to(self.dtype),
            cond["mask"],
            self.time(t) / 1000,
            [shapes] * len(x_t),
            return_dict=False,
        )[0]
        count = x_t.shape[-2] * x_t.shape[-1] // 4  # of a picture, which may follow, none is read
        return self.unpack(out[:, :count], tuple(x_t.shape[1:]))

    def image(self, x_t: Tensor, cond: dict[str, Any]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """The tokens (B, N, 4 C) that the network reads beside text, and the sizes of their grids:
        frames, rows and columns."""
        return self.pack(x_t), [(1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)]

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        device = pipe.text_encoder.device
        text, mask = pipe.encode_prompt(prompts, device, max_sequence_length=TOKENS)
        mask = text.new_ones(text.shape[:2]).long() if mask is None else mask  # None: no padding
        left = TOKENS - text.shape[1]
        return {"text": pad(text.float(), (0, 0, 0, left)), "mask": pad(mask, (0, left))}

    @staticmethod
    def kept(pipe: Any, limit: int) -> int:
        return min(
            limit, TOKENS + pipe.prompt_template_encode_start_idx
        )  # template tokens and prompt tokens

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        height, width = size  # its guidance_scale is an input of the network
        return {"prompt": prompts, "true_cfg_scale": 1.0, "height": height, "width": width}

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return 2 * pipe.vae_scale_factor

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        side = pipe.default_sample_size if size is None else size // pipe.vae_scale_factor
        return (pipe.transformer.config.in_channels // 4, side, side)

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.transformer_blocks
        return f"backbone.transformer_blocks.{len(blocks) // 2}"

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """Patches of 2×2 as tokens: (B, C, H, W) to (B, HW / 4, 4 C)."""
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, h * w // 4, 4 * c)

    @staticmethod
    def unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        c, h, w = shape
        x = x.view(len(x), h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(x), c, h, w)
