"""Small pipelines of the later families, prompted by language models; see families.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers

from tests.helpers import vocabularies

LETTERS = [chr(c) for c in range(33, 127)]
# What they are loaded with in tests, where they make large pictures unless told otherwise.
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen": {"size": 32},
    "zimage": {"size": 32},
    "wan": {"size": 32, "frames": 5},
}
MEAN, STD = [0.3, -0.2, 0.1, 0.5], [1.5, 0.7, 1.1, 2.0]


def gemma() -> tuple[Any, Any]:
    """A Gemma 2 of single characters: tokenizer and encoder."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    words += [f"<0x{i:02X}>" for i in range(256)]
    vocab = {w: i for i, w in enumerate(words)}
    tokenizer = vocabularies.gemma(vocab)
    config = transformers.Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip
    return tokenizer, transformers.Gemma2Model(config).eval()


def qwen_tokenizer() -> Any:
    """A Qwen tokenizer of single bytes, with a chat template."""
    letters = [*LETTERS, "Ġ", "Ċ"]  # byte-level names of the space and the line's end
    tokenizer = vocabularies.qwen({w: i for i, w in enumerate(letters)})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


LANGUAGE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip


def kl_vae(levels: int, latent: int = 4, shift: float = 0.12, **more: Any) -> Any:
    blocks: dict[str, Any] = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return diffusers.AutoencoderKL(
        latent_channels=latent, norm_num_groups=4, sample_size=32, scaling_factor=0.36,
        shift_factor=shift, **blocks, **more,
    ).eval()  # fmt: skip


def sana(root: Path) -> None:
    tokenizer, encoder = gemma()
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, scaling_factor=0.41,
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        encoder_block_types=("ResBlock",) * 2 + ("EfficientViTBlock",),  # pyright: ignore
        decoder_block_types=("ResBlock",) * 2 + ("EfficientViTBlock",),  # pyright: ignore
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate", downsample_block_type="stride_conv",
    ).eval()  # fmt: skip
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=8, timestep_scale=0.5,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    diffusers.SanaPipeline(tokenizer, encoder, vae, network, scheduler).save_pretrained(root)


def lumina(root: Path, **shifting: Any) -> None:
    tokenizer, encoder = gemma()
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 16, 16), cap_feat_dim=16,
    )  # fmt: skip
    diffusers.Lumina2Pipeline(
        network,
        diffusers.FlowMatchEulerDiscreteScheduler(**shifting or {"shift": 6.0}),
        kl_vae(4),
        encoder,
        tokenizer,
    ).save_pretrained(root)


def qwen_vl(tokenizer: Any, **tokens: Any) -> Any:
    """A Qwen2.5-VL that encodes prompts; `tokens` are the ids of special ones."""
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "fullatt_block_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    named = {"rope_scaling": rope} if vocabularies.OLDER else {"rope_parameters": rope}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), **named},
        vision_config=vision,
        **tokens,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_vae(levels: int = 1) -> Any:
    """A video autoencoder that halves sides `levels` times; images are videos of one frame."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1] * (levels + 1), num_res_blocks=1,
        temperal_downsample=[False] * levels,
        latents_mean=MEAN, latents_std=STD,
    ).eval()  # fmt: skip


def qwen_network() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip


def qwen(root: Path) -> None:
    tokenizer = qwen_tokenizer()
    vae = qwen_vae()
    network = qwen_network()
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=vae,
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=network,
    ).save_pretrained(root)  # fmt: skip


def zimage(root: Path) -> None:
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen3Config(**LANGUAGE, vocab_size=len(tokenizer), head_dim=8)
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 2, 2], axes_lens=[640, 32, 32],
    )  # fmt: skip
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(3),
        text_encoder=transformers.Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=network,
    ).save_pretrained(root)


def wan(root: Path) -> None:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(c, -3.0) for c in LETTERS]
    tokenizer = vocabularies.t5(words)
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, latents_mean=MEAN,
        temperal_downsample=[False, True], latents_std=STD, scale_factor_temporal=2,
        scale_factor_spatial=4,
    ).eval()  # fmt: skip
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(  # pyright: ignore
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=network,
    ).save_pretrained(root)


FAMILIES = {"sana": sana, "lumina": lumina, "qwen": qwen, "zimage": zimage, "wan": wan}
