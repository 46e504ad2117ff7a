"""Small pipelines of every family, with random weights, saved in the real on-disk format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.helpers import families_a, families_b, families_c, families_d


def clip_tokenizer(folder: Path, length: int = 40) -> Any:
    """A CLIP tokenizer of single characters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
    )


def clip_config(tokenizer: Any, **more: Any) -> Any:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4,
        "num_hidden_layers": 2, "projection_dim": 32,
    }  # fmt: skip
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=end - 1, eos_token_id=end, pad_token_id=end, **(sizes | more),
    )  # fmt: skip


def kl_vae(channels: int = 4, **more: Any) -> Any:
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=4, sample_size=32,
        **blocks, **more,
    ).eval()  # fmt: skip


UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable(root: Path, prediction: str = "epsilon") -> None:
    """Stable Diffusion 1.x (epsilon) and 2.x (v_prediction)."""
    tokenizer = clip_tokenizer(root / "scratch")
    options: dict[str, Any] = {**BETAS, "prediction_type": prediction}
    scheduler: Any = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **options)
    diffusers.StableDiffusionPipeline(
        vae=kl_vae(scaling_factor=0.18215),
        text_encoder=transformers.CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(cross_attention_dim=32, attention_head_dim=8, **UNET),
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(root)


def sdxl(
    root: Path,
    unet: dict[str, Any] | None = None,
    pipeline: Any = diffusers.StableDiffusionXLPipeline,
    **encoders: Any,
) -> None:
    """SDXL; `unet` and `encoders` are settings of its network's and its text encoders' configs."""
    tokenizer = clip_tokenizer(root / "scratch")
    second = transformers.CLIPTextModelWithProjection(
        clip_config(tokenizer, hidden_act="gelu", **encoders)
    )
    scheduler: Any = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    depths: dict[str, Any] = {"attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2)}
    pipeline(
        vae=kl_vae(scaling_factor=0.13025),
        text_encoder=transformers.CLIPTextModel(clip_config(tokenizer, **encoders)),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            **depths,
            **(UNET | (unet or {})),
        ),
        scheduler=scheduler,
    ).save_pretrained(root)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "sd": stable,
    "sd2": lambda root: stable(root, "v_prediction"),
    "sdxl": sdxl,
    **families_a.FAMILIES,
    **families_b.FAMILIES,
}
RECENT = families_c.FAMILIES  # those of the generic adapter, which have tests of their own
PICTURED = families_d.FAMILIES  # those with a picture as a condition
# What each is loaded with.
OPTIONS = families_a.OPTIONS | families_b.OPTIONS | families_c.OPTIONS | families_d.OPTIONS


def build(name: str, root: Path) -> Path:
    """The folder of a small pipeline of this family."""
    torch.manual_seed(0)
    (FAMILIES | RECENT | PICTURED)[name](root)
    return root
