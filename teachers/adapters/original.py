"""The layers of transformers by the names of their original code, which ComfyUI keeps.

One table a network of diffusers. A layer of the original code is one module here or several, such
as `qkv`, whose rows belong to them in turn; `{}` counts blocks. The names are those of weights that
ComfyUI loads, of its source of 2026; how its networks compute is in the papers' own code:

| networks | original code |
|---|---|
| FLUX.1, FLUX.2, LongCat-Image, Chroma | Black Forest Labs', with Chroma's approximator |
| SD 3 | Stability's |
| Lumina 2, Z-Image | Alpha-VLLM's NextDiT |
| AuraFlow, HunyuanDiT, Krea 2, PixArt, Wan | their authors' |
| Qwen-Image, ERNIE-Image, HiDream | diffusers' names |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from teachers.storage import bfl

Table = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Place:
    """The modules that a layer of a file changes.

    swapped: Whether the file has the two halves of the output in the other order, as the original
        code has scale and shift of the last norm.
    """

    modules: tuple[str, ...]
    swapped: bool = False


def places(network: nn.Module) -> dict[str, Place]:
    """A transformer's layers by their names in the original code; none of an unknown network."""
    kind = type(network).__name__
    if kind in SAME:
        return {name: Place((name,)) for name in _layers(network)}
    return expanded(network, TABLES.get(kind, {}))


def expanded(network: nn.Module, table: Table) -> dict[str, Place]:
    """The rows of a table for all blocks of a network, without those whose modules it lacks."""
    layers, found = _layers(network), {}
    for name, modules in table.items():
        for i in range(_count(network, modules[0])):
            mine = tuple(m.replace("{}", str(i)) for m in modules)
            if layers.issuperset(mine):
                parent = network.get_submodule(mine[0].rpartition(".")[0])
                swapped = type(parent).__name__ in SCALE_FIRST
                found[name.replace("{}", str(i))] = Place(mine, swapped)
    return found


def _layers(network: nn.Module) -> set[str]:
    """The names of the modules that have a weight, quantised ones included, which compute it."""
    modules = network.named_modules()
    return {k for k, m in modules if "weight" in m._parameters or hasattr(type(m), "weight")}


def _count(network: nn.Module, name: str) -> int:
    """How many blocks are in the list that `{}` counts; 1 for a name without it."""
    path, brackets, _ = name.partition(".{}")
    if not brackets:
        return 1
    *parents, last = path.split(".")
    for parent in parents:
        network = getattr(network, parent, nn.Module())
    return len(list(getattr(network, last, ())))


def blocks(theirs: str, ours: str, table: Mapping[str, tuple[str, ...] | str]) -> Table:
    """The layers of all blocks of a list.

    Args:
        theirs, ours: The list's name.
        table: The layers of one block, norms included, which get no LoRA and are left out.
    """
    return {
        f"{theirs}.{{}}.{name}": tuple(f"{ours}.{{}}.{m}" for m in to)
        for name, modules in table.items()
        if "norm" not in (to := (modules,) if isinstance(modules, str) else modules)[0]
        or to[0].endswith("linear")
    }


def outer(table: Mapping[str, str]) -> Table:
    return {theirs: (ours,) for theirs, ours in table.items()}


def embedding(theirs: str, ours: str, ends: tuple[str, str] = ("mlp.0", "mlp.2")) -> Table:
    """Two layers that embed a number or a vector."""
    return {f"{theirs}.{end}": (f"{ours}.linear_{i}",) for i, end in enumerate(ends, 1)}


SCALE_FIRST = ("AdaLayerNormContinuous", "AuraFlowPreFinalBlock")  # of diffusers; shift is second
SAME = (
    "QwenImageTransformer2DModel", "ErnieImageTransformer2DModel", "HiDreamImageTransformer2DModel"
)  # fmt: skip
QKV, ADDED = bfl.QKV, bfl.ADDED
IN_OUT = ("in_layer", "out_layer")

