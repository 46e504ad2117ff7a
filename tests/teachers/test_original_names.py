"""Single files of SD 3 and FLUX.1 by their original names: each is its folder's teacher."""

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_files

from students import schedulers
from students.export.folder import rehearse
from students.export.formats import vae_to_ldm
from students.lora import Adapter
from teachers import load
from teachers.storage import bfl
from teachers.storage import single_files as single_file_storage
from teachers.storage.packed import decoded
from tests.helpers import families, families_a, packed, single_files
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused
from tests.teachers.test_single_files import bare

PIPELINES = {
    "sd3": lambda root: families_a.sd3(root, False, 40),
    "sd3.5": lambda root: families_a.sd3(root, True, 40),
    "flux-dev": lambda root: families_a.flux(root, True),
    "flux-schnell": lambda root: families_a.flux(root, False),
}
OPTIONS = {k: v for k, v in families.OPTIONS.items() if k in PIPELINES}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each family, and its pipeline."""
    root = tmp_path_factory.mktemp("names")
    found = {}
    for name, build in PIPELINES.items():
        torch.manual_seed(0)
        build(root / name)
        teacher = load(str(root / name), **OPTIONS.get(name, {}))
        if name.startswith("sd3"):  # Stability's first encoder has no projection of its own
            width = teacher.codec.pipe.text_encoder.text_projection.weight
            width.data.copy_(torch.eye(len(width)))
            teacher.codec.pipe.text_encoder.save_pretrained(root / name / "text_encoder")
        found[name] = (root / name, teacher)
    return found


def same(ours, theirs, parts=("transformer", "vae", "text_encoder", "text_encoder_2")):
    for part in (*parts, "text_encoder_3"):
        one, other = (getattr(t.codec.pipe, part, None) for t in (ours, theirs))
        assert (one is None) == (other is None), part
        if other is not None:
            mine, state = one.state_dict(), other.state_dict()
            assert mine.keys() == state.keys()
            for k, v in state.items():
                torch.testing.assert_close(mine[k], v, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_file_of_all_parts_is_the_teacher_of_its_folder(made, name, tmp_path):
    """Every weight of every part, from the file alone, and the conditions of captions."""
    folder, theirs = made[name]
    vae = "vae." if name.startswith("flux") else "first_stage_model."
    file = single_files.save(single_files.whole(theirs.codec.pipe, vae), tmp_path / "a.safetensors")
    settings = bare(folder, tmp_path / "settings")
    ours = load(file, config=str(settings), **OPTIONS.get(name, {}))
    same(ours, theirs)
    assert ours.shape == theirs.shape
    assert ours.denoiser.process == theirs.denoiser.process
    for one, other in zip(ours.codec.condition(["cat"]).values(),
                          theirs.codec.condition(["cat"]).values(), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", single_files.NETWORK])
@pytest.mark.parametrize("name", ["sd3.5", "flux-dev"])
def test_a_file_of_the_network_alone_takes_the_rest_from_the_folder(made, name, prefix, tmp_path):
    """With and without the prefix; its student is sampled by the stock pipeline."""
    folder, theirs = made[name]
    state = {f"{prefix}{k}": v for k, v in single_files.network(theirs.codec.pipe).items()}
    file = single_files.save(state, tmp_path / "network.safetensors")
    ours = load(file, config=str(folder), **OPTIONS.get(name, {}))
    same(ours, theirs)
    if prefix:
        student = schedulers.student(ours, 2, None, True, Adapter(rank=2))
        rehearse(disturbed(student).eval(), ours)


@pytest.mark.parametrize("name", ["sd3", "flux-schnell"])
def test_plain_fp8_weights_are_read_as_they_are(made, name, tmp_path):
    folder, theirs = made[name]
    state = {
        f"{single_files.NETWORK}{k}": v.to(torch.float8_e4m3fn)
        for k, v in single_files.network(theirs.codec.pipe).items()
    }
    file = single_files.save(state, tmp_path / "fp8.safetensors")
    ours = load(file, config=str(folder), precision="bf16", **OPTIONS.get(name, {}))
    expected = theirs.denoiser.backbone.state_dict()
    for k, v in ours.denoiser.backbone.state_dict().items():
        assert torch.equal(v, expected[k].to(torch.float8_e4m3fn).to(v.dtype)), k


@pytest.mark.parametrize(("kind", "names"), [("sd3.5", "stability"), ("flux-dev", "bfl")])
def test_diffusers_converter_gives_the_same_names(made, kind, names):
    """Of FLUX.1 at its own width, which the converter assumes; one column of each weight."""
    state = made[kind][1].denoiser.backbone.state_dict()
    if kind == "flux-dev":
        state = {k: torch.randn(wide(k, v), *(1,) * (v.ndim - 1)) for k, v in state.items()}
        convert = diffusers_files.convert_flux_transformer_checkpoint_to_diffusers
    else:
        convert = diffusers_files.convert_sd3_transformer_checkpoint_to_diffusers
    file = getattr(single_files, names)(state)
    found = convert({f"{single_files.NETWORK}{k}": v for k, v in file.items()})
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], v) for k, v in state.items())
    if kind == "flux-dev":
        again = bfl.ours({f"{single_files.NETWORK}{k}": v for k, v in file.items()})
        assert again.keys() == state.keys()
        assert all(torch.equal(again[k], v) for k, v in state.items())


def wide(name, weight):
    """The rows that a FLUX.1 32 wide has at its own width of 3072; norms of heads keep theirs."""
    outside = weight.ndim == 1 and ".attn.norm" in name
    return len(weight) if outside or name.startswith("proj_out") else len(weight) * 96


def test_weights_that_a_file_holds_are_not_downloaded_with_its_settings():
    """FLUX.1's second encoder is T5, and SDXL's and SD 3's another CLIP."""
    network, t5, clip_g = ("double_blocks.0.img_attn.qkv.weight",
                           "text_encoders.t5xxl.transformer.shared.weight",
                           "text_encoders.clip_g.transformer.text_projection.weight")  # fmt: skip
    shard = "text_encoder_2/model-00001-of-00002.safetensors"
    for names, held in (([network, t5], True), ([network], False), ([t5], False),
                        (["joint_blocks.0.x", t5, clip_g], True)):  # fmt: skip
        assert single_file_storage.held_weights(shard, names) == held
        assert not single_file_storage.held_weights("text_encoder_2/config.json", names)
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    assert single_file_storage.held_weights(index, [network])


