"""The autoencoders of latent diffusion's own files: Stable Diffusion's, and VA-VAE.

VA-VAE (arXiv:2501.01423) has attention in the blocks of its lowest resolution. Each of its channels
is shifted and scaled by statistics of its latents, which are in a file of their own. Both become a
diffusers AutoencoderKL, with the statistics inside its convolutions before and after the latents,
so that stock pipelines decode them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.edm import checkpoints as edm
from teachers.errors import UserError
from teachers.imagenet.files import open_file, pick
from teachers.storage.files import home

FILES = {".pt", ".pth", ".ckpt", ".safetensors"}
STATISTICS = "latents_stats.pt"
SD_SCALE = 0.18215  # of Stable Diffusion's four channels
# The parts of an encoder's or decoder's names, as latent diffusion and diffusers have them.
PARTS = [
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"^down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"^up\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def load(source: str, channels: int, who: str) -> Any:
    """The autoencoder at a Hub id, in a diffusers folder, or in a file of latent diffusion's.

    Args:
        channels: Of the network's latents.

    Raises:
        UserError: it is missing or damaged, or has other latents.
    """
    path, who = home(source, f"{who}: vae"), f"{who}: vae"
    if path.suffix in FILES and not path.is_dir():
        return of_file(path, channels, who)
    who = who.removesuffix(": vae")
    return edm.autoencoder(edm.vae_folder(source, who), channels, who)


def of_file(path: Path, channels: int, who: str) -> Any:
    """The autoencoder in a file, with the statistics of the file `latents_stats.pt` beside it."""
    from diffusers import AutoencoderKL

    content = open_file(path, who)
    weights = pick(content.get("state_dict", content), who)
    kept = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    weights = {k: v for k, v in weights.items() if k.startswith(kept)}
    config = config_of(weights, who)
    if config["latent_channels"] != channels:
        raise UserError(
            f"{who}: {path} has {config['latent_channels']} latent channels; the network has "
            f"{channels}"
        )
    statistics = path.with_name(STATISTICS)
    if statistics.is_file():
        weights |= normalised(weights, *moments(statistics, channels, who))
        config["scaling_factor"] = 1.0
    elif channels != 4:
        raise UserError(
            f"{who}: {statistics} is missing, which holds the mean and deviation of its latents; "
            "put it beside the weights"
        )
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**config)
    levels = len(config["block_out_channels"])
    edm.fill(vae, {renamed(k, levels): flat(k, v) for k, v in weights.items()}, who)
    return vae.eval().requires_grad_(False)


def config_of(weights: dict[str, Tensor], who: str) -> dict[str, Any]:
    """The AutoencoderKL config of weights with latent diffusion's names."""
    try:
        levels = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("encoder.down."))
        widths = [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        channels = weights["post_quant_conv.weight"].shape[1]
        images = weights["encoder.conv_in.weight"].shape[1]
        first = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
        layers = sum(1 for k in weights if first.fullmatch(k))
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{who}: its names are not those of latent diffusion's autoencoder; give another file, "
            "or a diffusers folder"
        ) from None
    sides = {"down": "Down", "up": "Up"}
    attends = {
        s: [f"{p}.{s}.{i}.attn.0.q.weight" in weights for i in range(levels)]
        for s, p in (("down", "encoder"), ("up", "decoder"))
    }
    kinds = {s: [("Attn" if a else "") + sides[s] for a in attends[s]] for s in sides}
    return {
        "in_channels": images,
        "out_channels": images,
        "latent_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "norm_num_groups": min(32, widths[0]),
        "down_block_types": [f"{k}EncoderBlock2D" for k in kinds["down"]],
        "up_block_types": [f"{k}DecoderBlock2D" for k in reversed(kinds["up"])],
        "scaling_factor": SD_SCALE,
        "sample_size": 256,
    }


def renamed(name: str, levels: int) -> str:
    """Diffusers' name of a weight; its decoder counts resolutions from the lowest."""
    side, dot, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    for pattern, to in PARTS:
        rest = re.sub(pattern, to, rest)
    if match := re.match(r"up_blocks\.(\d+)\.", rest):
        rest = f"up_blocks.{levels - 1 - int(match[1])}.{rest[match.end() :]}"
    return side + dot + rest


def flat(name: str, weight: Tensor) -> Tensor:
    """An attention's 1×1 convolution as a linear layer; other weights as they are."""
    attends = re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name)
    return weight.flatten(1) if attends else weight


def moments(path: Path, channels: int, who: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel's latents, (C,) in float64."""
    content = open_file(path, who)
    rows = [content.get(k) for k in ("mean", "std")]
    if any(not isinstance(r, Tensor) or r.numel() != channels for r in rows):
        raise UserError(f"{who}: {path} lacks mean and std of {channels} channels; copy it again")
    mean, std = (r.flatten().double() for r in rows)  # pyright: ignore
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"{who}: {path} holds a deviation that is not positive; copy it again")
    return mean, std


def normalised(weights: dict[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The convolutions around the latents, which now are (z - mean) / std."""
    before, bias = (weights[f"quant_conv.{k}"].double() for k in ("weight", "bias"))
    after, last = (weights[f"post_quant_conv.{k}"].double() for k in ("weight", "bias"))
    n, view = len(mean), (-1, 1, 1, 1)
    changed = {
        "quant_conv.weight": torch.cat([before[:n] / std.view(view), before[n:]]),
        "quant_conv.bias": torch.cat([(bias[:n] - mean) / std, bias[n:] - 2 * std.log()]),
        "post_quant_conv.weight": after * std.view(1, -1, 1, 1),
        "post_quant_conv.bias": last + after.flatten(1) @ mean,
    }
    return {k: v.float() for k, v in changed.items()}
