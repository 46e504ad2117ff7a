"""LoRA files in a teacher's weights: every key format, scales, refusals."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from distill.data.fingerprint import fingerprint
from teachers import load
from teachers.errors import UserError
from teachers.quantised import decode, encode
from tests.helpers import families, packed
from tests.helpers import lora_formats as formats

AB = ("{}.lora_A.weight", "{}.lora_B.weight")
ATTENTION = r".*attn\d?\.(to_[qkv]|to_out\.0)"
UNET = rf"{ATTENTION}|.*(proj_in|proj_out|conv1|net\.2)"
ENCODER = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a family's small pipeline, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = families.build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def loaded(folder, name, *files, **options):
    adapters = [{"file": str(file), "strength": s} for file, s in files]
    options = {**families.OPTIONS.get(name, {}), **options}
    return load(str(folder), **options, **({"adapters": adapters} if adapters else {}))


def changes(teacher, plain, part):
    """By layer, how a component's weights differ from those without LoRA files."""
    pipes = teacher.codec.pipe, plain.codec.pipe
    mine, base = (getattr(pipe, part).state_dict() for pipe in pipes)
    moved = {k: v - base[k] for k, v in mine.items() if not torch.equal(v, base[k])}
    return {k.removesuffix(".weight"): v for k, v in moved.items()}


def check(found, expected, scale):
    """The layers that changed are those expected, by their change to 1e-6."""
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], scale * change, atol=1e-6, rtol=0)


