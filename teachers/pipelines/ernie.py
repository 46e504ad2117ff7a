"""ERNIE-Image: one stream of tokens on FLUX.2's latents, prompted by Ministral 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from teachers.pipelines.generic import Cells, Generic

TOKENS = 512  # longer prompts are cut; the stock pipeline cuts where its tokenizer says
EPSILON = 1e-5  # the pipeline's own, whatever the VAE's config says


class Ernie(Cells, Generic):
    """An ErnieImageTransformer2DModel; an image's place follows the prompt's last token."""

    PIPELINES = ("ErnieImagePipeline",)
    GRID, PIXELS = "trailing", 1024
    CLOCK = ("timestep", 1.0)
    TIME = r"time_embedding\.linear_2"
    LORA = r".*(self_attention\.(to_q|to_k|to_v|to_out\.0)|mlp\.(gate_proj|up_proj|linear_fc2))"

    @classmethod
    def embed(cls, pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        pipe.tokenizer.model_max_length = min(pipe.tokenizer.model_max_length, TOKENS)
        texts = cls.encodings(pipe, prompts)
        lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)
        padded = [pad(x.float(), (0, 0, 0, TOKENS - len(x))) for x in texts]
        return {"text_bth": torch.stack(padded), "text_lens": lengths}

    @classmethod
    def arguments(cls, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        return {**super().arguments(prompts, size), "use_pe": False}  # prompts as they are

    @staticmethod
    def moments(vae: Any) -> tuple[Tensor, Tensor]:
        return vae.bn.running_mean, (vae.bn.running_var + EPSILON).sqrt()

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return cls.factor(pipe)

    @property
    def middle(self) -> str:
        return f"{super().middle}.self_attention"  # its blocks have tokens before samples
