"""Small pipelines that take a picture as a condition; see families.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers

# What they are loaded with in tests, where they make large pictures unless told otherwise.
OPTIONS: dict[str, dict[str, Any]] = {
    "kontext": {"size": 24, "embedded_guidance": 2.5},
    "qwen-edit": {"size": 64},
}


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


VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_edit(root: Path) -> None:
    """Qwen-Image-Edit, whose VAE has 16 pixels to a cell, as its pictures are of a megapixel."""
    from tests.helpers import families_b

    tokenizer = families_b.qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*VISION]})
    tokenizer.chat_template = None
    start, end, image, video = tokenizer.convert_tokens_to_ids([*VISION])
    encoder = families_b.qwen_vl(
        tokenizer, image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end,
    )  # fmt: skip
    side = 28  # pixels of a token
    sizes: dict[str, Any] = {"min_pixels": side**2, "max_pixels": 9 * side**2}
    pixels: Any = transformers.Qwen2VLImageProcessor(**sizes)
    videos = transformers.Qwen2VLVideoProcessor(**sizes)
    diffusers.QwenImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=families_b.qwen_vae(4),
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=transformers.Qwen2VLProcessor(pixels, tokenizer, videos),
        transformer=families_b.qwen_network(),
    ).save_pretrained(root)  # fmt: skip


FAMILIES: dict[str, Callable[[Path], None]] = {
    "inpaint": inpaint,
    "inpaint-xl": inpaint_xl,
    "kontext": kontext,
    "qwen-edit": qwen_edit,
}