def dense(pairs):
    return {
        k: (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        for k, (down, up) in pairs.items()
    }


def old_names(pairs, prefix):
    """diffusers' keys before PEFT: processors of attention layers."""
    state = {}
    for name, (down, up) in pairs.items():
        if match := re.fullmatch(r"(.*)\.(to_[qkv]|to_out)(\.0)?", name):
            key = f"{prefix}.{match[1]}.processor.{match[2]}_lora"
        else:
            key = f"{prefix}.{name}.lora"
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return state


UNETS = {
    "diffusers": (lambda net, p: formats.peft(p, "unet"), 1.0),
    "peft": (lambda net, p: formats.peft(p, "base_model.model"), 1.0),
    "old": (lambda net, p: old_names(p, "unet"), 1.0),
    "kohya": (lambda net, p: formats.kohya(p, "lora_unet", 1.0), 0.5),
    "kohya-ldm": (lambda net, p: formats.kohya(formats.by_ldm(net, p), "lora_unet", 4.0), 2.0),
    "comfyui": (lambda net, p: formats.peft(formats.by_ldm(net, p), "diffusion_model"), 1.0),
}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", UNETS)
def test_unets(kind, name, folders, tmp_path, capsys):
    plain = loaded(folders(name), name)
    network = plain.codec.pipe.unet
    pairs = formats.factors(network, formats.layers_of(network, UNET))
    keyed, scale = UNETS[kind]
    file = formats.save(keyed(network, pairs), tmp_path / "style.safetensors")
    teacher = loaded(folders(name), name, (file, 0.8))
    check(changes(teacher, plain, "unet"), dense(pairs), 0.8 * scale)
    assert f"style.safetensors: {len(pairs)} of {len(pairs)} pairs" in capsys.readouterr().err


def keys(down, up):
    return lambda pairs: formats.keyed(pairs, down, up)


COMFY = keys("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight")
MMDITS = {
    ("flux-schnell", "kohya"): (formats.BFL, lambda p: formats.kohya(p, "lora_unet", 1.0), 0.5),
    ("flux-schnell", "comfyui"): (formats.BFL, COMFY, 1.0),
    ("flux-schnell", "bfl"): (formats.BFL, keys(*AB), 1.0),
    ("flux-schnell", "xlabs"): (formats.XLABS, keys("{}.down.weight", "{}.up.weight"), 1.0),
    ("sd3.5", "kohya"): (formats.SAI, lambda p: formats.kohya(p, "lora_unet", 1.0), 0.5),
    ("sd3.5", "comfyui"): (formats.SAI, COMFY, 1.0),
}


@pytest.mark.parametrize(("name", "kind"), MMDITS)
def test_layers_that_are_several_modules_here(name, kind, folders, tmp_path):
    layers, keyed, scale = MMDITS[name, kind]
    plain = loaded(folders(name), name)
    pairs, expected = formats.joined(plain.codec.pipe.transformer, layers)
    file = formats.save(keyed(pairs), tmp_path / "style.safetensors")
    teacher = loaded(folders(name), name, (file, -0.5))
    check(changes(teacher, plain, "transformer"), expected, -0.5 * scale)


@pytest.mark.parametrize("name", ["flux-schnell", "sd3.5"])
def test_the_last_norms_halves_change_places(name, folders, tmp_path):
    """The original code has the shift first, and diffusers the scale."""
    plain = loaded(folders(name), name)
    pairs, expected = formats.joined(
        plain.codec.pipe.transformer, {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}
    )
    file = formats.save(COMFY(pairs), tmp_path / "style.safetensors")
    found = changes(loaded(folders(name), name, (file, 1.0)), plain, "transformer")
    shift, scale = expected["norm_out.linear"].chunk(2)
    check(found, {"norm_out.linear": torch.cat([scale, shift])}, 1.0)


@pytest.mark.parametrize("name", ["flux-dev", "sd3", "pixart-sigma", "sana", "qwen", "wan"])
@pytest.mark.parametrize("prefix", ["transformer", "lora_unet"])
def test_transformers_by_their_own_names(prefix, name, folders, tmp_path):
    plain = loaded(folders(name), name)
    network = plain.codec.pipe.transformer
    layers = formats.layers_of(network, ATTENTION)
    pairs = formats.factors(network, layers)
    keyed = formats.peft if prefix == "transformer" else formats.kohya
    file = formats.save(keyed(pairs, prefix), tmp_path / "style.safetensors")
    found = changes(loaded(folders(name), name, (file, 1.0)), plain, "transformer")
    check(found, dense(pairs), 1.0)


def test_a_pipelines_own_converter_knows_further_names(folders, tmp_path):
    """Wan's original names: diffusers' converter renames them."""
    plain = loaded(folders("wan"), "wan")
    network = plain.codec.pipe.transformer
    pairs = formats.factors(network, formats.layers_of(network, ATTENTION))
    names = {"attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o", "to_": ""}
    renamed = {}
    for name, factors in pairs.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = factors
    file = formats.save(formats.peft(renamed, "diffusion_model"), tmp_path / "style.safetensors")
    check(
        changes(loaded(folders("wan"), "wan", (file, 1.0)), plain, "transformer"), dense(pairs), 1
    )


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux-schnell", "sd3.5"])
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_text_encoders_have_their_part_before_prompts_are_encoded(kind, name, folders, tmp_path):
    plain = loaded(folders(name), name)
    parts = [k for k in ("text_encoder", "text_encoder_2") if hasattr(plain.codec.pipe, k)]
    numbers = {"text_encoder": "lora_te" if name == "sd" else "lora_te1",
               "text_encoder_2": "lora_te3" if name == "flux-schnell" else "lora_te2"}  # fmt: skip
    state, expected = {}, {}
    for part in parts:
        network = getattr(plain.codec.pipe, part)
        pattern = r".*(SelfAttention\.[qv]|wo)" if part[-1] == "2" and "flux" in name else ENCODER
        pairs = formats.factors(network, formats.layers_of(network, pattern))
        expected[part] = dense(pairs)
        if pattern == ENCODER:
            pairs = formats.with_text_model(pairs)
        prefix = part if kind == "diffusers" else numbers[part]
        state |= (formats.peft if kind == "diffusers" else formats.kohya)(pairs, prefix)
    file = formats.save(state, tmp_path / "style.safetensors")
    teacher = loaded(folders(name), name, (file, 1.0))
    for part in parts:
        check(changes(teacher, plain, part), expected[part], 1.0)
    before, after = (t.codec.condition(["a red circle"]) or {} for t in (plain, teacher))
    assert not torch.allclose(before["text"], after["text"], atol=1e-3)
    assert fingerprint(teacher) != fingerprint(plain)  # of the caches of encoded prompts
    halved = loaded(folders(name), name, (file, 0.5))
    assert len({fingerprint(t) for t in (plain, teacher, halved)}) == 3


@pytest.fixture
def sd(folders, tmp_path):
    """Stable Diffusion, and LoRA files of random factors for it, by seed."""
    plain = loaded(folders("sd"), "sd")
    network = plain.codec.pipe.unet
    layers = formats.layers_of(network, ATTENTION)

    def file(seed=0, settings=None, keyed=formats.peft, prefix="unet"):
        pairs = formats.factors(network, layers, seed=seed)
        return formats.save(keyed(pairs, prefix), tmp_path / f"{seed}.safetensors", settings)

    return folders("sd"), plain, file, layers


def test_strength_0_is_the_plain_base(sd):
    folder, plain, file, _ = sd
    assert changes(loaded(folder, "sd", (file(), 0.0)), plain, "unet") == {}
    assert changes(loaded(folder, "sd"), plain, "unet") == {}


def test_the_order_of_files_does_not_matter(sd):
    """To the bit: three sums in float32 would differ otherwise."""
    folder, _, file, _ = sd
    some = [(file(seed), strength) for seed, strength in ((0, 0.3), (1, 0.7), (2, -1.1))]
    one, other = (
        loaded(folder, "sd", *order).denoiser.state_dict() for order in (some, some[::-1])
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"r": 2, "lora_alpha": 8}, 4.0), ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
     ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_q": 6}}, {"to_q": 3.0})],
)  # fmt: skip
def test_alphas_in_the_header(settings, scale, sd):
    folder, plain, file, layers = sd
    found = changes(loaded(folder, "sd", (file(settings=settings), 1.0)), plain, "unet")
    expected = dense(formats.factors(plain.codec.pipe.unet, layers))
    for name, change in expected.items():
        own = scale if isinstance(scale, float) else scale.get(name[-4:], 1.0)
        torch.testing.assert_close(found[name], own * change, atol=1e-6, rtol=0)


