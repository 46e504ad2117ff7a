"""Outputs of the published classes of SiT, LightningDiT with its VA-VAE, and U-ViT, and weights.

`published_outputs.safetensors` beside this file holds what the code of three repositories gives for
small networks: by case, the outputs and the tables of positions. Its header names the repositories,
their commits, and the shapes of all weights under the published names. The weights and the inputs
are not in it: `values` computes them from their names.

To write the file again, with timm and einops installed and the three repositories checked out in
the folders SiT, LightningDiT and U-ViT of one place:

    TORCHDYNAMO_DISABLE=1 XFORMERS_DISABLED=1 python -m tests.helpers.published PLACE
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).with_name("published_outputs.safetensors")
TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed by the classes
LABELS = (3, 7)  # the last means no label
INPUT = (2, 4, 8, 8)
COMMON: dict[str, Any] = {"patch_size": 2, "depth": 2, "num_heads": 2, "mlp_ratio": 0.5}
CLASSED = {**COMMON, "input_size": 8, "in_channels": 4, "hidden_size": 128, "num_classes": 7}
LIGHTNING = {**CLASSED, "mlp_ratio": 0.6, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
UVIT = {**COMMON, "img_size": 8, "in_chans": 4, "embed_dim": 128, "num_classes": 8}


class Case(NamedTuple):
    """A published network: its repository, options, own times, and the scale of its guidance."""

    repository: str
    options: dict[str, Any]
    times: tuple[float, float]
    guidance: float | None = None  # of forward_with_cfg; None: unguided


CASES = {
    "sit": Case("SiT", CLASSED, (0.75, 0.1)),
    "sit without variance": Case("SiT", {**CLASSED, "learn_sigma": False}, (0.75, 0.1)),
    "sit guided": Case("SiT", CLASSED, (0.4, 0.4), 4.0),
    "lightningdit": Case("LightningDiT", LIGHTNING, (0.75, 0.1)),
    "lightningdit guided": Case("LightningDiT", LIGHTNING, (0.4, 0.4), 6.7),
    "lightningdit with qk-norm": Case("LightningDiT", {**LIGHTNING, "use_qknorm": True}, (0.6, 0)),
    "lightningdit without shifts": Case("LightningDiT", {**LIGHTNING, "wo_shift": True}, (0.6, 1)),
    "lightningdit plain": Case("LightningDiT", CLASSED, (0.75, 0.1)),
    "uvit": Case("U-ViT", {**UVIT, "depth": 4, "conv": False}, (251, 901)),
    "uvit of a VP-SDE": Case("U-ViT", {**UVIT, "mlp_time_embed": True}, (99.9, 999)),
    "uvit with qkv-bias": Case("U-ViT", {**UVIT, "qkv_bias": True, "conv": False}, (1, 1000)),
}


VAE = "vae"  # the case of LightningDiT's autoencoder: 4 channels, widths of 32 and 64
PICTURE, LATENT = (1, 3, 32, 32), (1, 4, 16, 16)


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers between -√3 and √3 that depend on the name alone, on every machine and version."""
    size = int(np.prod(shape))
    seed = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**32
    h = (np.arange(size, dtype=np.uint64) * 0x9E3779B1 + seed) % 2**32
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        h = ((h ^ (h >> np.uint64(15))) * np.uint64(multiplier)) % 2**32
    h ^= h >> np.uint64(16)
    uniform = h.astype(np.float64) / 2**32 * 2 - 1
    return torch.from_numpy((uniform * 3**0.5).astype(np.float32)).view(shape)


def weights_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights so scaled that every layer matters; those of norms are about 1."""
    made = {}
    for name, shape in shapes.items():
        drawn = values(name, shape)
        if len(shape) > 1:
            drawn *= float(np.prod(shape[1:])) ** -0.5
        else:
            drawn = 0.5 * drawn + (1 if "norm" in name and name.endswith("weight") else 0)
        made[name] = drawn
    return made


class Reference(NamedTuple):
    """A case's published weights by name, its input (2, 4, 8, 8), and its output."""

    weights: dict[str, Tensor]
    input: Tensor
    output: Tensor


def reference(case: str) -> Reference:
    """The stored reference of a case."""
    with safe_open(FILE, "pt") as stored:
        shapes = json.loads(stored.metadata()[case])
        held = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
    weights = weights_of({k: tuple(v) for k, v in shapes.items() if k not in TABLES})
    weights |= {k: held[table(k, case)] for k in TABLES if k in shapes and table(k, case) in held}
    if "pos_embed" not in weights:  # learned
        weights |= weights_of({"pos_embed": tuple(shapes["pos_embed"])})
    return Reference(weights, values("input", INPUT), held[case])


