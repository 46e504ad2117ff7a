"""Small pipelines that take a picture as a condition; see families.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers

# What they are loaded with in tests, where they make large pictures unless told otherwise.
OPTIONS: dict[str, dict[str, Any]] = {"kontext": {"size": 24, "embedded_guidance": 2.5}}


def inpaint(root: Path, channels: int = 9) -> None:
    """Stable Diffusion 1.5 inpainting."""
    from tests.helpers import families

    tokenizer = families.clip_tokenizer(root / "scratch")
    unet: dict[str, Any] = {**families.UNET, "in_channels": channels, "out_channels": 4}
    scheduler: Any = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **families.BETAS)
    diffusers.StableDiffusionInpaintPipeline(
        vae=families.kl_vae(scaling_factor=0.18215),
        text_encoder=transformers.CLIPTextModel(families.clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(cross_attention_dim=32, attention_head_dim=8, **unet),
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(root)


def inpaint_xl(root: Path) -> None:
    """SDXL inpainting."""
    from tests.helpers import families

    families.sdxl(
        root,
        {"in_channels": 9, "out_channels": 4},
        pipeline=diffusers.StableDiffusionXLInpaintPipeline,
    )


def kontext(root: Path) -> None:
    """FLUX.1 Kontext."""
    from tests.helpers import families_a

    families_a.flux(root, dev=True, pipeline=diffusers.FluxKontextPipeline)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "inpaint": inpaint,
    "inpaint-xl": inpaint_xl,
    "kontext": kontext,
}
