"""Outlines of well-known checkpoints: their shapes, without a weight.

With them a run can be planned before anything is downloaded. The networks are the real classes with
the published configs, created without memory. Of conditions only the shapes are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teachers.catalogue.loading import families
from teachers.denoiser import Cond
from teachers.edm import adm
from teachers.errors import UserError, nearest, teacher_at
from teachers.families.unet import UNet
from teachers.imagenet.checkpoints import LIGHTNING_SHIFT, betas
from teachers.imagenet.model import MODELS
from teachers.quantised import DTYPES, FORMS, Precision, quantise
from teachers.storage.diffusers_config import CM, read
from teachers.teacher import Codec, Teacher

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
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.2-dev": FLUX2_DEV,
    "black-forest-labs/FLUX.2-klein-base-4B": FLUX2_KLEIN_4B,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": SANA_1600M,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": PIXART_SIGMA,
}


class OutlineCodec(Codec):
    """A codec whose conditions and data have the right shapes and no content."""

    def __init__(self, outline: Outline, size: tuple[int, int]) -> None:
        self.outline, self.size, self.classes = outline, size, outline.classes

    @property
    def null(self) -> Cond:
        return self.condition([""])

    def condition(self, prompts: Sequence[Any]) -> Cond:
        """Placeholder conditions, each entry (N, ...)."""
        return {
            k: torch.ones(
                len(prompts),
                *shape,
                dtype=torch.long if k in self.outline.integers else torch.float32,
            )
            for k, shape in self.outline.cond.items()
        }

    def encode(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), *self.outline.shape)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.new_zeros(len(latents), 3, *self.size)


def outline(
    source: str,
    without: AbstractContextManager[Any],
    size: int | None = None,
    precision: Precision = "fp32",
) -> Teacher:
    """A known checkpoint's teacher, whose network has shapes and no values.

    Args:
        without: The context that creates networks without memory: a FakeTensorMode, or the meta
            device.

    Raises:
        UserError: it is not among OUTLINES.
    """
    if source not in OUTLINES:
        raise UserError(
            f"{teacher_at(source)}: not on this machine, and no known outline; download it first, "
            f"or name a known one: {nearest(source, OUTLINES)}"
        )
    return outlined(OUTLINES[source], source, without, size, precision)


def outlined(
    known: Outline,
    source: str,
    without: AbstractContextManager[Any],
    size: int | None = None,
    precision: Precision = "fp32",
) -> Teacher:
    """The teacher of an outline; arguments as for `outline`."""
    import diffusers

    # the loader of UNets is a function of its own, which does not name the class
    special = UNet if known.pipeline in UNet.PIPELINES else None
    kind, made = MODELS.get(known.network, (special, None))
    kind = kind or families()[known.pipeline].args[0]
    shape = known.shape
    if size is not None:
        shape = (shape[0], size // known.factor, size // known.factor)
    name, config = known.scheduler
    config = kind.configured(config, shape, None)
    schedule = read(name, config, teacher_at(source), kind.tokens(shape))
    with without, dtype_of_new(DTYPES[precision]):
        backbone = (made or getattr(diffusers, known.network)).from_config(known.config)
        if precision in FORMS:
            quantise(backbone, precision)
    network = kind(backbone, schedule, known.factor)
    pixels = (shape[-2] * known.factor, shape[-1] * known.factor)
    network.eval().requires_grad_(False)
    return Teacher(network, OutlineCodec(known, pixels), shape, source)


@contextmanager
def dtype_of_new(dtype: torch.dtype) -> Iterator[None]:
    """Create networks in this type within the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
