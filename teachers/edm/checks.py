"""Check the config of an EDM or EDM2 network before it is built."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from teachers.edm import edm2, networks
from teachers.errors import UserError, nearest

NETWORKS: dict[str, dict[str, type[nn.Module]]] = {
    "EDMPrecond": {"SongUNet": networks.SongUNet, "DhariwalUNet": networks.DhariwalUNet},
    "EDM2Precond": {"UNet": edm2.UNet},
}


def check(config: dict[str, Any], who: str) -> None:
    """Refuse a config from which no network can be built."""
    networks = NETWORKS[config["_class_name"]]
    name, arguments = config.get("network"), config.get("arguments")
    if not isinstance(name, str) or name not in networks:
        raise UserError(f"{who}: network {name!r}: {nearest(str(name), networks)}")
    if not isinstance(arguments, dict):
        raise UserError(f"{who}: arguments: expected a mapping")
    known = inspect.signature(networks[name]).parameters
    for key, value in arguments.items():
        if key not in known:
            raise UserError(f"{who}: argument {key!r} of {name}: {nearest(key, known)}")
        if not fits(key, value):
            raise UserError(
                f"{who}: argument {key!r} of {name} cannot be {str(value)[:60]!r}; "
                "see to config.json"
            )
    for key in ("img_resolution", "img_channels"):
        if key not in arguments:
            raise UserError(f"{who}: argument {key!r} of {name} is missing; see to config.json")
    halvings = len(arguments.get("channel_mult", known["channel_mult"].default)) - 1
    if arguments["img_resolution"] % 2**halvings:
        raise UserError(
            f"{who}: img_resolution {arguments['img_resolution']} cannot be halved {halvings} "
            "times; see to config.json"
        )
    if not number(config.get("sigma_data"), 1e-6, 1e6):
        raise UserError(f"{who}: sigma_data is {config.get('sigma_data')!r}; expected a number")
    if latents := config.get("latents"):
        check_latents(latents, arguments["img_channels"], who)


def check_latents(latents: Any, channels: int, who: str) -> None:
    """Refuse statistics of latents that are not a scale and a bias for each channel."""
    for key in ("scale", "bias"):
        row = latents.get(key) if isinstance(latents, dict) else None
        if not isinstance(row, list) or len(row) != channels:
            raise UserError(f"{who}: latents.{key}: expected a number for each channel")
        if not all(number(v, -1e6, 1e6) and (v or key == "bias") for v in row):
            raise UserError(f"{who}: latents.{key}: expected a number for each channel")


CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
LISTS = {"channel_mult": 64, "attn_resolutions": 2**16, "resample_filter": 1e6}
SHARES = ("dropout", "label_balance", "concat_balance", "res_balance", "attn_balance")


def fits(key: str, value: Any) -> bool:
    """Whether a network can be built with this value of an argument."""
    if key in CHOICES:
        return value in CHOICES[key]
    if key in LISTS:
        low = 0 if key == "resample_filter" else 1
        if not isinstance(value, list) or len(value) > 16:
            return False
        whole = key == "resample_filter" or all(type(v) is int for v in value)
        if key == "resample_filter" and (len(value) % 2 or not any(value)):
            return False
        good = whole and all(number(v, low, LISTS[key]) for v in value)
        return good and (bool(value) or key == "attn_resolutions")
    if key in SHARES:
        return number(value, 0, 1)
    if key == "clip_act":
        return value is None or number(value, 0, 1e9)
    if value is None:
        return key in ("channel_mult_noise", "channel_mult_emb")
    most = 64 if key == "num_blocks" else 2**16
    return type(value) is int and (0 if key == "label_dim" else 1) <= value <= most


def number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high
