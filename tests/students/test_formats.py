"""LoRA files and single files: round trips, and stock diffusers drawing the student's pictures."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import single_file_utils as theirs
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file

from students.export import formats
from students.export.folder import ExportError
from tests.helpers import preloaded
from tests.helpers.formats import sd15
from tests.helpers.refusals import refused

# every kind of layer that the UNets have weights to adapt in
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "conv_in",
           "conv_out", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv",
           "upsamplers.0.conv", "ff.net.0.proj", "ff.net.2", "linear_1", "linear_2"]  # fmt: skip


def adapted(unet, rank=2, alpha=6.0, targets=TARGETS):
    """PEFT's state of a random adapter, its scale, and the UNet with it merged in."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    model = inject_adapter_in_model(config, deepcopy(unet))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    for module in list(model.modules()):
        if "lora" in type(module).__module__ and "merge" in dir(module):
            module.merge()
    merged = deepcopy(unet)
    weights = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    merged.load_state_dict({k: v for k, v in weights.items() if "lora_" not in k})
    return state, alpha / rank, merged


@pytest.fixture(scope="module")
def lora(pipe):
    state, scale, merged = adapted(pipe.unet)
    student = type(pipe)(**{**pipe.components, "unet": merged})
    student.set_progress_bar_config(disable=True)
    few = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    images = [p("a red circle", generator=torch.Generator().manual_seed(0), **few).images
              for p in (pipe, student)]  # fmt: skip
    assert (images[0] - images[1]).abs().max() > 0.01  # or comparing pictures would show nothing
    return formats.diffusers_lora(state, scale), student


def names_for(pipe):
    """LDM's names where kohya uses them."""
    if type(pipe) is StableDiffusionPipeline:
        return None
    modules = [n for n, m in pipe.unet.named_modules() if "weight" in dict(m.named_parameters())]
    kept = [n for n in modules if "lora" not in n]
    return formats.ldm_names(kept, pipe.unet.config)


# ---- LoRA


def test_stock_diffusers_draws_the_merged_student_from_every_file(pipe, lora, folder, tmp_path):
    """At strength 1.0, in another process, at one and two steps."""
    state, student = lora
    kohya = formats.to_kohya(state, names_for(pipe))
    files = [
        formats.File(tmp_path / formats.LORA, state),
        formats.File(tmp_path / "kohya.safetensors", kohya),
        formats.File(tmp_path / "whole.safetensors", formats.single_file(student), whole=True),
    ]
    # one in a process of its own, as outside the tests
    with preloaded.real() if type(pipe) is StableDiffusionXLPipeline else nullcontext():
        formats.write(files, student, folder, [1, 2])  # compares
    assert {p.name for p in tmp_path.iterdir()} == {f.path.name for f in files}
    assert load_file(tmp_path / "kohya.safetensors").keys() == kohya.keys()
    block = "input_blocks_4_1" if isinstance(pipe, StableDiffusionXLPipeline) else (
        "down_blocks_0_attentions_0"
    )  # fmt: skip
    assert f"lora_unet_{block}_proj_in.lora_down.weight" in kohya


def test_the_file_alone_says_what_strength_one_is(pipe):
    """W + (alpha / rank) up down, which is what ComfyUI adds at strength 1.0."""
    state, scale, merged = adapted(pipe.unet)
    kohya = formats.to_kohya(formats.diffusers_lora(state, scale), names_for(pipe))
    name = formats.kohya_name(
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", names_for(pipe)
    )
    up, down = (kohya[f"{name}.lora_{side}.weight"] for side in ("up", "down"))
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = pipe.unet.get_submodule(module).weight
    after = before + kohya[f"{name}.alpha"] / down.shape[0] * up @ down
    torch.testing.assert_close(after, merged.get_submodule(module).weight)
    assert (after - before).abs().max() > 0.1


def test_kohyas_keys_come_back_as_they_went(pipe, lora):
    state, _ = lora
    names = names_for(pipe)
    modules = [n for n, _ in pipe.unet.named_modules()]
    again = formats.from_kohya(formats.to_kohya(state, names), modules, names)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], v) for k, v in state.items())


def test_another_alpha_is_folded_in_when_a_kohya_file_is_read(pipe, lora):
    state, _ = lora
    names = names_for(pipe)
    kohya = formats.to_kohya(state, names)
    halved = {k: v / 2 if k.endswith(".alpha") else v for k, v in kohya.items()}
    again = formats.from_kohya(halved, [n for n, _ in pipe.unet.named_modules()], names)
    key = next(k for k in state if "lora_B" in k)
    torch.testing.assert_close(again[key], state[key] / 2)