def test_a_peft_folders_alpha_is_in_the_file_beside(sd, tmp_path):
    folder, plain, file, layers = sd
    file(prefix="base_model.model").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    teacher = loaded(folder, "sd", (tmp_path / "adapter_model.safetensors", 1.0))
    check(changes(teacher, plain, "unet"), dense(formats.factors(plain.codec.pipe.unet, layers)), 3)


def test_changes_are_added_in_float32_and_rounded_once(sd):
    """Also to quantised weights: they are quantised after the changes are added."""
    folder, _, file, _ = sd
    whole = loaded(folder, "sd", (file(), 1.0)).codec.pipe.unet
    half = loaded(folder, "sd", (file(), 1.0), precision="bf16").codec.pipe.unet
    for name, weight in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16()), name
    coded = loaded(folder, "sd", (file(), 1.0), precision="nf4").codec.pipe.unet
    layers = [(k, m) for k, m in coded.named_modules() if hasattr(m, "codes")]
    assert layers
    for name, layer in layers:
        weight = whole.get_submodule(name).weight.bfloat16()
        expected = decode(*encode(weight, "nf4"), layer.pairs, tuple(weight.shape), torch.bfloat16)
        assert torch.equal(layer.weight, expected), name


@pytest.mark.parametrize("form", ["8 bits", "nf4"])
def test_changes_are_added_to_what_quantised_files_stand_for(form, folders, tmp_path):
    """And not to their codes; rounded once, from the decoded weights in float32."""
    name, options = "flux-schnell", families.OPTIONS["flux-schnell"]
    folder = shutil.copytree(folders(name), tmp_path / "packed")
    packed.pack(folder / "transformer", form)
    plain = load(str(folder), **options)
    network = plain.codec.pipe.transformer
    pairs = formats.factors(network, formats.layers_of(network, ATTENTION))
    file = formats.save(formats.peft(pairs, "transformer"), tmp_path / "style.safetensors")
    adapters = [{"file": str(file), "strength": 0.5}]
    teacher = load(str(folder), **options, precision="bf16", adapters=adapters)
    state = teacher.codec.pipe.transformer.state_dict()
    for layer, change in dense(pairs).items():
        expected = network.get_submodule(layer).weight + 0.5 * change
        assert torch.equal(state[f"{layer}.weight"], expected.bfloat16()), layer