# ---- refusals


def changed(made, name, path, change):
    state = {f"{single_files.NETWORK}{k}": v.clone()
             for k, v in single_files.network(made[name][1].codec.pipe).items()}  # fmt: skip
    change(state)
    return single_files.save(state, path / "changed.safetensors")


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("sd3", "joint_blocks.1.x_block.attn.qkv.weight"),
        ("sd3", "final_layer.linear.bias"),
        ("flux-dev", "double_blocks.0.img_attn.qkv.weight"),
        ("flux-dev", "img_in.weight"),
        ("flux-dev", "single_blocks.1.norm.key_norm.scale"),
    ],
)
def test_a_missing_weight_is_refused(made, name, lacking, tmp_path):
    file = changed(made, name, tmp_path, lambda s: s.pop(f"{single_files.NETWORK}{lacking}"))
    with refused("teacher '*'", "changed.safetensors"):
        load(file, config=str(made[name][0]), **OPTIONS.get(name, {}))


def test_weights_of_other_networks_are_refused(made, tmp_path):
    extra = {f"{single_files.NETWORK}distilled_guidance_layer.norms.0.scale": torch.ones(4)}
    file = changed(made, "flux-dev", tmp_path, lambda s: s.update(extra))
    with refused("teacher '*'", "distilled_guidance_layer", "FLUX.1"):
        load(file, config=str(made["flux-dev"][0]), **OPTIONS["flux-dev"])
    extra = {f"{single_files.NETWORK}joint_blocks.0.x_block.attn.other.weight": torch.ones(4)}
    file = changed(made, "sd3", tmp_path, lambda s: s.update(extra))
    with refused("teacher '*'", "attn.other", "SD 3"):
        load(file, config=str(made["sd3"][0]))


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_a_file_without_the_pipelines_network_is_refused(made, name, tmp_path):
    """The settings' folder has one, which is another model's."""
    state = {
        f"vae.{k}": v for k, v in vae_to_ldm(made[name][1].codec.pipe.vae.state_dict()).items()
    }
    file = single_files.save(state, tmp_path / "vae.safetensors")
    with refused("teacher '*/vae.safetensors'", "transformer", "config"):
        load(file, config=str(made[name][0]), **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "config", "fault"),
    [
        ("flux-dev", "flux-schnell", "guidance_embedder"),
        ("sd3.5", "sd3", "norm_added_k"),
        ("sd3", "sd3.5", "norm_added_k"),
        ("flux-dev", "sd3", "single_transformer_blocks"),
        ("sd3", "flux-dev", "pos_embed"),
    ],
)
def test_a_config_of_another_network_is_refused(made, name, config, fault, tmp_path):
    """Diffusers drops the weights that the config has no place for."""
    file = changed(made, name, tmp_path, lambda s: None)
    with refused("teacher '*'", "config", fault):
        load(file, config=str(made[config][0]))


