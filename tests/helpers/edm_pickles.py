"""Pickles in the format of published EDM networks, and their weights by a formula.

A published file holds every object as `_reconstruct_persistent_obj(meta)`, with the source of its
module in `meta`; here that source would write a file if anyone executed it.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import types
import zlib
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "edm" / "golden.safetensors"
CASES = ("ddpmpp", "ddpmpp-labels", "ncsnpp", "skip", "adm", "edm2", "edm2-pixels")


def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Each case's class, arguments and tensor shapes, and what the published code made of them."""
    with safe_open(GOLDEN, "pt") as file:
        cases = {k: json.loads(v) for k, v in file.metadata().items()}
    return cases, load_file(GOLDEN)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name, float32, from its name and shape alone."""
    seed = zlib.crc32(name.encode()) % 10007
    u = np.sin(np.arange(math.prod(shape), dtype=np.float64) * 12.9898 + seed) * 43758.5453
    u = 2 * (u - np.floor(u)) - 1
    if len(shape) > 1:
        u = u * math.sqrt(3 / math.prod(shape[1:]))
    elif name.endswith(("weight", "gain")):
        u = 1 + 0.3 * u
    else:
        u = u * {"freqs": 8, "phases": 3}.get(name.rpartition(".")[2], 0.3)
    return torch.from_numpy(u.reshape(shape)).float()


def inputs(channels: int, size: int) -> tuple[Tensor, Tensor]:
    """x_t (3, C, H, W) and σ (3,) of the golden runs; labels were the last, 0 and none."""
    sigma = torch.tensor([0.01, 1.0, 40.0])
    x = weight("x", (3, channels, size, size))
    return x * (0.25 + sigma**2).sqrt().view(3, 1, 1, 1) / x.std(), sigma


def _reconstruct_persistent_obj(meta):  # only its name is pickled
    raise AssertionError("executed")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class EasyDict(dict):
    """What EDM2 keeps its pickles' entries in."""


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


class Persistent:
    """An object that pickles as a persistent one of class `kind`, with the source of its module."""

    def __init__(self, kind: str, state: dict[str, Any], source: str = "raise SystemExit") -> None:
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": kind}
        self.meta["state"] = state

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,), None


@contextmanager
def foreign():
    """While the modules exist that the pickler looks its globals up in."""
    names = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def save_vae(folder: Path, channels: int = 4) -> Path:
    """A small AutoencoderKL of two pixels to a latent, of random weights, with pixels in [0, 1]."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),  # pyright: ignore
        norm_num_groups=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore
    )
    last: Any = vae.decoder.conv_out
    last.weight.data *= 0.2
    last.bias.data.fill_(0.5)
    vae.save_pretrained(folder)
    return folder


def dump(content: Any, path: Path, protocol: int = 4) -> Path:
    with foreign():
        path.write_bytes(pickle.dumps(content, protocol))
    return path


def state(tensors: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """A module's state, with its submodules nested as the dots in the names say."""
    own = {k: v for k, v in tensors.items() if "." not in k}
    kinds = ("freqs", "phases", "resample_filter")
    children: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            children.setdefault(first, {})[rest] = tensor
    modules = OrderedDict((k, module(k, v)) for k, v in children.items())
    parameters = {k: nn.Parameter(v, False) for k, v in own.items() if k not in kinds}
    return {
        "training": False,
        "_parameters": OrderedDict(parameters | {"absent": None}),
        "_buffers": OrderedDict((k, v) for k, v in own.items() if k in kinds),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": modules,
        "skip_scale": np.sqrt(0.5),
        **more,
    }


def module(name: str, tensors: dict[str, Tensor]) -> Any:
    if name not in ("enc", "dec"):
        return Persistent("UNetBlock", state(tensors))
    made = nn.ModuleDict()
    made.__dict__["_modules"] = state(tensors)["_modules"]
    return made


def network(case: dict[str, Any], source: str = "raise SystemExit", half: bool = False) -> Any:
    """A golden case's network as its pickle holds it."""
    tensors = {k: weight(k, tuple(v)) for k, v in case["names"].items()}
    if half:
        tensors = {k: v.half() for k, v in tensors.items()}
    arguments = {"_init_args": (), "_init_kwargs": case["arguments"]}
    return Persistent(case["kind"], state(tensors, **arguments), source)


def save(
    case: dict[str, Any],
    path: Path,
    source: str = "raise SystemExit",
    half: bool = False,
    protocol: int = 4,
) -> Path:
    """A golden case as its published file would be."""
    content: dict[str, Any] = {"ema": network(case, source, half), "loss_fn": Persistent("L", {})}
    if case["kind"] == "Precond":
        content = EasyDict(content)
        if case["arguments"]["img_channels"] == 4:
            std = np.array([4.17, 4.62, 3.71, 3.28], np.float32)
            scale = np.float32(0.5) / std
            bias = -np.array([5.81, 3.25, 0.12, -2.15], np.float32) * scale
            parts = {"vae_name": "a/vae", "scale": scale, "bias": bias, "_vae": None}
            content["encoder"] = Persistent("StabilityVAEEncoder", parts)
        else:
            content["encoder"] = Persistent("StandardRGBEncoder", {})
    return dump(content, path, protocol)