def vae_reference() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The autoencoder's published weights, the moments of a picture, and the picture of a latent.

    The picture and the latent are `values("picture", PICTURE)` and `values("latent", LATENT)`.
    """
    with safe_open(FILE, "pt") as stored:
        shapes = json.loads(stored.metadata()[VAE])
        moments, picture = (stored.get_tensor(f"{VAE}.{k}") for k in ("moments", "picture"))
    return weights_of({k: tuple(v) for k, v in shapes.items()}), moments, picture


def table(name: str, case: str) -> str:
    """A table's name in the file; the same for all networks of one class."""
    return f"{CASES[case].repository}.{name}"


# ---- writing the file


def main(place: Path) -> None:
    """Run every case in the published code, and write the file."""
    stub_of_fairscale()
    tensors, header = {}, {}
    for name, case in CASES.items():
        root = place / case.repository
        header[case.repository] = f"{url(root)} {git(root, 'rev-parse', 'HEAD')}"
        network = published(root, case)
        state = network.state_dict()
        header[name] = json.dumps({k: list(v.shape) for k, v in state.items()})
        fixed = [
            k for k in TABLES if k in state and not (k == "pos_embed" and root.name == "U-ViT")
        ]
        tensors |= {table(k, name): state[k].clone() for k in fixed}
        drawn = weights_of({k: tuple(v.shape) for k, v in state.items() if k not in fixed})
        network.load_state_dict({**drawn, **{k: state[k] for k in fixed}})
        tensors[name] = output(network.eval(), case)
    autoencoder = published_vae(place / "LightningDiT")
    state = autoencoder.state_dict()
    header[VAE] = json.dumps({k: list(v.shape) for k, v in state.items()})
    autoencoder.load_state_dict(weights_of({k: tuple(v.shape) for k, v in state.items()}))
    with torch.no_grad():
        posterior = autoencoder.eval().encode(values("picture", PICTURE))
        tensors[f"{VAE}.moments"] = posterior.parameters
        tensors[f"{VAE}.picture"] = autoencoder.decode(values("latent", LATENT))
    save_file({k: v.contiguous() for k, v in tensors.items()}, FILE, header)


def published(root: Path, case: Case) -> Any:
    """A network of the published class, from the repository's own files."""
    for name in [k for k in sys.modules if k.split(".")[0] in ("models", "libs")]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    try:
        if case.repository == "SiT":
            from models import SiT as kind  # pyright: ignore
        elif case.repository == "LightningDiT":
            from models.lightningdit import LightningDiT as kind  # pyright: ignore
        else:
            from libs.uvit import UViT as kind  # pyright: ignore
    finally:
        sys.path.remove(str(root))
    return kind(**case.options)


def published_vae(root: Path) -> Any:
    """LightningDiT's autoencoder, narrower than its own class makes it."""
    sys.path.insert(0, str(root))
    try:
        from tokenizer import autoencoder as code  # pyright: ignore
    finally:
        sys.path.remove(str(root))
    sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 32, "z_channels": 4}
    model = code.AutoencoderKL.__new__(code.AutoencoderKL)
    torch.nn.Module.__init__(model)
    model.use_variational = True
    model.encoder, model.decoder = code.Encoder(**sizes), code.Decoder(**sizes)
    model.quant_conv = torch.nn.Conv2d(8, 8, 1)
    model.post_quant_conv = torch.nn.Conv2d(4, 4, 1)
    return model


@torch.no_grad()
def output(network: Any, case: Case) -> Tensor:
    x, t = values("input", INPUT), torch.tensor(case.times, dtype=torch.float32)
    labels = torch.tensor(LABELS)
    if case.guidance is not None:  # of the first image; the second half of the batch is unguided
        return network.forward_with_cfg(x, t, labels, case.guidance)[:1].float()
    return network(x, t, labels).float()


def stub_of_fairscale() -> None:
    """LightningDiT's file of RMSNorm imports a package that its RMSNorm does not use."""
    parent = "fairscale.nn.model_parallel"
    for name in ("fairscale", "fairscale.nn", parent, f"{parent}.initialize", f"{parent}.layers"):
        sys.modules.setdefault(name, types.ModuleType(name))
    layers: Any = sys.modules["fairscale.nn.model_parallel.layers"]
    for name in ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear"):
        setattr(layers, name, object)


def git(root: Path, *words: str) -> str:
    run = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def url(root: Path) -> str:
    return git(root, "config", "remote.origin.url")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
