"""Z-Image (arXiv:2511.22699): single-stream transformer, time 0 at noise and 1 at data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from teachers.denoiser import Cond
from teachers.families.base import Pretrained

TOKENS = 512  # prompt length limit of the stock pipeline
PIXELS = 1024  # default image side


class ZImage(Pretrained):
    """A ZImageTransformer2DModel; Qwen3 encodes the prompt in its chat template.

    The positions of image tokens depend on the prompt's length, so each call copies the lengths to
    the host once.
    """

    PIPELINES = ("ZImagePipeline",)
    GRID = "trailing"
    TIME = r"t_embedder\.mlp\.2"
    LORA = r".*(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w\d)"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        lengths = cond["mask"].sum(1).tolist()
        text = [row[:n] for row, n in zip(cond["text"].to(self.dtype), lengths, strict=True)]
        images = list(x_t.to(self.dtype).unsqueeze(2).unbind())
        time = (1000 - self.time(t)) / 1000
        out = self.backbone(images, time, text, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        device = pipe.text_encoder.device
        texts, _ = pipe.encode_prompt(
            [*prompts], device, False
        )  # a copy: encode_prompt changes the list
        ones = [text.new_ones(len(text)).long() for text in texts]
        text = torch.stack([pad(x.float(), (0, 0, 0, TOKENS - len(x))) for x in texts])
        return {"text": text, "mask": torch.stack([pad(x, (0, TOKENS - len(x))) for x in ones])}

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        return Pretrained.arguments(prompts, size) | {
            "guidance_scale": 0.0
        }  # 0 is no guidance here

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return 2 * pipe.vae_scale_factor

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        side = (size or PIXELS) // pipe.vae_scale_factor
        return (pipe.transformer.config.in_channels, side, side)

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.layers
        return f"backbone.layers.{len(blocks) // 2}"
