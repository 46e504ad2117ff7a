"""Small pipelines of Stable Diffusion and SDXL."""

import json
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def tokenizer(folder):
    """CLIP's own tokenizer class on letters alone."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def text_config(width, act, **more):
    return CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, hidden_act=act, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, **more,
    )  # fmt: skip


def vae():
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(latent_channels=4, norm_num_groups=4, sample_size=16, **blocks)


def sd15(folder):
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    rest: dict[str, Any] = {
        "scheduler": DDIMScheduler(), "safety_checker": None, "feature_extractor": None
    }  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config(16, "quick_gelu")), unet=unet,
        tokenizer=tokenizer(folder / "tok"), requires_safety_checker=False, **rest,
    )  # fmt: skip


def sdxl(folder):
    depths: dict[str, Any] = {
        "attention_head_dim": (1, 2, 2), "transformer_layers_per_block": (1, 1, 2)
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4,
        cross_attention_dim=48, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + 32, **depths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler: Any = EulerDiscreteScheduler()
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config(16, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(32, "gelu", projection_dim=32)),
        unet=unet, tokenizer=tokenizer(folder / "tok"), tokenizer_2=tokenizer(folder / "tok"),
        scheduler=scheduler, force_zeros_for_empty_prompt=True,
    )  # fmt: skip


PIPELINES = {"sd15": sd15, "sdxl": sdxl}


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request, tmp_path_factory):
    torch.manual_seed(0)
    made = PIPELINES[request.param](tmp_path_factory.mktemp("parts"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp(type(pipe).__name__)
    pipe.save_pretrained(path)
    return path
