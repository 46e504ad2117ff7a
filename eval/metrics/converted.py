"""Networks of HPS v2.1 and ImageReward: their authors' files as transformers' classes.

`image-reward` 1.5 imports names that transformers has removed, and `hpsv2` 1.2.0 asks for old
versions of pytest and protobuf. Only weights are taken from their files, read with weights_only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eval import fetch

HPS_FILE, IMAGE_REWARD_FILE = "HPS_v2.1_compressed.pt", "ImageReward.pt"
# In both of CLIP's transformers: names of open_clip and of transformers.
BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {"visual.proj": "visual_projection", "text_projection": "text_projection"}
# In BLIP's picture encoder; its text encoder has the names of transformers.
PICTURE = (
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
)


def hps(source: tuple[str, str], config: tuple[str, str]) -> Any:
    """HPS v2.1 (arXiv:2306.09341) as a `CLIPModel`, in eval mode on the CPU.

    Args:
        source: A folder, or a Hub repository and its revision, with HPS_FILE.
        config: The same, with the `config.json` of its CLIP.

    Raises:
        MetricError: a file is missing, or lacks weights.
    """
    stock = fetch.package("transformers", "transformers")
    tree = fetch.checkpoint(*source, HPS_FILE)
    model = stock.CLIPModel(stock.CLIPConfig.from_pretrained(fetch.configs(*config)))
    return fetch.filled(model, clip_weights(tree.get("state_dict", tree)), source[0])


def clip_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's weights in open_clip's names as those of a `CLIPModel`; others are left out."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in OUTSIDE:
            found[OUTSIDE[name]] = value
        elif name in PROJECTIONS:
            found[f"{PROJECTIONS[name]}.weight"] = value.T.contiguous()
        elif match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
            tower = "vision_model" if match[1] else "text_model"
            place = f"{tower}.encoder.layers.{match[2]}."
            found |= {f"{place}{k}": v for k, v in _block(match[3], value).items()}
    return found


def _block(name: str, value: Tensor) -> dict[str, Tensor]:
    """The weights of a transformer's block that one of open_clip holds."""
    if match := re.fullmatch(r"attn\.in_proj_(weight|bias)", name):
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"self_attn.{k}_proj.{match[1]}": v.contiguous() for k, v in parts}
    begin = next((b for b in BLOCK if name.startswith(b)), None)
    return {} if begin is None else {f"{BLOCK[begin]}{name.removeprefix(begin)}": value}


class RewardSizes(NamedTuple):
    """Sides of ImageReward's networks: BLIP with a large ViT, and the layers on top of it."""

    image: int = 224
    patch: int = 16
    picture: int = 1024
    picture_layers: int = 24
    picture_heads: int = 16
    text: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_inner: int = 3072
    words: int = 30524
    positions: int = 512
    top: tuple[int, ...] = (1024, 128, 64, 16)


class ImageRewardNetwork(nn.Module):
    """ImageReward v1.0 (arXiv:2304.05977): pixels and tokens to a reward, about N(0, 1).

    A text encoder reads the prompt and, by cross-attention, BLIP's features of the picture; linear
    layers without activations read its first token.
    """

    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of its data, from the authors' code

    def __init__(self, sizes: RewardSizes | None = None) -> None:
        super().__init__()
        stock = fetch.package("transformers", "transformers")
        s = sizes or RewardSizes()
        self.size = s.image
        self.picture = stock.BlipVisionModel(
            stock.BlipVisionConfig(
                hidden_size=s.picture, intermediate_size=4 * s.picture, image_size=s.image,
                num_hidden_layers=s.picture_layers, num_attention_heads=s.picture_heads,
                patch_size=s.patch, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        self.text = stock.BlipTextModel(
            stock.BlipTextConfig(
                hidden_size=s.text, encoder_hidden_size=s.picture, intermediate_size=s.text_inner,
                num_hidden_layers=s.text_layers, num_attention_heads=s.text_heads,
                vocab_size=s.words, max_position_embeddings=s.positions, layer_norm_eps=1e-12,
                is_decoder=True,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        widths = (s.text, *s.top, 1)
        self.top = nn.Sequential(*(nn.Linear(*pair) for pair in zip(widths, widths[1:])))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (N,) of normalised pixels (N, 3, size, size) and tokens (N, L) with their mask.

        The mask is 1 for tokens and 0 for padding.
        """
        seen = self.picture(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device),
            is_decoder=False,  # every token reads every other
        ).last_hidden_state
        return (self.top(read[:, 0])[:, 0] - self.MEAN) / self.STD


def image_reward(source: tuple[str, str], sizes: RewardSizes | None = None) -> ImageRewardNetwork:
    """ImageReward v1.0, in eval mode on the CPU.

    Args:
        source: A folder, or a Hub repository and its revision, with IMAGE_REWARD_FILE.

    Raises:
        MetricError: the file is missing, or lacks weights.
    """
    state = reward_weights(fetch.checkpoint(*source, IMAGE_REWARD_FILE))
    return fetch.filled(ImageRewardNetwork(sizes), state, source[0])


def reward_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ImageReward's file as those of `ImageRewardNetwork`; others are left out."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for old, new in PICTURE:
                name = re.sub(old, new, name)
            found[f"picture.{name}"] = value
        elif name.startswith("blip.text_encoder."):
            found[f"text.{name.removeprefix('blip.text_encoder.')}"] = value
    layers = sorted({int(n.split(".")[2]) for n in state if n.startswith("mlp.layers.")})
    for number, layer in enumerate(layers):  # dropouts between them have numbers, and no weights
        for kind in ("weight", "bias"):
            found[f"top.{number}.{kind}"] = state[f"mlp.layers.{layer}.{kind}"]
    return found