@pytest.mark.parametrize("key", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_scaled_fp8_is_decoded(made, name, key, tmp_path):
    """As in ComfyUI's files: a scale for each layer, one for its inputs, and a mark."""
    folder, theirs = made[name]
    state = {f"{single_files.NETWORK}scaled_fp8": torch.empty(0)}
    for k, v in single_files.network(theirs.codec.pipe).items():
        state[f"{single_files.NETWORK}{k}"] = v
        if v.ndim == 2:
            scale, stem = v.abs().max() / 448, f"{single_files.NETWORK}{k.removesuffix('weight')}"
            state[f"{single_files.NETWORK}{k}"] = (v / scale).to(torch.float8_e4m3fn)
            state |= {f"{stem}{key}": scale, f"{stem}scale_input": torch.ones(())}
    file = single_files.save(state, tmp_path / "scaled.safetensors")
    ours = load(file, config=str(folder), **OPTIONS.get(name, {})).denoiser.backbone.state_dict()
    for k, v in theirs.denoiser.backbone.state_dict().items():
        assert (ours[k] - v).norm() <= 0.04 * v.norm(), k


def test_four_bits_of_bitsandbytes_are_decoded(made, tmp_path):
    """A network of FLUX.1 in one file, each layer by bitsandbytes' stored tensors."""
    folder, theirs = made["flux-dev"]
    state, exact = {}, {}
    for k, v in single_files.network(theirs.codec.pipe).items():
        parts = packed.four_bits(k, v, "nf4", True) if v.ndim == 2 else {k: v}
        state |= parts
        exact |= decoded(parts, torch.float32)
    file = single_files.save(state, tmp_path / "nf4.safetensors")
    ours = load(file, config=str(folder), **OPTIONS["flux-dev"]).denoiser.backbone.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in bfl.ours(exact).items())


@pytest.mark.parametrize("encoder", ["text_encoders.t5xxl.", "vae."])
def test_scaled_weights_of_other_parts_are_refused(made, encoder, tmp_path):
    """Diffusers would drop their scales, and the weights be wrong."""
    extra = {f"{encoder}transformer.shared.scale_weight": torch.ones(())}
    file = changed(made, "flux-dev", tmp_path, lambda s: s.update(extra))
    with refused("teacher '*'", "scale_weight", "precision"):
        load(file, config=str(made["flux-dev"][0]), **OPTIONS["flux-dev"])


def quantised(state, name, text):
    """A weight with settings of 4 bits, which are of this text."""
    settings = torch.tensor(list(text), dtype=torch.uint8)
    scales = {f"{name}.absmax": torch.ones(1), f"{name}.quant_map": torch.ones(16)}
    return {**state, **scales, f"{name}.quant_state.bitsandbytes__nf4": settings}


QKV = {
    "flux-schnell": "double_blocks.0.img_attn.qkv.weight",
    "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
}
DAMAGED = {
    "a number": lambda s, k: {**s, k: torch.tensor(1.0)},
    "a third": lambda s, k: {**s, k: s[k][:5]},
    "integers": lambda s, k: {**s, k: (100 * s[k]).to(torch.int8)},
    "no settings": lambda s, k: quantised(s, k, b'{"shape": [4'),
    "no codes": lambda s, k: quantised(s, k, b'{"shape": [4, 4], "blocksize": 64}'),
    "wrong scales": lambda s, k: {
        **s, k: s[k].to(torch.float8_e4m3fn), k.replace("weight", "scale_weight"): torch.ones(7)
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
@pytest.mark.parametrize("name", QKV)
def test_damaged_weights_of_a_file_are_refused_in_one_line(made, name, fault, tmp_path):
    folder, teacher = made[name]
    state = DAMAGED[fault](single_files.network(teacher.codec.pipe), QKV[name])
    file = single_files.save(state, tmp_path / "a.safetensors")
    with refused("teacher '*'"):
        load(file, config=str(folder), **OPTIONS.get(name, {}))
