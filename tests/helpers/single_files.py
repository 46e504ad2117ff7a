"""Single files of SD 3 and FLUX.1 as people have them: the original names of every part.

The names are written out here, from those that diffusers has to those of the original code. Tests
compare them with diffusers' own converter, which goes the other way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from students.export.formats import vae_to_ldm

State = dict[str, Tensor]
NETWORK = "model.diffusion_model."
EMBEDDING = {
    "timestep_embedder.linear_1": ("time_in.in_layer", "t_embedder.mlp.0"),
    "timestep_embedder.linear_2": ("time_in.out_layer", "t_embedder.mlp.2"),
    "text_embedder.linear_1": ("vector_in.in_layer", "y_embedder.mlp.0"),
    "text_embedder.linear_2": ("vector_in.out_layer", "y_embedder.mlp.2"),
    "guidance_embedder.linear_1": ("guidance_in.in_layer", ""),
    "guidance_embedder.linear_2": ("guidance_in.out_layer", ""),
}
# A block's layers: diffusers' for the picture's and the text's tokens, and BFL's and Stability's.
JOINED = {("to_q", "to_k", "to_v"): 0, ("add_q_proj", "add_k_proj", "add_v_proj"): 1}
LAYERS = {
    "norm1.linear": ("img_mod.lin", "x_block.adaLN_modulation.1"),
    "norm1_context.linear": ("txt_mod.lin", "context_block.adaLN_modulation.1"),
    "attn.to_out.0": ("img_attn.proj", "x_block.attn.proj"),
    "attn.to_add_out": ("txt_attn.proj", "context_block.attn.proj"),
    "attn2.to_out.0": ("", "x_block.attn2.proj"),
    "ff.net.0.proj": ("img_mlp.0", "x_block.mlp.fc1"),
    "ff.net.2": ("img_mlp.2", "x_block.mlp.fc2"),
    "ff_context.net.0.proj": ("txt_mlp.0", "context_block.mlp.fc1"),
    "ff_context.net.2": ("txt_mlp.2", "context_block.mlp.fc2"),
    "attn.norm_q": ("img_attn.norm.query_norm", "x_block.attn.ln_q"),
    "attn.norm_k": ("img_attn.norm.key_norm", "x_block.attn.ln_k"),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", "context_block.attn.ln_q"),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", "context_block.attn.ln_k"),
    "attn2.norm_q": ("", "x_block.attn2.ln_q"),
    "attn2.norm_k": ("", "x_block.attn2.ln_k"),
}
ONE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def halves(weight: Tensor) -> Tensor:
    """A norm's scale and shift in the other order."""
    return torch.cat(weight.chunk(2)[::-1])


def leaves(state: State, module: str) -> dict[str, Tensor]:
    """A module's own weights, by leaf."""
    names = [k for k in state if k.rpartition(".")[0] == module]
    return {k.rpartition(".")[2]: state[k] for k in names}


def blocks(state: State, name: str) -> int:
    return 1 + max(int(k.split(".")[1]) for k in state if k.startswith(f"{name}."))


def bfl(state: State) -> State:
    """A FluxTransformer2DModel's weights by BFL's names."""
    made: State = {}

    def put(to: str, *modules: str) -> None:
        parts = [leaves(state, m) for m in modules]
        for leaf in parts[0]:
            named = "scale" if to.endswith("_norm") else leaf
            made[f"{to}.{named}"] = torch.cat([p[leaf] for p in parts])

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for ours, (theirs, _) in EMBEDDING.items():
        if leaves(state, f"time_text_embed.{ours}"):
            put(theirs, f"time_text_embed.{ours}")
    for i in range(blocks(state, "transformer_blocks")):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for names, which in JOINED.items():
            put(f"{theirs}.{('img', 'txt')[which]}_attn.qkv", *(f"{ours}.attn.{n}" for n in names))
        for layer, (name, _) in LAYERS.items():
            if name:
                put(f"{theirs}.{name}", f"{ours}.{layer}")
    for i in range(blocks(state, "single_transformer_blocks")):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        joined = (*(f"attn.{n}" for n in ("to_q", "to_k", "to_v")), "proj_mlp")
        put(f"{theirs}.linear1", *(f"{ours}.{n}" for n in joined))
        for layer, name in ONE.items():
            put(f"{theirs}.{name}", f"{ours}.{layer}")
    put("final_layer.linear", "proj_out")
    for leaf, value in leaves(state, "norm_out.linear").items():
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = halves(value)
    return made


def stability(state: State) -> State:
    """An SD3Transformer2DModel's weights by Stability's names."""
    made: State = {"pos_embed": state["pos_embed.pos_embed"]}

    def put(to: str, *modules: str) -> None:
        parts = [leaves(state, m) for m in modules]
        for leaf in parts[0]:
            made[f"{to}.{leaf}"] = torch.cat([p[leaf] for p in parts])

    put("x_embedder.proj", "pos_embed.proj")
    put("context_embedder", "context_embedder")
    for ours, (_, theirs) in EMBEDDING.items():
        if theirs:
            put(theirs, f"time_text_embed.{ours}")
    last = blocks(state, "transformer_blocks") - 1
    for i in range(last + 1):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for attention in ("attn", "attn2"):
            for names, which in JOINED.items():
                if leaves(state, f"{ours}.{attention}.{names[0]}"):
                    side = ("x_block", "context_block")[which]
                    to = f"{theirs}.{side}.{attention}.qkv"
                    put(to, *(f"{ours}.{attention}.{n}" for n in names))
        for layer, (_, name) in LAYERS.items():
            if leaves(state, f"{ours}.{layer}"):
                put(f"{theirs}.{name}", f"{ours}.{layer}")
    for module, to in (
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        (f"transformer_blocks.{last}.norm1_context.linear",
         f"joint_blocks.{last}.context_block.adaLN_modulation.1"),
    ):  # fmt: skip
        made |= {f"{to}.{leaf}": halves(v) for leaf, v in leaves(state, module).items()}
    put("final_layer.linear", "proj_out")
    return made


def network(pipe: Any) -> State:
    """The network's weights by the original names, without a prefix."""
    state = pipe.transformer.state_dict()
    return (
        bfl(state) if hasattr(pipe.transformer, "single_transformer_blocks") else stability(state)
    )


def whole(pipe: Any, vae: str = "first_stage_model.") -> State:
    """All parts of a pipeline in one file, with the names that ComfyUI's files have.

    Args:
        vae: The prefix of the autoencoder.
    """
    made = {f"{NETWORK}{k}": v for k, v in network(pipe).items()}
    made |= {f"{vae}{k}": v for k, v in vae_to_ldm(pipe.vae.state_dict()).items()}
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipe, part, None)
        if encoder is None:
            continue
        t5 = type(encoder).__name__ == "T5EncoderModel"
        name = "t5xxl" if t5 else "clip_l" if part == "text_encoder" else "clip_g"
        for k, v in encoder.state_dict().items():
            if t5 and k == "encoder.embed_tokens.weight":  # the same as `shared`
                continue
            if name == "clip_l" and k == "text_projection.weight":  # these files have none
                continue
            wrapped = t5 or k.startswith(("text_model.", "text_projection."))
            made[f"text_encoders.{name}.transformer.{'' if wrapped else 'text_model.'}{k}"] = v
    return made


def save(state: State, path: Path) -> str:
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return str(path)