@pytest.mark.slow
def test_a_file_that_is_not_the_students_is_refused_and_leaves_nothing(
    pipe, lora, folder, tmp_path
):
    """A single file that is another student's is refused, and nothing of it is left."""
    if type(pipe) is StableDiffusionXLPipeline:
        pytest.skip("one pipeline is enough")
    state, student = lora
    wrong = {k: 1.5 * v if "lora_B" in k else v for k, v in state.items()}
    files = [
        formats.File(tmp_path / "right.safetensors", state),
        formats.File(tmp_path / "wrong.safetensors", wrong),
    ]
    with pytest.raises(ExportError, match=r"wrong\.safetensors differs from the student"):
        formats.write(files, student, folder, [2])
    assert list(tmp_path.iterdir()) == []


def test_a_transformers_lora_keeps_diffusers_names_and_has_the_scale_in_it():
    adapter = {
        "base_model.model.blocks.0.to_q.lora_A.default.weight": torch.ones(2, 3),
        "base_model.model.blocks.0.to_q.lora_B.default.weight": torch.ones(3, 2),
    }
    made = formats.diffusers_lora(adapter, 0.5, "transformer")
    assert set(made) == {f"transformer.blocks.0.to_q.lora_{k}.weight" for k in "AB"}
    assert made["transformer.blocks.0.to_q.lora_B.weight"].unique().tolist() == [0.5]
    with refused("LoRA", "UNet"):
        formats.to_kohya(made)


def test_stock_flux_draws_the_merged_student_from_a_transformers_lora(tmp_path):
    """A transformer family through its own loader, in this process."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    )  # fmt: skip
    state, scale, merged = adapted(network, targets=["to_q", "to_out.0", "proj_out", "proj_mlp"])
    x = {"hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8),
         "pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5]),
         "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}  # fmt: skip
    before = network(**x).sample
    made = formats.diffusers_lora(state, scale, "transformer")
    loaded, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(made), return_alphas=True)
    FluxLoraLoaderMixin.load_lora_into_transformer(loaded, alphas, network)
    torch.testing.assert_close(network(**x).sample, merged(**x).sample, atol=1e-4, rtol=1e-4)
    assert (network(**x).sample - before).abs().max() > 1e-2


@pytest.mark.parametrize("key", ["a.lora_magnitude_vector.weight", "a.hada_w1_a", "a.weight"])
def test_what_is_not_plain_lora_is_named(key):
    with refused("LoRA", "LoRA"):
        formats.diffusers_lora({key: torch.ones(1)}, 1.0)


def test_half_a_lora_is_named():
    with refused("LoRA", "unet.a.lora_A.weight"):
        formats.diffusers_lora({"a.lora_A.weight": torch.ones(1, 1)}, 1.0)


def test_a_kohya_key_of_another_model_is_named(pipe):
    with refused("LoRA", "lora_unet_nowhere.lora_down.weight"):
        formats.from_kohya({"lora_unet_nowhere.lora_down.weight": torch.ones(1, 1)}, ["conv_in"])


# ---- single files


def test_diffusers_own_converters_undo_ours(pipe):
    """Every weight, and none besides, comes back: UNet, VAE, both kinds of text encoder."""
    state = formats.single_file(pipe)
    unet = theirs.convert_ldm_unet_checkpoint(dict(state), pipe.unet.config)
    vae = theirs.convert_ldm_vae_checkpoint(dict(state), pipe.vae.config)
    for ours, again in ((pipe.unet.state_dict(), unet), (pipe.vae.state_dict(), vae)):
        assert ours.keys() == again.keys()
        assert all(torch.equal(ours[k], again[k].reshape(ours[k].shape)) for k in ours)
    prefix = "cond_stage_model." if type(pipe) is StableDiffusionPipeline else "conditioner."
    prefixes = ("model.diffusion_model.", "first_stage_model.", prefix)
    assert all(k.startswith(prefixes) for k in state)


def test_names_are_those_of_the_published_checkpoints():
    """Landmarks of v1-5-pruned and of sd_xl_base_1.0."""
    old = {"layers_per_block": 2, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    new = {"layers_per_block": 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]}
    pairs = [
        (old, "down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        (old, "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        (old, "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        (old, "up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
        (old, "mid_block.resnets.1.conv1.bias", "middle_block.2.in_layers.2.bias"),
        (new, "add_embedding.linear_2.weight", "label_emb.0.2.weight"),
        (new, "down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k.weight",
         "input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight"),
    ]  # fmt: skip
    for config, name, expected in pairs:
        assert formats.ldm_names([name], config) == {name: expected}


@pytest.mark.parametrize("name", ["class_embedding.weight", "down_blocks.0.motion_modules.0.x",
                                  "mid_block.resnets.2.conv1.weight"])  # fmt: skip
def test_a_part_that_ldm_has_not_is_named(name):
    config = {"layers_per_block": 2, "up_block_types": ["UpBlock2D"]}
    with refused("single file", name):
        formats.ldm_names([name], config)


def test_other_pipelines_have_no_single_file(pipe, tmp_path):
    other = sd15(tmp_path)
    other.text_encoder.config.hidden_act = "gelu"  # SD 2.x
    with refused("single file", "1"):
        formats.single_file(other)