def test_stock_diffusers_adds_the_same_change(sd):
    folder, plain, file, _ = sd
    path = file()
    pipe = copy.deepcopy(plain.codec.pipe)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    mine = loaded(folder, "sd", (path, 0.8)).codec.pipe.unet.state_dict()
    theirs = {k.replace(".base_layer", ""): v for k, v in pipe.unet.state_dict().items()}
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)


# ---- refused


def without(state, *parts):
    return {k: v for k, v in state.items() if not all(part in k for part in parts)}


def test_a_file_that_is_loaded_in_part_is_refused(sd, tmp_path):
    folder, plain, _, layers = sd
    state = formats.peft(formats.factors(plain.codec.pipe.unet, layers), "unet")
    foreign = {f"unet.nowhere.{i}.lora_{k}.weight": torch.ones(2, 2) for i in "12" for k in "AB"}
    path = formats.save({**state, **foreign}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError) as error:
        loaded(folder, "sd", (path, 1.0))
    n = len(layers)
    assert error.value.key == "teacher.adapters.0.file"
    assert f"{n} of {n + 2} pairs fit" in str(error.value)
    assert "unet.nowhere.1.lora_A.weight" in str(error.value)

    half = without(state, layers[3], "lora_B")
    path = formats.save(half, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=f"{n - 1} of {n} pairs fit.*{re.escape(layers[3])}"):
        loaded(folder, "sd", (path, 1.0))


@pytest.mark.parametrize(
    "key", ["unet.conv_in.dora_scale", "lora_unet_conv_in.hada_w1_a", "diffusion_model.out.2.diff",
            "conv_in.lokr_w1", "unet.conv_in.lora_B.bias", "lora_unet_conv_in.alpha"],
)  # fmt: skip
@pytest.mark.parametrize("alone", [True, False])
def test_keys_that_are_no_low_rank_change_are_refused(key, alone, sd, tmp_path):
    folder, plain, _, layers = sd
    state = {} if alone else formats.peft(formats.factors(plain.codec.pipe.unet, layers), "unet")
    path = formats.save({**state, key: torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError) as error:
        loaded(folder, "sd", (path, 1.0))
    assert error.value.key == "teacher.adapters.0.file" and key in str(error.value)


FAULTS = {  # what is done to a file's tensors, of which `a` and `b` are a layer's factors
    "nan": lambda s, a, b: {**s, b: s[b] / 0 * 0},
    "infinite": lambda s, a, b: {**s, a: s[a] / 0},
    "no rank": lambda s, a, b: {**s, a: s[a][:0], b: s[b][:, :0]},
    "vector": lambda s, a, b: {**s, a: torch.ones(3)},
    "number": lambda s, a, b: {**s, b: torch.tensor(1.0)},
    "ranks differ": lambda s, a, b: {**s, a: torch.cat([s[a], s[a]])},
    "two adapters": lambda s, a, b: {**s, a.replace(".weight", ".second.weight"): s[a]},
    "two names": lambda s, a, b: {
        **s, **{"lora_unet_" + k[5:].replace(".", "_", k.count(".") - 2): s[k] for k in (a, b)}
    },
    "alpha nan": lambda s, a, b: {**s, a.replace(".lora_A.weight", ".alpha"): torch.tensor(1) / 0},
    "alphas": lambda s, a, b: {**s, a.replace(".lora_A.weight", ".alpha"): torch.ones(2)},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_a_damaged_layer_is_refused(fault, sd, tmp_path):
    folder, plain, _, layers = sd
    state = formats.peft(formats.factors(plain.codec.pipe.unet, layers), "unet")
    factors = (f"unet.{layers[1]}.lora_A.weight", f"unet.{layers[1]}.lora_B.weight")
    path = formats.save(FAULTS[fault](state, *factors), tmp_path / "odd.safetensors")
    with pytest.raises(UserError) as error:
        loaded(folder, "sd", (path, 1.0))
    assert error.value.key == "teacher.adapters.0.file"
    assert layers[1].replace(".", "_") in str(error.value).replace(".", "_")


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": "much"}, {"lora_alpha": float("nan")}, {"alpha_pattern": ["to_q"]},
     {"alpha_pattern": {"(": 2}}],
)  # fmt: skip
def test_damaged_settings_are_refused(settings, sd):
    folder, _, file, _ = sd
    with pytest.raises(UserError, match="lora_alpha or alpha_pattern") as error:
        loaded(folder, "sd", (file(settings=settings), 1.0))
    assert error.value.key == "teacher.adapters.0.file"


