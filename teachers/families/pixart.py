"""PixArt-α (arXiv:2310.00426) and PixArt-Σ (arXiv:2403.04692)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachers.denoiser import Cond
from teachers.families.base import Pretrained, repeated


def cleans() -> bool:
    """Whether the pipeline can clean captions: it needs bs4 and ftfy, and warns without them."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    return is_bs4_available() and is_ftfy_available()


class PixArtSigma(Pretrained):
    """A PixArtTransformer2DModel; reads T5 tokens, with a mask over the padding."""

    PIPELINES = ("PixArtSigmaPipeline",)
    SEEDED = True
    TIME = r"adaln_single\.emb\.timestep_embedder\.linear_2"
    SINUSOIDS = "adaln_single.emb.time_proj"
    LORA = r".*(attn\d\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        sizes, x_t = self.sizes(x_t), x_t.to(self.dtype)
        out = self.backbone(
            x_t,
            cond["text"].to(self.dtype),
            self.time(t),
            sizes,
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]
        return out[:, : x_t.shape[1]]  # drop a learned variance

    def sizes(self, x_t: Tensor) -> dict[str, Tensor | None]:
        """The network's size inputs: none."""
        return {"resolution": None, "aspect_ratio": None}

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        device, clean = pipe.text_encoder.device, cleans()
        text, mask, _, _ = pipe.encode_prompt(prompts, False, device=device, clean_caption=clean)
        return {"text": text.float(), "mask": mask}

    @staticmethod
    def arguments(prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        # resolution binning would sample another size and resize the image
        exact = {"use_resolution_binning": False, "clean_caption": cleans()}
        return {**Pretrained.arguments(prompts, size), **exact}

    @classmethod
    def grain(cls, pipe: Any) -> int:
        return cls.factor(pipe) * pipe.transformer.config.patch_size

    @property
    def middle(self) -> str:
        blocks: Any = self.backbone.transformer_blocks
        return f"backbone.transformer_blocks.{len(blocks) // 2}"


class PixArtAlpha(PixArtSigma):
    """PixArt-α; its network for 1024 pixels also reads image size and aspect ratio."""

    PIPELINES = ("PixArtAlphaPipeline",)

    def sizes(self, x_t: Tensor) -> dict[str, Tensor | None]:
        """Height and width in pixels (B, 2), and their ratio (B, 1)."""
        config: Any = self.backbone.config
        if config.sample_size != 128:  # the stock pipeline makes the same test
            return super().sizes(x_t)
        height, width = self.seen(x_t)
        return {
            "resolution": repeated((height, width), x_t, self.dtype),
            "aspect_ratio": repeated((height / width,), x_t, self.dtype),
        }
