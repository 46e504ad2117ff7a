"""Small transformers of latents: DiT, PixArt, Stable Diffusion 3, FLUX.1; see families.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers

from tests.helpers import vocabularies

# What they are loaded with in tests, where they make large pictures unless told otherwise.
OPTIONS: dict[str, dict[str, Any]] = {
    "pixart-alpha": {"size": 24},
    "pixart-sigma": {"size": 24},
    "flux-dev": {"size": 24, "embedded_guidance": 2.5},
    "flux-schnell": {"size": 24},
}
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
TRANSFORMER: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}


def t5(width: int = 32) -> tuple[Any, Any]:
    """A T5 of single characters: tokenizer and encoder."""
    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127))]
    tokenizer = vocabularies.t5([(w, -1.0) for w in words])
    config = transformers.T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tokenizer, transformers.T5EncoderModel(config).eval()


def kl_vae(channels: int = 4, **more: Any) -> Any:
    from tests.helpers import families

    return families.kl_vae(channels, **more)


def clip(scratch: Path, projection: bool, width: int = 32, length: int = 40) -> tuple[Any, Any]:
    """A CLIP of single characters: tokenizer and text encoder."""
    from tests.helpers import families

    tokenizer = families.clip_tokenizer(scratch, length)
    sizes = {"hidden_size": width, "projection_dim": width}
    config = families.clip_config(tokenizer, hidden_act="gelu", **sizes)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tokenizer, kind(config).eval()


def dit(root: Path) -> None:
    diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(out_channels=8, sample_size=8, **TRANSFORMER),
        vae=kl_vae(scaling_factor=0.18215),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False),  # pyright: ignore
    ).save_pretrained(root)


def pixart(root: Path, sigma: bool) -> None:
    tokenizer, encoder = t5()
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    kind(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=kl_vae(scaling_factor=0.13025),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=128,
            interpolation_scale=2,
            use_additional_conditions=not sigma,
            caption_channels=32,
            cross_attention_dim=24,
            **TRANSFORMER,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(**BETAS),  # pyright: ignore
    ).save_pretrained(root)


def sd3(root: Path, large: bool, second: int = 32) -> None:
    """SD 3.5's normalised, dual attention and T5 when large; SD 3 without its T5 otherwise.

    Args:
        second: The width of the second text encoder.
    """
    tokenizer, encoder = clip(root / "scratch", True)
    tokenizer_2, encoder_2 = clip(root / "scratch", True, second)
    tokenizer_3, encoder_3 = t5(72) if large else (None, None)
    diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            joint_attention_dim=72,  # of T5, to which CLIP is padded
            caption_projection_dim=24,
            pooled_projection_dim=32 + second,
            pos_embed_max_size=12,
            qk_norm="rms_norm" if large else None,
            dual_attention_layers=(0,) if large else (),
            **TRANSFORMER,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(8, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,  # pyright: ignore[reportArgumentType]
        tokenizer_3=tokenizer_3,  # pyright: ignore[reportArgumentType]
    ).save_pretrained(root)


def flux(root: Path, dev: bool, pipeline: Any = diffusers.FluxPipeline) -> None:
    tokenizer, encoder = clip(root / "scratch", False)
    tokenizer_2, encoder_2 = t5()
    pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, base_shift=0.5, max_shift=1.15
        ),
        vae=kl_vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=dev,
            axes_dims_rope=(4, 4, 8),
        ),
    ).save_pretrained(root)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "dit": dit,
    "pixart-alpha": lambda root: pixart(root, False),
    "pixart-sigma": lambda root: pixart(root, True),
    "sd3": lambda root: sd3(root, False),
    "sd3.5": lambda root: sd3(root, True),
    "flux-dev": lambda root: flux(root, True),
    "flux-schnell": lambda root: flux(root, False),
}
