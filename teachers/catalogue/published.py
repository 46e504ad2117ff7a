"""Published facts about well-known checkpoints: their networks' configs, and what these read.

With them a run can be planned before anything is downloaded (`outlines.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from teachers.conditions import NEGATIVE, PICTURE
from teachers.edm import adm
from teachers.imagenet.checkpoints import LIGHTNING_SHIFT, betas
from teachers.storage.diffusers_config import CM

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Outline:
    """The published facts about a checkpoint.

    Args:
        pipeline, network, config: The diffusers classes, and the network's config.
        shape: The shape of one latent at the checkpoint's own size.
        cond: The shapes of the entries of one prompt's condition.
        scheduler: Class name and config.
        encoder_parameters: How many the text encoders and the VAE have together. They leave the
            device once all is encoded.
        factor: Pixels per latent, along each side.
        classes: How many labels there are; 0 where prompts are text.
        integers: Entries of the condition that hold integers.
    """

    pipeline: str
    network: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    cond: dict[str, tuple[int, ...]]
    scheduler: tuple[str, dict[str, Any]]
    encoder_parameters: int
    factor: int = 8
    classes: int = 0
    integers: tuple[str, ...] = field(default=())


SD15 = Outline(
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    (4, 64, 64),
    {"text": (77, 768)},
    ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
    207_000_000,
)
SDXL = Outline(
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
    },
    (4, 128, 128),
    {"text": (77, 2048), "pooled": (1280,)},
    ("EulerDiscreteScheduler", BETAS),
    901_000_000,
)  # fmt: skip
SD35_MEDIUM = Outline(
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16,
        "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    (16, 128, 128),
    {"text": (333, 4096), "pooled": (2048,)},
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    5_670_000_000,
)  # fmt: skip
FLUX_DEV = Outline(
    "FluxPipeline",
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    (16, 128, 128),
    {"text": (512, 4096), "pooled": (768,), "guidance": ()},
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    4_970_000_000,
)
FLUX2_DEV = Outline(
    "Flux2Pipeline",
    "Flux2Transformer2DModel",
    {},
    (128, 64, 64),
    {"encoder_hidden_states": (512, 15360), "guidance": ()},
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    24_100_000_000,
    factor=16,
)
FLUX2_KLEIN_4B = Outline(
    "Flux2KleinPipeline",
    "Flux2Transformer2DModel",
    {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
        "joint_attention_dim": 7680, "guidance_embeds": False,
    },
    (128, 64, 64),
    {"encoder_hidden_states": (512, 7680)},
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    4_100_000_000,
    factor=16,
)  # fmt: skip
# Pictures as conditions: a mask and masked latents, or latents.
SD15_INPAINT = replace(
    SD15,
    pipeline="StableDiffusionInpaintPipeline",
    config={**SD15.config, "in_channels": 9, "out_channels": 4},
    cond={**SD15.cond, PICTURE: (5, 64, 64)},
)
SDXL_INPAINT = replace(
    SDXL,
    pipeline="StableDiffusionXLInpaintPipeline",
    config={**SDXL.config, "in_channels": 9, "out_channels": 4},
    cond={**SDXL.cond, PICTURE: (5, 128, 128)},
)
FLUX_KONTEXT = replace(
    FLUX_DEV, pipeline="FluxKontextPipeline", cond={**FLUX_DEV.cond, PICTURE: (16, 128, 128)}
)
QWEN_IMAGE = Outline(
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    {},
    (16, 128, 128),
    {"text": (512, 3584), "mask": (512,)},
    ("FlowMatchEulerDiscreteScheduler", {
        "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    }),
    8_420_000_000,
    integers=("mask",),
)  # fmt: skip
READ = 1376 + 512  # tokens of Qwen2.5-VL for a picture of a megapixel in its template, and of text
QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    pipeline="QwenImageEditPipeline",
    cond={
        "text": (READ, 3584), "mask": (READ,), f"{NEGATIVE}text": (READ, 3584),
        f"{NEGATIVE}mask": (READ,), PICTURE: (16, 128, 128),
    },
    integers=("mask", f"{NEGATIVE}mask"),
)  # fmt: skip
CHROMA = Outline(
    "ChromaPipeline",
    "ChromaTransformer2DModel",
    {},
    (16, 128, 128),
    {"encoder_hidden_states": (512, 4096), "attention_mask": (512,)},
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    4_850_000_000,
    integers=("attention_mask",),
)
AURAFLOW = Outline(
    "AuraFlowPipeline",
    "AuraFlowTransformer2DModel",
    {"pos_embed_max_size": 9216},
    (4, 128, 128),
    {"encoder_hidden_states": (256, 2048)},
    ("FlowMatchEulerDiscreteScheduler", {"shift": 1.73}),
    1_310_000_000,
)
KREA2 = Outline(
    "Krea2Pipeline",
    "Krea2Transformer2DModel",
    {},
    (16, 128, 128),
    {"encoder_hidden_states": (512, 12, 2560), "encoder_attention_mask": (512,)},
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    4_570_000_000,
    integers=("encoder_attention_mask",),
)
SANA_1600M = Outline(
    "SanaPipeline",
    "SanaTransformer2DModel",
    {"sample_size": 32},
    (32, 32, 32),
    {"text": (300, 2304), "mask": (300,)},
    ("DPMSolverMultistepScheduler", {
        "use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction",
    }),
    2_930_000_000,
    factor=32,
    integers=("mask",),
)  # fmt: skip
PIXART_SIGMA = Outline(
    "PixArtSigmaPipeline",
    "PixArtTransformer2DModel",
    {"sample_size": 128, "use_additional_conditions": False, "caption_channels": 4096},
    (4, 128, 128),
    {"text": (300, 4096), "mask": (300,)},
    ("DPMSolverMultistepScheduler", {"beta_start": 0.0001, "beta_end": 0.02}),
    4_850_000_000,
    integers=("mask",),
)
EDM_IN64 = Outline(
    "ConsistencyModelPipeline",
    "UNet2DModel",
    adm.config({"img_resolution": 64, "img_channels": 3, "label_dim": 1000}) or {},
    (3, 64, 64),
    {"class_labels": ()},
    (CM, {}),  # as its students read their time: to refit a layer for that takes values
    0,
    factor=1,
    classes=1000,
    integers=("class_labels",),
)
EDM_CIFAR = Outline(  # the DDPM++ network, of 56 million parameters
    "ConsistencyModelPipeline",
    "EDMModel",
    {
        "kind": "SongUNet",
        "arguments": {
            "img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_channels": 128,
            "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16],
        },
        "sample_size": 32,
        "in_channels": 3,
        "num_class_embeds": 10,
    },
    (3, 32, 32),
    {"class_labels": ()},
    (CM, {}),
    0,
    factor=1,
    classes=10,
    integers=("class_labels",),
)  # fmt: skip
EDM2_IN512_S = Outline(  # latents of Stable Diffusion's VAE
    "EDM2LatentsPipeline",
    "EDMModel",
    {
        "kind": "UNet",
        "arguments": {
            "img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": 192,
        },
        "sample_size": 64,
        "in_channels": 4,
        "num_class_embeds": 1000,
    },
    (4, 64, 64),
    {"class_labels": ()},
    (CM, {}),
    83_700_000,
    classes=1000,
    integers=("class_labels",),
)  # fmt: skip
SIT_XL = Outline(
    "DiTPipeline",
    "SiTModel",
    {},
    (4, 32, 32),
    {"class_labels": ()},
    ("FlowMatchEulerDiscreteScheduler", {}),
    83_700_000,
    classes=1000,
    integers=("class_labels",),
)
LIGHTNINGDIT_XL = Outline(
    "DiTPipeline",
    "LightningDiTModel",
    {},
    (32, 16, 16),
    {"class_labels": ()},
    ("FlowMatchEulerDiscreteScheduler", {"shift": LIGHTNING_SHIFT}),
    69_900_000,
    factor=16,
    classes=1000,
    integers=("class_labels",),
)
UVIT_H = Outline(
    "DiTPipeline",
    "UViTModel",
    {},
    (4, 32, 32),
    {"class_labels": ()},
    ("DDIMScheduler", betas(continuous=False)),
    83_700_000,
    classes=1000,
    integers=("class_labels",),
)

OUTLINES = {
    "SiT-XL-2-256x256.pt": SIT_XL,
    "lightningdit-xl-imagenet256-800ep.pt": LIGHTNINGDIT_XL,
    "imagenet256_uvit_huge.pth": UVIT_H,
    "edm-imagenet-64x64-cond-adm.pkl": EDM_IN64,
    "edm-cifar10-32x32-cond-vp.pkl": EDM_CIFAR,
    "edm2-img512-s-2147483-0.130.pkl": EDM2_IN512_S,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.2-dev": FLUX2_DEV,
    "black-forest-labs/FLUX.2-klein-base-4B": FLUX2_KLEIN_4B,
    "stable-diffusion-v1-5/stable-diffusion-inpainting": SD15_INPAINT,
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": SDXL_INPAINT,
    "black-forest-labs/FLUX.1-Kontext-dev": FLUX_KONTEXT,
    "Qwen/Qwen-Image": QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit": QWEN_IMAGE_EDIT,
    "lodestones/Chroma1-HD": CHROMA,
    "fal/AuraFlow-v0.3": AURAFLOW,
    "krea/Krea-2-Raw": KREA2,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": SANA_1600M,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": PIXART_SIGMA,
}
