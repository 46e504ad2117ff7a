"""Small pipelines that the generic adapter reads; see families.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.helpers import families_a, families_b, vocabularies

# What they are loaded with in tests, where they make large pictures unless told otherwise.
OPTIONS: dict[str, dict[str, Any]] = {
    "auraflow": {"size": 32},
    "chroma": {"size": 24},
    "ernie": {"size": 32},
    "flux2-dev": {"size": 32, "embedded_guidance": 2.5},
    "flux2-klein": {"size": 32},
    "krea2": {"size": 32},
    "longcat": {"size": 32},
}
ROPE: Any = (8, 4, 4)
CONFIGS: Any = transformers  # whose configs take settings of any type
SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
LANGUAGE = families_b.LANGUAGE


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def auraflow(root: Path) -> None:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = vocabularies.t5([*words, *((c, -3.0) for c in families_b.LETTERS)])
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        vae=families_a.kl_vae(scaling_factor=0.13025),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16,
            caption_projection_dim=32, pos_embed_max_size=1024, **SMALL,
        ),
        scheduler=flow(shift=1.73),
    ).save_pretrained(root)  # fmt: skip


def chroma(root: Path) -> None:
    tokenizer, encoder = families_a.t5()
    diffusers.ChromaPipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=1.0),
        vae=families_a.kl_vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
            approximator_layers=1, **SMALL,
        ),
    ).save_pretrained(root)  # fmt: skip


def flux2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        sample_size=32, layers_per_block=1,
    )  # fmt: skip
    vae.bn.running_mean = torch.randn(16)
    vae.bn.running_var = torch.rand(16) + 0.5
    return vae.eval()


def flux2_network(width: int, guided: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, joint_attention_dim=3 * width,
        axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, guidance_embeds=guided, **SMALL,
    )  # fmt: skip


def flux2_dev(root: Path) -> None:
    """Its text encoder's layers 10, 20 and 30 are read."""
    tokenizer = families_b.qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]"]})
    template = (
        "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text }}{% endfor %}"
        "{% endfor %}"
    )
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(patch_size={"height": 4, "width": 4}),
        tokenizer=tokenizer,
        patch_size=4,
        image_end_token="[IMG_BREAK]",
        chat_template=template,
    )
    text = {**LANGUAGE, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 30,
            "head_dim": 4, "vocab_size": len(tokenizer)}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = CONFIGS.Mistral3Config(
        text_config=CONFIGS.MistralConfig(**text),
        vision_config=CONFIGS.PixtralVisionConfig(**vision),
    )
    diffusers.Flux2Pipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=processor,  # pyright: ignore
        transformer=flux2_network(8, guided=True),
    ).save_pretrained(root)


def flux2_klein(root: Path) -> None:
    """Its text encoder's layers 9, 18 and 27 are read."""
    tokenizer = families_b.qwen_tokenizer()
    sizes = {**LANGUAGE, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 27}
    config = CONFIGS.Qwen3Config(**sizes, vocab_size=len(tokenizer), head_dim=4)
    diffusers.Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=transformers.Qwen3ForCausalLM(config).eval(),
        tokenizer=tokenizer,
        transformer=flux2_network(8, guided=False),
    ).save_pretrained(root)


def hunyuan(root: Path) -> None:
    scratch = root / "scratch"
    scratch.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *families_b.LETTERS]
    words += [f"##{c}" for c in families_b.LETTERS]
    (scratch / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(scratch / "vocab.txt"))
    bert = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    tokenizer_2, encoder_2 = families_a.t5()
    network = diffusers.HunyuanDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=4,
        cross_attention_dim=16, cross_attention_dim_t5=32, pooled_projection_dim=16, **SMALL,
    )  # fmt: skip
    diffusers.HunyuanDiTPipeline(
        vae=families_b.kl_vae(4, shift=0.0),
        text_encoder=transformers.BertModel(bert).eval(),
        tokenizer=tokenizer,
        transformer=network,
        scheduler=diffusers.DDPMScheduler(  # pyright: ignore
            beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", clip_sample=False,
            prediction_type="v_prediction", steps_offset=1,
        ),
        safety_checker=None,  # pyright: ignore
        feature_extractor=None,  # pyright: ignore
        requires_safety_checker=False,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(root)  # fmt: skip


def longcat(root: Path) -> None:
    tokenizer = families_b.qwen_tokenizer()
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
    )
    diffusers.LongCatImagePipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=1.0),
        vae=families_b.kl_vae(2, latent=16),
        text_encoder=families_b.qwen_vl(tokenizer),
        tokenizer=tokenizer,
        text_processor=processor,
        transformer=diffusers.LongCatImageTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=2, joint_attention_dim=16,
            pooled_projection_dim=16, axes_dims_rope=[4, 4, 8], **SMALL,
        ),
    ).save_pretrained(root)  # fmt: skip


