"""SiT, LightningDiT and U-ViT from their published files, and from folders of their students.

The networks' sizes are read from the weights' shapes. What the weights do not show:

| | SiT | LightningDiT | U-ViT |
|---|---|---|---|
| code's licence | MIT | MIT | MIT |
| process | linear or `interpolant: gvp` | linear | Stable Diffusion's betas, or a VP-SDE |
| shift of noise levels | 1 | 1 / 0.3, its sampler's | |
| heads | of 64 channels; 72 if the width is 1152 | as its rotary table | as SiT |

A U-ViT that ends in a convolution was trained with the VP-SDE, one that does not with the betas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.edm.checkpoints import fill
from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.families.base import Prompted, quiet
from teachers.imagenet import vae as autoencoders
from teachers.imagenet.files import open_file, pick, settings
from teachers.imagenet.model import MODELS
from teachers.imagenet.names import ROPE, SIT, UVIT, Names, ours, without_variance
from teachers.imagenet.schedule import FlowEuler
from teachers.quantised import DTYPES, FORMS, Precision, quantise
from teachers.storage import components
from teachers.storage.diffusers_config import Schedule, read
from teachers.storage.files import read_json
from teachers.teacher import Teacher

FLOW = "FlowMatchEulerDiscreteScheduler"
LIGHTNING_SHIFT = 1 / 0.3  # of its sampler's timestep_shift, whose time runs from noise to data
INTERPOLANTS = ("linear", "gvp")
NAMES: dict[str, Names] = {"SiTModel": SIT, "LightningDiTModel": SIT, "UViTModel": UVIT}


def kind_of(names: Any) -> str | None:
    """The network whose published names these are, by our class; None for others."""
    if "in_blocks.0.attn.qkv.weight" in names and "decoder_pred.weight" in names:
        return "UViTModel"
    if "x_embedder.proj.weight" not in names or "y_embedder.embedding_table.weight" not in names:
        return None
    marks = ("feat_rope.freqs_cos", "blocks.0.mlp.w12.weight", "blocks.0.norm1.weight",
             "blocks.0.attn.q_norm.weight")  # fmt: skip
    return "LightningDiTModel" if any(k in names for k in marks) else "SiTModel"


def load(
    path: Path,
    source: str,
    vae: str | None = None,
    precision: Precision = "fp32",
    shift: float | None = None,
    interpolant: str | None = None,
    heads: int | None = None,
) -> Teacher:
    """Load a published file as a teacher.

    Args:
        vae: The autoencoder of its latents: a Hub id, a diffusers folder, or VA-VAE's file.
        shift: Of the noise levels of rectified flow; by default that of the published sampler.
        interpolant: SiT's path, linear or gvp; by default as its file says, or linear.
        heads: Attention heads, where the network is of other sizes than the published ones.

    Raises:
        UserError: a file is missing or damaged, or an option does not fit the network.
    """
    who = teacher_at(source)
    content = open_file(path, who)
    weights = pick(content, who)
    kind = kind_of(weights)
    if kind is None:
        raise UserError(f"{who}: {unknown(weights)}")
    if kind == "SiTModel" and re.match(r"dit[-_]", path.name, re.IGNORECASE):
        raise UserError(
            f"{who}: a DiT's file has the names of a SiT's and cannot be told from it; give DiT "
            "as a diffusers folder (facebook/DiT-XL-2-256), or rename the file if it is a SiT"
        )
    config = config_of(kind, weights, heads, who)
    if kind == "SiTModel":
        config["interpolant"] = path_of(content, interpolant, who)
    elif interpolant is not None:
        raise UserError(f"{who}: interpolant: only a SiT has several; remove it")
    schedule = schedule_of(kind, config, shift, who)
    weights = ours(weights, NAMES[kind])
    channels = config["in_channels"]
    drop_variance(weights, config, who)
    _, model = MODELS[kind]
    with torch.device("meta"):
        network = model(**config)
    fill(network, weights, who)
    if vae is None:
        known = "VA-VAE's file" if kind == "LightningDiTModel" else "stabilityai/sd-vae-ft-ema"
        raise UserError(f"{who}: vae is missing, and the network is of latents; give {known}")
    return assembled(network, autoencoders.load(vae, channels, who), schedule, source, precision)


def drop_variance(weights: dict[str, Tensor], config: dict[str, Any], who: str) -> None:
    """Take a learned variance out of the weights of the last layer, in place.

    Raises:
        UserError: the last layer is missing, or is of no such shape.
    """
    channels, last = config["in_channels"], ("out.weight", "out.bias")
    try:
        if len(weights["out.bias"]) == 2 * channels * config["patch_size"] ** 2:
            weights |= {k: without_variance(weights[k], channels) for k in last}
    except KeyError as error:
        raise UserError(f"{who}: the weights lack {error}; copy the file again") from None
    except (RuntimeError, TypeError):
        raise UserError(f"{who}: the last layer has no shape of such a network; copy the file "
                        "again") from None  # fmt: skip


def load_folder(folder: Path, source: str, precision: Precision = "fp32") -> Teacher:
    """Load the folder of a student as a teacher, with our code and not the folder's.

    Raises:
        UserError: a file is missing or damaged.
    """
    who = teacher_at(source)
    config = read_json(folder / "transformer" / "config.json", who)
    _, model = MODELS[str(config["_class_name"])]
    network = components.module(
        model, folder / "transformer", who, "transformer", low_cpu_mem_usage=False
    )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", who)
    scheduler = {k: v for k, v in scheduler.items() if not k.startswith("_diffusers")}
    name = str(scheduler.pop("_class_name", ""))
    schedule = read(FLOW if name == FlowEuler.__name__ else name, scheduler, who)
    from diffusers import AutoencoderKL

    vae = components.module(AutoencoderKL, folder / "vae", who, "vae", low_cpu_mem_usage=False)
    teacher = assembled(network.eval(), vae.eval(), schedule, source, precision)
    teacher.codec.folder = folder
    return teacher


def is_folder(folder: Path, index: Mapping[str, Any]) -> bool:
    """Whether a pipeline folder holds one of these networks."""
    entry = index.get("transformer")
    return isinstance(entry, list) and len(entry) == 2 and entry[1] in MODELS


def assembled(
    network: Any, vae: Any, schedule: Schedule, source: str, precision: Precision
) -> Teacher:
    """The teacher of a network, its autoencoder and its schedule."""
    import diffusers

    who = teacher_at(source)
    if precision not in DTYPES:
        raise UserError(f"{who}: precision {precision!r}: {nearest(precision, DTYPES)}")
    with quiet():
        network = network.to(DTYPES[precision])
    if precision in FORMS:
        quantise(network, precision)
    kind, _ = MODELS[type(network).__name__]
    name = schedule.name if schedule.name != FLOW else FlowEuler.__name__
    made: Any = FlowEuler if name == FlowEuler.__name__ else getattr(diffusers, name)
    scheduler = made.from_config(schedule.config)
    pipe = diffusers.DiTPipeline(transformer=network, vae=vae, scheduler=scheduler)
    denoiser = kind(network, schedule, kind.factor(pipe))
    shape, classes = kind.shape(pipe, None), network.config["num_classes"]
    codec = Prompted(pipe, kind, kind.pixels(pipe, shape), classes, classes)
    return Teacher(denoiser, codec, shape, source)


def path_of(content: dict[str, Any], asked: str | None, who: str) -> str:
    """SiT's path: what is asked for, what the file's training options say, or linear."""
    options = settings(content)
    if (predicts := options.get("prediction", "velocity")) != "velocity":
        raise UserError(
            f"{who}: this SiT predicts {clipped(predicts)}; only those of velocity are supported"
        )
    path = (asked or str(options.get("path_type", "linear"))).lower()
    if path not in INTERPOLANTS:
        raise UserError(f"{who}: interpolant {path!r}: {nearest(path, INTERPOLANTS)}")
    return path


def schedule_of(kind: str, config: dict[str, Any], shift: float | None, who: str) -> Schedule:
    """The process of a network, as the stock scheduler with the same noise levels."""
    if kind != "UViTModel":
        usual = LIGHTNING_SHIFT if kind == "LightningDiTModel" else 1.0
        return read(FLOW, {"shift": usual if shift is None else shift}, who)
    if shift is not None:
        raise UserError(f"{who}: shift: a U-ViT is no rectified flow; remove it")
    return read("DDIMScheduler", betas(config["final_conv"]), who)


def betas(continuous: bool) -> dict[str, Any]:
    """The noise levels of a U-ViT, as the config of a scheduler of 1000 indices.

    Index i is the network's step i + 1. Networks of a VP-SDE (arXiv:2011.13456) were trained at all
    t in [0, 1], read 999 t, and have ᾱ(t) = exp(-0.1 t - 9.95 t²); index i is t = (i + 1)/1000.
    """
    if not continuous:
        return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    t = torch.arange(1001, dtype=torch.float64) / 1000
    bar = torch.exp(-0.1 * t - 9.95 * t**2)
    return {"trained_betas": (1 - bar[1:] / bar[:-1]).tolist()}


def config_of(kind: str, weights: dict[str, Tensor], heads: int | None, who: str) -> dict[str, Any]:
    """The config of a network, from the shapes of its published weights.

    Raises:
        UserError: a weight is missing, or has a shape that no such network has.
    """
    try:
        return sizes(kind, weights, heads, who)
    except KeyError as error:
        raise UserError(f"{who}: the weights lack {error}; copy the file again") from None
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{who}: the weights have no shapes of such a network ({clipped(error)}); copy the "
            "file again"
        ) from None


def sizes(kind: str, weights: dict[str, Tensor], heads: int | None, who: str) -> dict[str, Any]:
    """The config of a network; KeyError or ValueError where the weights are not whole."""
    flat = kind == "UViTModel"
    patches = weights["patch_embed.proj.weight" if flat else "x_embedder.proj.weight"]
    width, channels, patch, _ = patches.shape
    labels = weights["label_emb.weight" if flat else "y_embedder.embedding_table.weight"]
    tokens = weights["pos_embed"].shape[1] - (2 if flat else 0)
    side = math.isqrt(tokens)
    if side**2 != tokens or len(labels) < 2:
        raise ValueError(f"{tokens} positions, {len(labels)} labels")
    blocks = "in_blocks" if flat else "blocks"
    depth = len({k.split(".")[1] for k in weights if re.match(rf"{blocks}\.\d+\.", k)})
    first = f"{blocks}.0."
    turn = weights.get(ROPE[0])
    if heads is None:
        each = 72 if width == 1152 else 64
        heads = width // (each if turn is None else turn.shape[-1])
    if heads < 1 or width % heads:
        raise UserError(f"{who}: heads: {heads} do not divide {width} channels; give heads")
    gated = f"{first}mlp.w3.weight" in weights
    hidden = weights[f"{first}mlp.w3.weight"].T if gated else weights[f"{first}mlp.fc1.weight"]
    config: dict[str, Any] = {
        "sample_size": side * patch, "patch_size": patch, "in_channels": channels,
        "out_channels": channels, "width": width, "depth": depth, "heads": heads,
        "mlp_width": len(hidden), "num_classes": len(labels) - 1,
    }  # fmt: skip
    if kind == "LightningDiTModel":
        config |= {
            "rope": turn is not None,
            "gated": gated,
            "rms": f"{first}norm1.weight" in weights,
            "qk_norm": f"{first}attn.q_norm.weight" in weights,
            "shifts": len(weights[f"{first}adaLN_modulation.1.bias"]) == 6 * width,
        }
    return config | uvit_sizes(config, weights, who) if flat else config


def uvit_sizes(config: dict[str, Any], weights: dict[str, Tensor], who: str) -> dict[str, Any]:
    """The part of a config that only U-ViT has."""
    if config["in_channels"] == 3:
        raise UserError(
            f"{who}: this U-ViT is of pixels, which is not supported; give one of latents "
            "(ImageNet 256 or 512)"
        )
    conv = "final_layer.weight" in weights
    return {
        "depth": 2 * config["depth"] + 1,
        "time_mlp": "time_embed.0.weight" in weights,
        "qkv_bias": "in_blocks.0.attn.qkv.bias" in weights,
        "final_conv": conv,
        "time_scale": 0.999 if conv else 1.0,
    }


def unknown(weights: dict[str, Tensor]) -> str:
    """What is wrong with weights of unknown names."""
    first = clipped(next(iter(weights)))
    if "label_emb.weight" not in weights and "decoder_pred.weight" in weights:
        return "a U-ViT without class labels is not supported; give one of ImageNet"
    return f"its weights ({first}, …) are not SiT's, LightningDiT's or U-ViT's; give one of these"