# ---- Black Forest Labs

FLUX = {
    **blocks("double_blocks", "transformer_blocks", bfl.DOUBLE),
    **blocks("single_blocks", "single_transformer_blocks", bfl.SINGLE),
    **outer(bfl.OUTER),
}
FLUX2 = {
    **FLUX,
    **blocks(
        "double_blocks", "transformer_blocks",
        {"img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
         "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out"},
    ),
    **blocks(
        "single_blocks", "single_transformer_blocks",
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    **embedding("time_in", "time_guidance_embed.timestep_embedder", IN_OUT),
    **embedding("guidance_in", "time_guidance_embed.guidance_embedder", IN_OUT),
    **outer({f"{k}.lin": f"{k}.linear" for k in (
        "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"
    )}),
}  # fmt: skip
LONGCAT = {**FLUX, **embedding("time_in", "time_embed.timestep_embedder", IN_OUT)}
APPROXIMATOR = "distilled_guidance_layer"
CHROMA = {
    **FLUX,
    **embedding(f"{APPROXIMATOR}.layers.{{}}", f"{APPROXIMATOR}.layers.{{}}", IN_OUT),
    **outer({f"{APPROXIMATOR}.{k}": f"{APPROXIMATOR}.{k}" for k in ("in_proj", "out_proj")}),
}

# ---- Stability

SD3 = {
    **blocks("joint_blocks", "transformer_blocks", {
        "x_block.attn.qkv": QKV, "context_block.attn.qkv": ADDED,
        "x_block.attn.proj": "attn.to_out.0", "context_block.attn.proj": "attn.to_add_out",
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj", "context_block.mlp.fc1": "ff_context.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2", "context_block.mlp.fc2": "ff_context.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
    }),
    **embedding("t_embedder", f"{bfl.EMBEDDING}.timestep_embedder"),
    **embedding("y_embedder", f"{bfl.EMBEDDING}.text_embedder"),
    **outer({
        "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    }),
}  # fmt: skip

# ---- NextDiT

REFINED = ("layers", "noise_refiner", "context_refiner")
LUMINA = {
    **{k: v for name in REFINED for k, v in blocks(name, name, {
        "attention.qkv": QKV, "attention.out": "attn.to_out.0",
        **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
        "adaLN_modulation.1": "norm1.linear",
    }).items()},
    **embedding("t_embedder", "time_caption_embed.timestep_embedder"),
    **outer({
        "x_embedder": "x_embedder", "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    }),
}  # fmt: skip
LAST = "all_final_layer.2-1"
Z_IMAGE = {
    **{k: v for name in REFINED for k, v in blocks(name, name, {
        "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
        "attention.out": "attention.to_out.0",
        **{k: k for k in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
                          "adaLN_modulation.0")},
    }).items()},
    **outer({
        "x_embedder": "all_x_embedder.2-1", "final_layer.linear": f"{LAST}.linear",
        "final_layer.adaLN_modulation.1": f"{LAST}.adaLN_modulation.1",
        **{k: k for k in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
    }),
}  # fmt: skip

# ---- other authors

AURA = {
    **blocks("double_layers", "joint_transformer_blocks", {
        **{f"attn.w2{k}": f"attn.to_{k}" for k in "qkv"}, "attn.w2o": "attn.to_out.0",
        **{f"attn.w1{k}": f"attn.add_{k}_proj" for k in "qkv"}, "attn.w1o": "attn.to_add_out",
        "mlpX.c_fc1": "ff.linear_1", "mlpX.c_fc2": "ff.linear_2",
        "mlpX.c_proj": "ff.out_projection", "mlpC.c_fc1": "ff_context.linear_1",
        "mlpC.c_fc2": "ff_context.linear_2", "mlpC.c_proj": "ff_context.out_projection",
        "modX.1": "norm1.linear", "modC.1": "norm1_context.linear",
    }),
    **blocks("single_layers", "single_transformer_blocks", {
        **{f"attn.w1{k}": f"attn.to_{k}" for k in "qkv"}, "attn.w1o": "attn.to_out.0",
        "mlp.c_fc1": "ff.linear_1", "mlp.c_fc2": "ff.linear_2", "mlp.c_proj": "ff.out_projection",
        "modCX.1": "norm1.linear",
    }),
    **embedding("t_embedder", "time_step_proj"),
    **outer({
        "init_x_linear": "pos_embed.proj", "cond_seq_linear": "context_embedder",
        "final_linear": "proj_out", "modF.1": "norm_out.linear",
    }),
}  # fmt: skip
EXTRA = "time_extra_emb"
HUNYUAN = {
    **blocks("blocks", "blocks", {
        "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn1.out_proj": "attn1.to_out.0", "attn2.q_proj": "attn2.to_q",
        "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"), "attn2.out_proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "default_modulation.1": "norm1.linear",
        "skip_linear": "skip_linear",
    }),
    **embedding("mlp_t5", "text_embedder", ("0", "2")),
    **embedding("t_embedder", f"{EXTRA}.timestep_embedder"),
    **embedding("extra_embedder", f"{EXTRA}.extra_embedder", ("0", "2")),
    **outer({f"pooler.{k}_proj": f"{EXTRA}.pooler.{k}_proj" for k in "qkvc"}),
    **outer({
        "style_embedder": f"{EXTRA}.style_embedder", "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    }),
}  # fmt: skip
KREA_BLOCK = {
    **{f"attn.w{k}": f"attn.to_{k}" for k in "qkv"},
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    **{f"mlp.{k}": f"ff.{k}" for k in ("gate", "up", "down")},
}
KREA = {
    **blocks("blocks", "transformer_blocks", KREA_BLOCK),
    **blocks("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", KREA_BLOCK),
    **blocks("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", KREA_BLOCK),
    **embedding("tmlp", "time_embed", ("0", "2")),
    **embedding("txtmlp", "txt_in", ("1", "3")),
    **outer({
        "first": "img_in", "tproj.1": "time_mod_proj", "last.linear": "final_layer.linear",
        "txtfusion.projector": "text_fusion.projector",
    }),
}  # fmt: skip
NUMBERS = "adaln_single.emb"
PIXART = {
    **blocks("blocks", "transformer_blocks", {
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q", "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
        "cross_attn.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    }),
    **embedding("t_embedder", f"{NUMBERS}.timestep_embedder"),
    **embedding("csize_embedder", f"{NUMBERS}.resolution_embedder"),
    **embedding("ar_embedder", f"{NUMBERS}.aspect_ratio_embedder"),
    **embedding("y_embedder.y_proj", "caption_projection", ("fc1", "fc2")),
    **outer({
        "x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }),
}  # fmt: skip
WAN = {
    **blocks("blocks", "blocks", {
        **{f"{theirs}.{k}": f"{ours}.{v}" for theirs, ours in (
            ("self_attn", "attn1"), ("cross_attn", "attn2")
        ) for k, v in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))},
        "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    }),
    **embedding("time_embedding", "condition_embedder.time_embedder", ("0", "2")),
    **embedding("text_embedding", "condition_embedder.text_embedder", ("0", "2")),
    **outer({
        "patch_embedding": "patch_embedding", "head.head": "proj_out",
        "time_projection.1": "condition_embedder.time_proj",
    }),
}  # fmt: skip

TABLES = {
    "AuraFlowTransformer2DModel": AURA,
    "ChromaTransformer2DModel": CHROMA,
    "Flux2Transformer2DModel": FLUX2,
    "FluxTransformer2DModel": FLUX,
    "HunyuanDiT2DModel": HUNYUAN,
    "Krea2Transformer2DModel": KREA,
    "LongCatImageTransformer2DModel": LONGCAT,
    "Lumina2Transformer2DModel": LUMINA,
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": SD3,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}