def krea2(root: Path) -> None:
    tokenizer = families_b.qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = CONFIGS.Qwen3VLConfig(
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), "head_dim": 8,
                     "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "out_hidden_size": 16, "deepstack_visual_indexes": [0],
                       "num_position_embeddings": 16},
    )  # fmt: skip
    network = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, num_key_value_heads=1, intermediate_size=16,
        timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6), **SMALL,
    )  # fmt: skip
    diffusers.Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=families_b.qwen_vae(),
        text_encoder=transformers.Qwen3VLModel(config).eval(),
        tokenizer=tokenizer,
        transformer=network,
        text_encoder_select_layers=(1, 2),
    ).save_pretrained(root)


def ernie(root: Path) -> None:
    tokenizer = families_b.qwen_tokenizer()
    text = {**LANGUAGE, "head_dim": 8, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = CONFIGS.Mistral3Config(
        text_config=CONFIGS.MistralConfig(**text),
        vision_config=CONFIGS.PixtralVisionConfig(**vision),
    )
    network = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16,
        out_channels=16, text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    for layer in (network.adaLN_modulation[-1], network.final_linear):  # zeros in a new network
        torch.nn.init.normal_(layer.weight, std=0.05)  # pyright: ignore
    diffusers.ErnieImagePipeline(
        transformer=network,
        vae=flux2_vae(),
        text_encoder=transformers.Mistral3Model(config).eval(),
        tokenizer=tokenizer,
        scheduler=flow(shift=4.0),
    ).save_pretrained(root)  # fmt: skip


def hidream(root: Path) -> None:
    """Its pipeline samples 128 × 128 cells only, so its patches are large and its VAE flat."""
    tokenizer, encoder = families_a.clip(root / "scratch", True, length=128)
    tokenizer_2, encoder_2 = families_a.clip(root / "scratch", True, length=128)
    tokenizer_3, encoder_3 = families_a.t5()
    tokenizer_4 = families_b.qwen_tokenizer()
    sizes = {**LANGUAGE, "hidden_size": 32, "head_dim": 8, "vocab_size": len(tokenizer_4)}
    llama = CONFIGS.LlamaConfig(**sizes, attn_implementation="eager")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), latent_channels=4,
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=2, layers_per_block=1,
        mid_block_add_attention=False, scaling_factor=0.36, shift_factor=0.12,
    ).eval()  # fmt: skip
    network = diffusers.HiDreamImageTransformer2DModel(
        patch_size=8, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        caption_channels=[32, 32], text_emb_dim=64, axes_dims_rope=ROPE, llama_layers=[0, 1],
        max_resolution=(128, 128), num_routed_experts=2, num_activated_experts=1, **SMALL,
    )  # fmt: skip
    diffusers.HiDreamImagePipeline(
        scheduler=diffusers.UniPCMultistepScheduler(  # pyright: ignore
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=transformers.LlamaForCausalLM(llama).eval(),
        tokenizer_4=tokenizer_4,
        transformer=network,
    ).save_pretrained(root)


def kolors(root: Path) -> None:
    """Not among FAMILIES: its tokenizer needs sentencepiece."""
    import string

    import sentencepiece  # pyright: ignore[reportMissingImports]
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    from tests.helpers import families

    scratch = root / "scratch"
    scratch.mkdir(parents=True)
    letters = string.ascii_letters + string.digits
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{c} {string.ascii_lowercase}" for c in letters]),
        model_prefix=str(scratch / "letters"), vocab_size=90, model_type="char",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=128, hidden_size=16, ffn_hidden_size=16, kv_channels=8,
        num_attention_heads=2, seq_length=256, multi_query_attention=True,
        multi_query_group_num=1, add_qkv_bias=True, original_rope=True,
    )  # fmt: skip
    encoder = ChatGLMModel(config).eval()
    for p in encoder.parameters():  # they are created without values
        torch.nn.init.normal_(p, std=0.1)
    depths: dict[str, Any] = {"attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2)}
    scheduler: Any = diffusers.EulerDiscreteScheduler(**families.BETAS, timestep_spacing="leading")
    diffusers.KolorsPipeline(
        vae=families_a.kl_vae(scaling_factor=0.13025),
        text_encoder=encoder,
        tokenizer=ChatGLMTokenizer(vocab_file=str(scratch / "letters.model")),
        unet=diffusers.UNet2DConditionModel(
            cross_attention_dim=16, encoder_hid_dim=16, encoder_hid_dim_type="text_proj",
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16, **depths, **families.UNET,
        ),
        scheduler=scheduler,
    ).save_pretrained(root)  # fmt: skip


FAMILIES: dict[str, Callable[[Path], None]] = {
    "auraflow": auraflow,
    "chroma": chroma,
    "ernie": ernie,
    "flux2-dev": flux2_dev,
    "flux2-klein": flux2_klein,
    "hidream": hidream,
    "hunyuan": hunyuan,
    "krea2": krea2,
    "longcat": longcat,
}
