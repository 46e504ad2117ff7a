"""Small random preference networks in the files of their authors, and what such files compute."""

import json
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention

from eval.metrics.clip import CLIPEncoders
from eval.metrics.converted import HPS_FILE, IMAGE_REWARD_FILE, ImageRewardNetwork, RewardSizes
from eval.metrics.rewards import HPSEncoders, RewardScorer
from tests.helpers.families import clip_tokenizer

SIDE, PATCH, WIDTH, HEADS, LAYERS, JOINT, LENGTH = 28, 14, 32, 4, 2, 16, 40
SIZES = RewardSizes(28, 14, 24, 2, 4, 20, 2, 4, 48, 130, 40, (12, 8, 6, 4))
DROPOUTS = (1, 3, 5)  # between the linear layers on top


def clip_folder(folder: Path, act: str = "quick_gelu") -> Path:
    """A CLIP in the layout of the Hub, with its tokenizer."""
    tokenizer = clip_tokenizer(folder / "scratch", LENGTH)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    small = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
             "intermediate_size": 4 * WIDTH, "hidden_act": act}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={
            **small, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH,
            "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={**small, "image_size": SIDE, "patch_size": PATCH}, projection_dim=JOINT,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights of these names and shapes."""
    rng = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v, generator=rng) * 0.5 for k, v in shapes.items()}


# ---- HPS v2.1: an open_clip file