def test_an_absurd_strength_is_refused_and_a_file_given_twice_is_told(sd, capsys):
    folder, plain, file, layers = sd
    with pytest.raises(UserError, match="no longer finite") as error:
        loaded(folder, "sd", (file(), 1e39))
    assert error.value.key == "teacher.adapters"
    twice = loaded(folder, "sd", (file(), 0.5), (file(), 0.25))
    assert "in the list twice" in capsys.readouterr().err
    expected = dense(formats.factors(plain.codec.pipe.unet, layers))
    check(changes(twice, plain, "unet"), expected, 0.75)


def test_a_file_for_another_base_is_refused(sd, tmp_path):
    folder, plain, _, layers = sd
    pairs = formats.factors(plain.codec.pipe.unet, layers)
    wide = {k: (torch.ones(2, 100), up) for k, (_, up) in pairs.items()}
    path = formats.save(formats.peft(wide, "unet"), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"100 → .*give a LoRA of this base") as error:
        loaded(folder, "sd", (path, 1.0))
    assert error.value.key == "teacher.adapters.0.file"


def test_a_file_that_is_no_safetensors_is_refused(sd, tmp_path):
    (tmp_path / "a.safetensors").write_text("no")
    with pytest.raises(UserError, match="cannot be read") as error:
        loaded(sd[0], "sd", (tmp_path / "a.safetensors", 1.0))
    assert error.value.key == "teacher.adapters.0.file"


@pytest.mark.parametrize(
    ("entry", "key"),
    [({"file": "none.safetensors"}, "teacher.adapters.0.file"),
     ({"file": __file__, "strength": float("nan")}, "teacher.adapters.0.strength"),
     ({"file": __file__, "strength": float("inf")}, "teacher.adapters.0.strength"),
     ({"file": __file__, "strength": "1"}, "teacher.adapters.0.strength"),
     ({"strength": 1.0}, "teacher.adapters.0"), ("a.safetensors", "teacher.adapters.0")],
)  # fmt: skip
def test_entries_are_checked_before_the_model_is_looked_for(entry, key):
    with pytest.raises(UserError) as error:
        load("nobody/no-such-model", adapters=[entry])
    assert error.value.key == key


@pytest.mark.parametrize("source", ["digits", "analytic:gaussian", "mine.py:teacher"])
def test_a_teacher_without_a_pipeline_takes_no_lora_files(source, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(UserError) as error:
        load(source, adapters=[{"file": str(file)}])
    assert error.value.key == "teacher.adapters"
