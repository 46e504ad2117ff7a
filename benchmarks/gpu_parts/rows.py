"""The rows of `gpu.py`: shipped recipes on networks with the published shapes and random weights.

Depth is cut in some of them, widths never. The recipes are the shipped ones; what a row changes in
them is written beside it. With `small`, the same families and recipes run at widths for a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from distill.config.recipe import Recipe
from distill.data.stream import Source
from teachers.catalogue import outlines, published
from teachers.catalogue.outlines import OutlineCodec, dtype_of_new
from teachers.catalogue.published import Outline
from teachers.denoiser import Cond
from teachers.edm import adm
from teachers.edm.checkpoints import model_config
from teachers.edm.model import EDM, EDMModel
from teachers.process import Karras
from teachers.quantised import DTYPES
from teachers.storage.diffusers_config import CM, log_sigma, read
from teachers.teacher import Teacher

# The DDPM++ network of edm-cifar10-32x32-cond-vp.pkl, 56 million parameters.
CIFAR = {
    "img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_channels": 128,
    "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16],
}  # fmt: skip
EDM_CIFAR = Outline(
    "ConsistencyModelPipeline",
    "EDMModel",
    model_config("SongUNet", CIFAR),
    (3, 32, 32),
    {"class_labels": ()},
    ("EDMEulerScheduler", {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}),
    0,
    factor=1,
    classes=10,
    integers=("class_labels",),
)
SMALL_CIFAR = model_config(
    "SongUNet", {**CIFAR, "img_resolution": 8, "model_channels": 16, "num_blocks": 1}
)
SMALL_ADM = adm.config(
    {"img_resolution": 16, "img_channels": 3, "label_dim": 10, "model_channels": 128,
     "channel_mult": [1, 1], "channel_mult_emb": 1, "num_blocks": 1, "attn_resolutions": [8]}
)  # fmt: skip
SMALL_EDM2 = model_config(
    "UNet",
    {"img_resolution": 8, "img_channels": 4, "label_dim": 10, "model_channels": 16,
     "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8},
)  # fmt: skip
UNET_SMALL = {
    "sample_size": 8, "norm_num_groups": 8, "attention_head_dim": 2, "layers_per_block": 1,
}  # fmt: skip
HEADS_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class Row:
    """One measured recipe.

    Args:
        outline: The network's published shape.
        recipe: The name of a shipped recipe.
        keys: Keys of the recipe that the row changes.
        depth: Entries of the network's config that cut its depth.
        small: Entries of its config on a CPU, with `small_shape` and `small_cond` for its data.
        compares: Whether its losses are also computed in float32 and float16.
    """

    name: str
    family: str
    outline: Outline
    recipe: str
    keys: Sequence[str] = ()
    depth: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    small_shape: tuple[int, ...] = ()
    small_cond: dict[str, tuple[int, ...]] = field(default_factory=dict)
    compares: bool = False

    def of(self, small: bool) -> Outline:
        """The outline that is run."""
        config = {**self.outline.config, **(self.small if small else self.depth)}
        if not small:
            return dataclasses.replace(self.outline, config=config)
        shapes = {"shape": self.small_shape, "cond": self.small_cond or self.outline.cond}
        classes = {"classes": min(self.outline.classes, 10)}
        return dataclasses.replace(self.outline, config=config, **shapes, **classes)

    def settings(self, small: bool, extra: Sequence[str] = ()) -> Recipe:
        """The recipe that is run.

        Args:
            extra: More keys, as "train.compile=blocks".
        """
        keys = ["train.steps=1000000", "train.sample_every=0", *self.keys]
        if small:
            keys += ["train.batch=2", "train.accumulate=1", "train.precision=fp32"]
            if "lora" in self.recipe:
                keys += ["adapters.rank=4"]
            if self.name.startswith("sdxl"):
                keys += ["train.batch=4", "train.accumulate=2"]
        return Recipe.load(self.recipe, [*keys, *extra])


SHARED = ("train.batch=128", "train.accumulate=1", "objective.student_every=5")
CIFAR_SHAPE: dict[str, Any] = {"small": SMALL_CIFAR, "small_shape": (3, 8, 8)}
SDXL_SMALL: dict[str, Any] = {
    "small": {
        **UNET_SMALL, "block_out_channels": [16, 32], "cross_attention_dim": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2], "attention_head_dim": [2, 2],
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
    },
    "small_shape": (4, 8, 8), "small_cond": {"text": (7, 16), "pooled": (16,)},
}  # fmt: skip
SD15_SMALL: dict[str, Any] = {
    "small": {
        **UNET_SMALL, "block_out_channels": [16, 16], "cross_attention_dim": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "small_shape": (4, 8, 8), "small_cond": {"text": (7, 16)},
}  # fmt: skip
SANA_SMALL: dict[str, Any] = {
    "small": {
        **HEADS_SMALL, "num_layers": 2, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 32,
        "sample_size": 4,
    },
    "small_shape": (32, 4, 4), "small_cond": {"text": (7, 32), "mask": (7,)},
}  # fmt: skip
SIT_SMALL: dict[str, Any] = {
    "small": {"depth": 2, "width": 32, "heads": 2, "mlp_width": 64, "sample_size": 8},
    "small_shape": (4, 8, 8),
}
FEW = ("train.batch=16", "train.accumulate=2")
ROWS = (
    Row("sdxl-dmd2-lora", "sdxl", published.SDXL, "sdxl/dmd2-lora", **SDXL_SMALL),
    Row("edm-cifar-dmd2", "edm", EDM_CIFAR, "edm/dmd2", SHARED, compares=True, **CIFAR_SHAPE),
    Row(
        "sd15-dmd2", "sd15", published.SD15, "sd15/dmd2",
        ("train.batch=32", "train.accumulate=2", "objective.student_every=5",
         "players.student.optimizer=adamw", "players.fake.optimizer=adamw"),
        **SD15_SMALL,
    ),
    Row(
        "flux-dmd2-lora-nf4", "flux", published.FLUX_DEV, "flux/dmd2-lora",
        ("train.batch=4", "train.accumulate=4"),
        {"num_layers": 3, "num_single_layers": 6},
        {
            **HEADS_SMALL, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 32,
            "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
        },
        (16, 8, 8), {"text": (7, 32), "pooled": (16,), "guidance": ()},
    ),
    Row(
        "edm-imagenet64-dmd2", "adm", published.EDM_IN64, "edm/dmd2",
        ("train.batch=40", "train.accumulate=2"), small=SMALL_ADM or {}, small_shape=(3, 16, 16),
    ),
    Row(
        "sana-dmd2-lora", "sana", published.SANA_1600M, "sana/dmd2-lora",
        (), {"num_layers": 8}, **SANA_SMALL,
    ),
    Row("edm-cifar-ect", "edm", EDM_CIFAR, "edm/ect", SHARED[:2], **CIFAR_SHAPE),
    Row("edm-cifar-fdistill", "edm", EDM_CIFAR, "edm/fdistill", SHARED, **CIFAR_SHAPE),
    Row(
        "pixart-dmd2-lora", "pixart", published.PIXART_SIGMA, "pixart/dmd2-lora",
        ("train.batch=4", "train.accumulate=1"), {"num_layers": 8},
        {
            **HEADS_SMALL, "num_layers": 2, "cross_attention_dim": 32, "caption_channels": 32,
            "sample_size": 8,
        },
        (4, 8, 8), {"text": (7, 32), "mask": (7,)},
    ),
    Row(
        "sd3-dmd2-lora", "sd3", published.SD35_MEDIUM, "sd3/dmd2-lora",
        ("train.batch=4", "train.accumulate=1"),
        {"num_layers": 6, "dual_attention_layers": (0, 1, 2)},
        {
            **HEADS_SMALL, "num_layers": 2, "joint_attention_dim": 32,
            "caption_projection_dim": 32, "pooled_projection_dim": 16, "sample_size": 8,
            "pos_embed_max_size": 8, "dual_attention_layers": (0,),
        },
        (16, 8, 8), {"text": (7, 32), "pooled": (16,)},
    ),
    # The trajectory family, at the published depths.
    Row("sdxl-lcm-lora", "sdxl", published.SDXL, "sdxl/lcm-lora",
        ("train.batch=4", "train.accumulate=4"), **SDXL_SMALL),
    Row("sd15-lcm-lora", "sd15", published.SD15, "sd15/lcm-lora",
        ("train.batch=16", "train.accumulate=4"), **SD15_SMALL),
    Row("sana-scm-lora", "sana", published.SANA_1600M, "sana/scm", (), **SANA_SMALL),
    Row("edm-cifar-ict", "edm", EDM_CIFAR, "edm/ict", SHARED[:2], **CIFAR_SHAPE),
    Row("edm-cifar-ctm", "edm", EDM_CIFAR, "edm/ctm",
        ("train.batch=128", "train.accumulate=2", "objective.gan_start=0"), **CIFAR_SHAPE),
    Row("edm2-scm", "edm", published.EDM2_IN512_S, "edm2/scm",
        ("train.batch=16", "train.accumulate=2"), small=SMALL_EDM2, small_shape=(4, 8, 8)),
    Row("sit-meanflow", "sit", published.SIT_XL, "sit/meanflow", FEW, **SIT_SMALL),
    Row("sit-ect", "sit", published.SIT_XL, "sit/ect", FEW, **SIT_SMALL),
)  # fmt: skip


class RandomCodec(OutlineCodec):
    """A codec whose conditions are random numbers of the right shapes."""

    def condition(self, prompts: Sequence[Any]) -> Cond:
        rng, n = torch.Generator().manual_seed(0), len(prompts)
        cond = {}
        for key, shape in self.outline.cond.items():
            if key == "class_labels":
                cond[key] = torch.arange(n) % self.classes
            elif key in self.outline.integers:
                cond[key] = torch.ones(n, *shape, dtype=torch.long)
            elif key == "guidance":
                cond[key] = torch.full((n, *shape), 3.5)
            else:
                cond[key] = torch.randn(n, *shape, generator=rng)
        return cond


def teacher_of(row: Row, recipe: Recipe, small: bool, without: Any) -> Teacher:
    """A teacher with random weights, in the precision that the recipe asks for.

    Args:
        without: A device, or a FakeTensorMode, in which the weights are made.
    """
    known, source = row.of(small), recipe.teacher.source
    precision = recipe.teacher.precision or "fp32"
    fake = not isinstance(without, torch.device)
    if known.network == "EDMModel":
        teacher = edm_teacher(known, source, without, fake)
    else:
        teacher = outlines.outlined(known, source, without, None, precision)
    if not fake:
        teacher.denoiser.to(without)  # filters and tables that are made on the host
        assert isinstance(teacher.codec, OutlineCodec)
        teacher.codec = RandomCodec(known, teacher.codec.size)
    return teacher


def edm_teacher(
    known: Outline, source: str, without: AbstractContextManager[Any], fake: bool
) -> Teacher:
    """One of EDM's networks that is no UNet2DModel, as its checkpoint is read: in float32."""
    schedule = read(*known.scheduler, source)
    assert isinstance(schedule.process, Karras)
    schedule = dataclasses.replace(schedule, time=log_sigma(schedule.process, 250.0))
    if fake:  # its students refit their time, which takes values
        schedule = dataclasses.replace(schedule, name=CM)
    with without, dtype_of_new(DTYPES["fp32"]):
        backbone = EDMModel.from_config(known.config)
    assert isinstance(backbone, EDMModel)
    network = EDM(backbone, schedule).eval().requires_grad_(False)
    size = (known.shape[-2], known.shape[-1])
    return Teacher(network, OutlineCodec(known, size), known.shape, source)


def source_of(recipe: Recipe, teacher: Teacher, small: bool) -> Source:
    """Random data, where the objective needs them, and random conditions."""
    pixels = teacher.shape[0] == 3
    n = 8 if small else 1024 if pixels else 16
    x = None
    if recipe.needs_data:
        x = torch.randn(n, *teacher.shape, generator=torch.Generator().manual_seed(1))
    return Source(teacher.shape, x, teacher.codec.condition([0] * n), recipe.train.seed, n)
