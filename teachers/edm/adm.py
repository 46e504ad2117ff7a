"""EDM's ADM network (arXiv:2105.05233) as an equivalent UNet2DModel of diffusers.

| EDM's ADM | UNet2DModel |
|---|---|
| a resizing block, first of its resolution | the down- or upsampler ending the previous one |
| no label: a row of zeros | the last class embedding, if there is a null label |
| qkv, interleaved within each head | to_q, to_k, to_v |
| the time's cosines and sines, at 10⁴^(-2i/C) | flip_sin_to_cos, freq_shift 0 |

UNet2DModel has one number of groups for all its norms, one size for all its heads, and as many
sinusoids as its first width; `config` tests whether an ADM meets this.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from teachers.edm.networks import Attention, Block, DhariwalUNet, Head
from teachers.edm.parts import stages
from teachers.families.unet import steady_type

GROUPS, HEAD = 32, 64  # of UNet2DModel's norms, and the channels of one attention head


def config(arguments: dict[str, Any], null: bool = False) -> dict[str, Any] | None:
    """The UNet2DModel config equivalent to an ADM with these arguments; None if there is none.

    The published ADM of ImageNet-64 has one. Networks narrower than 128 channels do not, because
    their norms have fewer groups.

    Args:
        null: Add an embedding for the null label.
    """
    bound = inspect.signature(DhariwalUNet).bind(**arguments)
    bound.apply_defaults()
    a = bound.arguments
    widths = [a["model_channels"] * m for m in a["channel_mult"]]
    sides = [a["img_resolution"] >> i for i in range(len(widths))]
    attends = [side in a["attn_resolutions"] for side in sides]
    wide = all(width >= 4 * GROUPS and width % GROUPS == 0 for width in widths)
    whole = all(w % HEAD == 0 for w, attend in zip(widths, [*attends[:-1], True]) if attend)
    if not (wide and whole and a["channel_mult"][0] == 1):
        return None
    kinds = ["Attn" if attend else "Resnet" for attend in attends]
    names = {"Attn": ("AttnDownBlock2D", "AttnUpBlock2D")}
    names["Resnet"] = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return {
        "sample_size": a["img_resolution"],
        "in_channels": a["img_channels"],
        "out_channels": a["img_channels"],
        "time_embedding_dim": a["model_channels"] * a["channel_mult_emb"],
        "down_block_types": [names[kind][0] for kind in kinds],
        "up_block_types": [names[kind][1] for kind in reversed(kinds)],
        "block_out_channels": widths,
        "layers_per_block": a["num_blocks"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": HEAD,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "dropout": a["dropout"],
        "num_class_embeds": a["label_dim"] + null if a["label_dim"] else None,
    }


def stock(adm: DhariwalUNet, config: dict[str, Any]) -> Any:
    """The UNet2DModel equivalent to `adm`, in its dtype; `config` comes from the function above.

    Its time input is ¼ log σ, as in ADM. Weights that are only renamed are shared.
    """
    from diffusers import UNet2DModel

    state = dict(embeddings(adm, config["num_class_embeds"]))
    down, up = list(stages(adm.encoder).values()), list(stages(adm.decoder).values())
    for side, named, after in (("down", down, "downsamplers"), ("up", up, "upsamplers")):
        for i, stage in enumerate(named):
            if stage.resize is not None:
                state |= block(f"{side}_blocks.{i - 1}.{after}.0", stage.resize)
            for j, each in enumerate(stage.blocks):
                state |= block(f"{side}_blocks.{i}.resnets.{j}", each)
                state |= attention(f"{side}_blocks.{i}.attentions.{j}", each)
    for j, each in enumerate(up[0].middle):
        state |= block(f"mid_block.resnets.{j}", each)
        state |= attention(f"mid_block.attentions.{j}", each)
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    unet.load_state_dict({k: v.detach().contiguous() for k, v in state.items()}, assign=True)
    return steady_type(unet.train(adm.training))


def embeddings(adm: DhariwalUNet, classes: int | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors outside the blocks: time and label embeddings, first and last layer."""
    (head,) = adm.heads.values()
    assert isinstance(head, Head)
    yield from named("conv_in", adm.stem).items()
    yield from named("time_embedding.linear_1", adm.mlp[0]).items()
    yield from named("time_embedding.linear_2", adm.mlp[2]).items()
    yield from named("conv_norm_out", head.norm).items()
    yield from named("conv_out", head.conv).items()
    if adm.label is not None and classes is not None:
        rows = adm.label.weight.T
        none = rows.new_zeros(classes - len(rows), rows.shape[1])
        yield "class_embedding.weight", torch.cat([rows, none])


def block(to: str, source: Any) -> dict[str, Tensor]:
    """A Block's tensors without attention, under ResnetBlock2D's names."""
    assert isinstance(source, Block)
    tensors = dict(named(f"{to}.norm1", source.norm_in))
    tensors |= named(f"{to}.conv1", source.conv_in)
    tensors |= named(f"{to}.time_emb_proj", source.embed)
    tensors |= named(f"{to}.norm2", source.norm_out)
    tensors |= named(f"{to}.conv2", source.conv_out)
    tensors |= named(f"{to}.conv_shortcut", source.skip)
    return tensors


def attention(to: str, source: Any) -> dict[str, Tensor]:
    """A Block's attention tensors under diffusers' names; 1×1 convolutions become linear."""
    if (ours := source.attention) is None:
        return {}
    assert isinstance(ours, Attention)
    tensors = dict(named(f"{to}.group_norm", ours.norm))
    for kind, tensor in ours.qkv.named_parameters():
        # channels out are (head, channel, q k v)
        parts = tensor.flatten(1) if kind == "weight" else tensor
        parts = parts.view(ours.heads, -1, 3, *parts.shape[1:])
        for name, part in zip(("to_q", "to_k", "to_v"), parts.unbind(2)):
            tensors[f"{to}.{name}.{kind}"] = part.flatten(0, 1)
    tensors[f"{to}.to_out.0.weight"] = ours.out.weight.flatten(1)
    assert ours.out.bias is not None
    tensors[f"{to}.to_out.0.bias"] = ours.out.bias
    return tensors


def named(to: str, module: nn.Module) -> dict[str, Tensor]:
    """A layer's tensors with new names; none for an identity."""
    return {f"{to}.{k}": v for k, v in module.named_parameters()}
