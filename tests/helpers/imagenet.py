"""Small SiT, LightningDiT and U-ViT in their published files, and their functions, restated.

The restatements follow the papers and the published names of the weights, image by image and head
by head, without a module of ours.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.families import kl_vae

WIDTH, HEADS, CLASSES, SIDE, PATCH = 128, 2, 7, 8, 2
Weights = dict[str, Tensor]


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Random weights of these shapes, so scaled that every layer matters."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        scale = 0.5 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        weights[name] = scale * torch.randn(shape, generator=draw)
    return weights


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    return {**shapes, f"{name}.bias": (outputs,)} if bias else shapes


def table(width: int = WIDTH, side: int = SIDE // PATCH) -> Tensor:
    """The fixed embedding of positions, number by number."""
    rows = []
    for row in range(side):
        for column in range(side):
            one = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                one += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(one)
    return torch.tensor(rows)[None]


def turns(width: int, side: int) -> tuple[Tensor, Tensor]:
    """The rotary angles of each token and channel, number by number; their cosines and sines."""
    half, rows = width // 2, []
    for row in range(side):
        for column in range(side):
            one = []
            for place in (row, column):
                for i in range(half // 2):
                    one += 2 * [place / 10000 ** (2 * i / half)]
            rows.append(one)
    angles = torch.tensor(rows)
    return angles.cos(), angles.sin()


def sit(variance: bool = True, hidden: int = 64, channels: int = 4) -> Weights:
    """A SiT of two blocks, by the published names."""
    out = PATCH**2 * channels * (2 if variance else 1)
    shapes = {"x_embedder.proj.weight": (WIDTH, channels, PATCH, PATCH)}
    shapes |= {"x_embedder.proj.bias": (WIDTH,)}  # pyright: ignore
    shapes |= linear("t_embedder.mlp.0", 256, WIDTH) | linear("t_embedder.mlp.2", WIDTH, WIDTH)
    shapes |= {"y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH)}  # pyright: ignore
    for i in range(2):
        shapes |= linear(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"blocks.{i}.mlp.fc1", WIDTH, hidden)
        shapes |= linear(f"blocks.{i}.mlp.fc2", hidden, WIDTH)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
    shapes |= linear("final_layer.linear", WIDTH, out)
    shapes |= linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    return {**drawn(shapes), "pos_embed": table()}


def lightningdit(qk_norm: bool = False, shifts: bool = True, hidden: int = 48) -> Weights:
    """A LightningDiT of two blocks, by the published names: RMSNorm, SwiGLU and rotation."""
    weights = {k: v for k, v in sit(False).items() if ".mlp.fc" not in k}
    shapes: dict[str, tuple[int, ...]] = {"final_layer.norm_final.weight": (WIDTH,)}
    for i in range(2):
        shapes |= linear(f"blocks.{i}.mlp.w12", WIDTH, 2 * hidden)
        shapes |= linear(f"blocks.{i}.mlp.w3", hidden, WIDTH)
        shapes |= {f"blocks.{i}.norm1.weight": (WIDTH,), f"blocks.{i}.norm2.weight": (WIDTH,)}
        if not shifts:
            shapes |= linear(f"blocks.{i}.adaLN_modulation.1", WIDTH, 4 * WIDTH)
        if qk_norm:
            names = [f"blocks.{i}.attn.{k}_norm.weight" for k in "qk"]
            shapes |= dict.fromkeys(names, (WIDTH // HEADS,))
    cos, sin = turns(WIDTH // HEADS, SIDE // PATCH)
    return weights | drawn(shapes, 1) | {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}


def uvit(conv: bool = False, time_mlp: bool = False, hidden: int = 64, depth: int = 2) -> Weights:
    """A U-ViT by the published names; `depth` is without the middle block."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (WIDTH, 4, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
        "label_emb.weight": (CLASSES + 1, WIDTH), "pos_embed": (1, 2 + (SIDE // PATCH) ** 2, WIDTH),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    half = range(depth // 2)
    blocks = [f"in_blocks.{i}" for i in half] + ["mid_block"] + [f"out_blocks.{i}" for i in half]
    for block in blocks:
        shapes |= linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH, bias=False)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", WIDTH, hidden)
        shapes |= linear(f"{block}.mlp.fc2", hidden, WIDTH)
        shapes |= {f"{block}.norm{j}.{k}": (WIDTH,) for j in "12" for k in ("weight", "bias")}
        if block.startswith("out"):
            shapes |= linear(f"{block}.skip_linear", 2 * WIDTH, WIDTH)
    shapes |= linear("decoder_pred", WIDTH, PATCH**2 * 4)
    if conv:
        shapes |= {"final_layer.weight": (4, 4, 3, 3), "final_layer.bias": (4,)}
    if time_mlp:
        shapes |= linear("time_embed.0", WIDTH, 4 * WIDTH)
        shapes |= linear("time_embed.2", 4 * WIDTH, WIDTH)
    return drawn(shapes, 2)


PUBLISHED = {"sit": sit, "lightningdit": lightningdit, "uvit": uvit}


def save(name: str, folder: Path, **args: Any) -> str:
    """A published file of one network, as its training scripts write it, and a VAE beside it.

    Args:
        args: Training options that SiT's scripts save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        torch.manual_seed(0)
        kl_vae(4, scaling_factor=0.18215).save_pretrained(folder / "vae")
    weights, path = PUBLISHED[name](), folder / f"{name}.pt"
    content: Any = weights
    if name == "sit":
        content = {"model": {}, "ema": weights, "opt": {}, "args": argparse.Namespace(**args)}
    if name == "lightningdit":
        content = {"ema": {f"module.{k}": v for k, v in weights.items()}}
    torch.save(content, path)
    return str(path)


# ---- the networks, restated


def layer(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def waves(t: float, features: int) -> Tensor:
    half = features // 2
    angles = [t * math.exp(-math.log(10000) * i / half) for i in range(half)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def plain_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, d), pair by pair of channels as complex numbers."""
    pairs = torch.view_as_complex(x.view(len(x), -1, 2).contiguous())
    angle = torch.complex(cos[:, ::2].contiguous(), sin[:, ::2].contiguous())
    return torch.view_as_real(pairs * angle).reshape(len(x), -1)


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    """Of tokens x (T, D), one head after the other."""
    d, heads = WIDTH // HEADS, []
    qkv = layer(w, f"{name}.qkv", x)
    for h in range(HEADS):
        q, k, v = (qkv[:, i * WIDTH + h * d : i * WIDTH + (h + 1) * d] for i in range(3))
        if f"{name}.q_norm.weight" in w:
            q, k = rms(q, w[f"{name}.q_norm.weight"]), rms(k, w[f"{name}.k_norm.weight"])
        if "feat_rope.freqs_cos" in w:
            cos, sin = w["feat_rope.freqs_cos"], w["feat_rope.freqs_sin"]
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        heads.append((q @ k.T / d**0.5).softmax(-1) @ v)
    return layer(w, f"{name}.proj", torch.cat(heads, 1))


def cut(w: Weights, name: str, image: Tensor) -> Tensor:
    """An image (C, H, W) as embedded patches (T, D), patch by patch."""
    weight, rows = w[f"{name}.weight"].flatten(1), []
    for y in range(0, SIDE, PATCH):
        for x in range(0, SIDE, PATCH):
            rows.append(weight @ image[:, y : y + PATCH, x : x + PATCH].flatten())
    return torch.stack(rows) + w[f"{name}.bias"]


def joined(tokens: Tensor, channels: int) -> Tensor:
    """An image (C, H, W) of tokens (T, patch² C), pixel by pixel; C counts all that are there."""
    image = torch.zeros(channels, SIDE, SIDE)
    across = SIDE // PATCH
    for i, token in enumerate(tokens):
        for j, pixel in enumerate(token.view(PATCH**2, channels)):
            y, x = i // across * PATCH + j // PATCH, i % across * PATCH + j % PATCH
            image[:, y, x] = pixel
    return image


def sit_velocity(w: Weights, image: Tensor, t: float, label: int) -> Tensor:
    """dx/dt of SiT's or LightningDiT's at its own time, of one image (4, H, W)."""
    x = cut(w, "x_embedder.proj", image) + w["pos_embed"][0]
    time = layer(w, "t_embedder.mlp.2", F.silu(layer(w, "t_embedder.mlp.0", waves(t, 256))))
    cond = F.silu(time + w["y_embedder.embedding_table.weight"][label])
    for i in range(2):
        b = f"blocks.{i}"
        mod = layer(w, f"{b}.adaLN_modulation.1", cond).split(WIDTH)
        zero = torch.zeros(WIDTH)
        if len(mod) == 4:
            mod = (zero, mod[0], mod[1], zero, mod[2], mod[3])
        for j, (shift, scale, gate) in enumerate((mod[:3], mod[3:])):
            own = w.get(f"{b}.norm{j + 1}.weight")
            y = (plain_norm(x) if own is None else rms(x, own)) * (1 + scale) + shift
            if j == 0:
                y = attention(w, f"{b}.attn", y)
            elif f"{b}.mlp.w12.weight" in w:
                a, c = layer(w, f"{b}.mlp.w12", y).chunk(2, -1)
                y = layer(w, f"{b}.mlp.w3", F.silu(a) * c)
            else:
                y = F.gelu(layer(w, f"{b}.mlp.fc1", y), approximate="tanh")
                y = layer(w, f"{b}.mlp.fc2", y)
            x = x + gate * y
    shift, scale = layer(w, "final_layer.adaLN_modulation.1", cond).split(WIDTH)
    own = w.get("final_layer.norm_final.weight")
    x = (plain_norm(x) if own is None else rms(x, own)) * (1 + scale) + shift
    out = layer(w, "final_layer.linear", x)
    return joined(out, out.shape[1] // PATCH**2)[:4]


def uvit_eps(w: Weights, image: Tensor, time: float, label: int) -> Tensor:
    """ε of U-ViT's at its own time, of one image (4, H, W)."""
    token = waves(time, WIDTH)
    if "time_embed.0.weight" in w:
        token = layer(w, "time_embed.2", F.silu(layer(w, "time_embed.0", token)))
    extras = torch.stack([w["label_emb.weight"][label], token])
    x = torch.cat([extras, cut(w, "patch_embed.proj", image)]) + w["pos_embed"][0]

    def block(name: str, x: Tensor) -> Tensor:
        for j in "12":
            norm = w[f"{name}.norm{j}.weight"], w[f"{name}.norm{j}.bias"]
            y = F.layer_norm(x, (WIDTH,), *norm)
            if j == "1":
                x = x + attention(w, f"{name}.attn", y)
            else:
                x = x + layer(w, f"{name}.mlp.fc2", F.gelu(layer(w, f"{name}.mlp.fc1", y)))
        return x

    kept, half = [], sum(k.startswith("in_blocks") and k.endswith("qkv.weight") for k in w)
    for i in range(half):
        kept.append(x := block(f"in_blocks.{i}", x))
    x = block("mid_block", x)
    for i in range(half):
        x = layer(w, f"out_blocks.{i}.skip_linear", torch.cat([x, kept[half - 1 - i]], 1))
        x = block(f"out_blocks.{i}", x)
    x = F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"])
    eps = joined(layer(w, "decoder_pred", x)[2:], 4)
    if "final_layer.weight" in w:
        eps = F.conv2d(eps[None], w["final_layer.weight"], w["final_layer.bias"], padding=1)[0]
    return eps