def open_clip_state(words: int) -> dict[str, Tensor]:
    """A CLIP's weights, named as open_clip names them."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": ((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.proj": (WIDTH, JOINT),
        "token_embedding.weight": (words, WIDTH),
        "positional_embedding": (LENGTH, WIDTH),
        "text_projection": (WIDTH, JOINT),
        "logit_scale": (),
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    for tower in ("visual.", ""):
        for k in range(LAYERS):
            at = f"{tower}transformer.resblocks.{k}."
            for name in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_proj"):
                shapes |= {f"{at}{name}.weight": (WIDTH,), f"{at}{name}.bias": (WIDTH,)}
            shapes[f"{at}attn.out_proj.weight"] = (WIDTH, WIDTH)
            shapes[f"{at}attn.in_proj_weight"] = (3 * WIDTH, WIDTH)
            shapes[f"{at}attn.in_proj_bias"] = (3 * WIDTH,)
            shapes[f"{at}mlp.c_fc.weight"] = (4 * WIDTH, WIDTH)
            shapes[f"{at}mlp.c_fc.bias"] = (4 * WIDTH,)
            shapes[f"{at}mlp.c_proj.weight"] = (WIDTH, 4 * WIDTH)
    return drawn(shapes, 1)


def hps_folder(folder: Path) -> HPSEncoders:
    """The file of HPS v2.1, small, beside the config and tokenizer of its CLIP."""
    clip_folder(folder, "gelu")
    words = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    state = open_clip_state(words)
    torch.save({"epoch": 1, "state_dict": state}, folder / HPS_FILE)
    (folder / "model.safetensors").unlink()  # nothing else than the file is read
    return HPSEncoders(str(folder), "", tokenizer=(str(folder), ""))


def open_clip_cosines(w: dict[str, Tensor], pixels: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
    """Cosines (N,) by open_clip's formulas, of its weights; `ends` are the places of the end."""
    x = conv2d(pixels, w["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    first = w["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + w["visual.positional_embedding"]
    x = blocks(w, "visual.", normed(w, "visual.ln_pre", x), False)
    image = normed(w, "visual.ln_post", x[:, 0]) @ w["visual.proj"]
    y = blocks(w, "", w["token_embedding.weight"][ids] + w["positional_embedding"], True)
    text = normed(w, "ln_final", y)[torch.arange(len(y)), ends] @ w["text_projection"]
    return torch.cosine_similarity(image, text)


def blocks(w: dict[str, Tensor], tower: str, x: Tensor, causal: bool) -> Tensor:
    for k in range(LAYERS):
        at = f"{tower}transformer.resblocks.{k}."
        h = normed(w, f"{at}ln_1", x)
        q, k_, v = linear(h, w[f"{at}attn.in_proj_weight"], w[f"{at}attn.in_proj_bias"]).chunk(3, 2)
        x = x + dense(w, f"{at}attn.out_proj", attended(q, k_, v, HEADS, causal=causal))
        h = gelu(dense(w, f"{at}mlp.c_fc", normed(w, f"{at}ln_2", x)))
        x = x + dense(w, f"{at}mlp.c_proj", h)
    return x


# ---- ImageReward: BLIP and the layers on top


def reward_state() -> dict[str, Tensor]:
    """ImageReward's weights, named as its authors name them; others of BLIP are there too."""
    s = SIZES
    eyes, read = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{eyes}cls_token": (1, 1, s.picture),
        f"{eyes}pos_embed": (1, (s.image // s.patch) ** 2 + 1, s.picture),
        f"{eyes}patch_embed.proj.weight": (s.picture, 3, s.patch, s.patch),
        f"{eyes}patch_embed.proj.bias": (s.picture,),
        f"{read}embeddings.word_embeddings.weight": (s.words, s.text),
        f"{read}embeddings.position_embeddings.weight": (s.positions, s.text),
        "blip.vision_proj.weight": (8, s.picture),
    }
    layers = [(f"{eyes}norm", s.picture, 0), (f"{read}embeddings.LayerNorm", s.text, 0)]
    for k in range(s.picture_layers):
        at = f"{eyes}blocks.{k}."
        layers += [(f"{at}norm1", s.picture, 0), (f"{at}norm2", s.picture, 0)]
        layers += [(f"{at}attn.qkv", 3 * s.picture, s.picture)]
        layers += [(f"{at}attn.proj", s.picture, s.picture)]
        layers += [(f"{at}mlp.fc1", 4 * s.picture, s.picture)]
        layers += [(f"{at}mlp.fc2", s.picture, 4 * s.picture)]
    for k in range(s.text_layers):
        at = f"{read}encoder.layer.{k}."
        for part, width in (("attention", s.text), ("crossattention", s.picture)):
            layers += [(f"{at}{part}.self.query", s.text, s.text)]
            layers += [(f"{at}{part}.self.{n}", s.text, width) for n in ("key", "value")]
            layers += [(f"{at}{part}.output.dense", s.text, s.text)]
            layers += [(f"{at}{part}.output.LayerNorm", s.text, 0)]
        layers += [(f"{at}intermediate.dense", s.text_inner, s.text)]
        layers += [(f"{at}output.dense", s.text, s.text_inner)]
        layers += [(f"{at}output.LayerNorm", s.text, 0)]
    widths = (s.text, *s.top, 1)
    places = [k for k in range(len(widths) + 2) if k not in DROPOUTS]
    layers += [
        (f"mlp.layers.{k}", n, m) for k, m, n in zip(places, widths, widths[1:], strict=False)
    ]
    for name, rows, columns in layers:
        shapes[f"{name}.weight"] = (rows, columns) if columns else (rows,)
        shapes[f"{name}.bias"] = (rows,)
    return drawn(shapes, 2)


def reward_folder(folder: Path) -> RewardScorer:
    """The file of ImageReward, small, beside a tokenizer of BERT's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(reward_state(), folder / IMAGE_REWARD_FILE)
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(97, 123)]
    words = [*marks, *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return RewardScorer((str(folder), ""), (str(folder), ""), SIZES)


def reward_values(w: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Rewards (N,) by the authors' formulas, of their weights."""
    at, s = "blip.visual_encoder.", SIZES
    x = conv2d(pixels, w[f"{at}patch_embed.proj.weight"], w[f"{at}patch_embed.proj.bias"],
               stride=s.patch).flatten(2).transpose(1, 2)  # fmt: skip
    x = torch.cat([w[f"{at}cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{at}pos_embed"]
    for k in range(s.picture_layers):
        block = f"{at}blocks.{k}."
        q, k_, v = dense(w, f"{block}attn.qkv", normed(w, f"{block}norm1", x, 1e-6)).chunk(3, 2)
        x = x + dense(w, f"{block}attn.proj", attended(q, k_, v, s.picture_heads))
        h = gelu(dense(w, f"{block}mlp.fc1", normed(w, f"{block}norm2", x, 1e-6)))
        x = x + dense(w, f"{block}mlp.fc2", h)
    x, at = normed(w, f"{at}norm", x, 1e-6), "blip.text_encoder."
    y = w[f"{at}embeddings.word_embeddings.weight"][ids]
    y = y + w[f"{at}embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = normed(w, f"{at}embeddings.LayerNorm", y, 1e-12)
    for k in range(s.text_layers):
        block = f"{at}encoder.layer.{k}."
        for part, keys, seen in (("attention", y, mask), ("crossattention", x, None)):
            keys = y if part == "attention" else x
            q = dense(w, f"{block}{part}.self.query", y)
            k_, v = (dense(w, f"{block}{part}.self.{n}", keys) for n in ("key", "value"))
            h = dense(w, f"{block}{part}.output.dense", attended(q, k_, v, s.text_heads, seen))
            y = normed(w, f"{block}{part}.output.LayerNorm", y + h, 1e-12)
        h = dense(w, f"{block}output.dense", gelu(dense(w, f"{block}intermediate.dense", y)))
        y = normed(w, f"{block}output.LayerNorm", y + h, 1e-12)
    z = y[:, 0]
    for k in sorted({int(n.split(".")[2]) for n in w if n.startswith("mlp.")}):
        z = dense(w, f"mlp.layers.{k}", z)
    return (z[:, 0] - ImageRewardNetwork.MEAN) / ImageRewardNetwork.STD


# ---- both


def dense(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def normed(w: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attended(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    seen = None if mask is None else mask[:, None, None, :].bool()
    return scaled_dot_product_attention(q, k, v, seen, is_causal=causal).transpose(1, 2).flatten(2)


def encoders(folder: Path) -> CLIPEncoders:
    """The CLIP of a folder as evaluation reads it."""
    return CLIPEncoders(str(clip_folder(folder)), "")
