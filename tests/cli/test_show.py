"""`distill show`: what files say of themselves, of this project and of others; and refusals."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from students.metadata.header import read_header, replace_metadata
from students.metadata.show import shown as in_words
from tests.helpers import exports
from tests.helpers.command_line import called
from tests.helpers.refusals import refused_line


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return exports.exported("sd", tmp_path_factory.mktemp("sd"), steps=2) / "lora"


def shown(capsys, path, *words):
    code, out, err = called(capsys, "show", path, *words)
    assert (code, err) == (0, "")
    return out


def tree(capsys, path):
    return json.loads(shown(capsys, path, "--json", "-"))


def pair(layer, rank=64, width=320, out=320):
    return {
        f"{layer}.lora_down.weight": torch.zeros(rank, width),
        f"{layer}.lora_up.weight": torch.zeros(out, rank),
        f"{layer}.alpha": torch.tensor(float(rank)),
    }


def foreign(path: Path, tensors=None, metadata=None) -> Path:
    """A LoRA of SDXL in kohya's keys, as others write it."""
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(pair(layer, width=2048) if tensors is None else tensors, path, metadata)
    return path


# ---- files of this project


def test_an_own_file_says_everything(own, capsys):
    facts = tree(capsys, own / "comfyui_lora.safetensors")
    values = {name: fact["value"] for name, fact in facts["facts"].items()}
    assert facts["turbo"] is True and facts["file"] == "comfyui_lora.safetensors"
    assert values["steps"] == [2, 1] and values["timesteps"] == {"1": [999], "2": [999, 499]}
    assert values["sigmas"]["2"] == pytest.approx([14.614647, 1.612887, 0.0], abs=1e-6)
    assert (values["cfg"], values["strength"], values["licence"]) == (1.0, 1.0, "mit")
    assert values["sampler"].startswith("LCM") and values["scheduler"] == "LCMScheduler"
    assert values["base"] == "teacher" and len(values["base_sha256"]) == 64
    assert values["kind"].startswith("LoRA, kohya keys, rank 4, ")
    assert values["graph"].startswith("prompt") and facts["unknown"] == {}
    origins = {name: fact["from"] for name, fact in facts["facts"].items()}
    assert (origins["kind"], origins["sigmas"]) == ("the tensors", "the header")


def test_the_students_own_network_is_known_from_the_file_beside_it(own, capsys, tmp_path):
    path = next((own.parent / "student" / "unet").glob("*.safetensors"))
    facts = tree(capsys, path)
    values = {name: fact["value"] for name, fact in facts["facts"].items()}
    assert (values["steps"], values["base"], values["objective"]) == ([2, 1], "teacher", "dmd2")
    assert values["times"] == pytest.approx([1.0, 499 / 999], abs=1e-3)
    assert values["sampler"].startswith("LCM") and values["scheduler"] == "LCMScheduler"
    assert facts["facts"]["steps"]["from"] == "fewstep.json"
    vae = next((own.parent / "student" / "vae").glob("*.safetensors"))
    assert "steps" not in tree(capsys, vae)["facts"]
    copy = tmp_path / "student"
    (copy / "unet").mkdir(parents=True)
    (copy / "unet" / path.name).write_bytes(path.read_bytes())
    (copy / "fewstep.json").write_text('{"steps": [2], "times": "half"}')
    code, _, err = called(capsys, "show", copy / "unet" / path.name)
    assert code == 2
    refused_line(err, "*fewstep.json", "times", "damaged")


def test_files_that_are_part_of_a_file_are_shown_in_words():
    inside = {"file": "style.safetensors", "sha256": "ab12", "strength": 0.85}
    assert in_words([inside]) == "file: style.safetensors; sha256: ab12; strength: 0.85"
    assert in_words([{"file": "a"}, {"file": "b"}]) == "file: a, file: b"


def test_the_table_has_the_facts_and_a_json_file_the_same(own, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = own / "pytorch_lora_weights.safetensors"
    out = shown(capsys, path, "--json", tmp_path / "facts.json")
    for words in ("LoRA, diffusers keys, rank 4", "2, 1", "999, 499", "1.6128871", "mit", "LCM"):
        assert words in out
    assert "not known" not in out
    assert json.loads((tmp_path / "facts.json").read_text()) == tree(capsys, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("turbo.sigmas", "{"),
        ("turbo.sigmas", '{"2":[1.6,14.6,0],"1":[14.6,0]}'),  # rises
        ("turbo.sigmas", '{"2":[14.6,1.6,0.1],"1":[14.6,0]}'),  # does not end at 0
        ("turbo.sigmas", "[]"),
        ("turbo.sigmas", '{"2":[14.6,NaN,0],"1":[14.6,0]}'),
        ("turbo.timesteps", '{"2":[999]}'),
        ("turbo.steps", '"four"'),
        ("turbo.steps", "[]"),
        ("turbo.steps", "[true]"),
        ("turbo.sampler", "heun"),
        ("turbo.base", "3"),
        ("turbo.scheduler", "[1]"),
        ("turbo.base", None),
    ],
)
def test_a_damaged_fact_is_refused_and_named(key, value, own, capsys, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes((own / "comfyui_lora.safetensors").read_bytes())
    head = read_header(path).metadata
    head.pop(key)
    replace_metadata(path, head if value is None else {**head, key: value})
    code, _, err = called(capsys, "show", path)
    assert code == 2
    refused_line(err, str(path), key)


# ---- files of others

NAMES = {
    "sdxl_lightning_4step_lora": ("SDXL-Lightning", [4], "Euler"),
    "sdxl_lightning_1step_x0": ("SDXL-Lightning", [1], "Euler"),
    "Qwen-Image-Lightning-8steps-V1.0": ("Qwen-Image-Lightning", [8], "Euler"),
    "Hyper-SDXL-8steps-lora": ("Hyper-SD", [8], "DDIM"),
    "Hyper-SD15-1step-lora": ("Hyper-SD", [1], "DDIM"),
    "Hyper-SDXL-12steps-CFG-lora": ("Hyper-SD, guided", [12], "DDIM"),
    "Hyper-SD3-4steps-CFG-lora": ("Hyper-SD, guided", [4], "DDIM"),
    "Hyper-FLUX.1-dev-8steps-lora": ("Hyper-SD of FLUX", [8], "Euler"),
    "lcm-lora-sdxl": ("Latent consistency (LCM)", "2 to 8, usually 4", "LCM"),
    "sdxl_lcm_lora": ("Latent consistency (LCM)", "2 to 8, usually 4", "LCM"),
    "dmd2_sdxl_4step_lora_fp16": ("DMD2", [4], "LCM"),
    "pcm_sdxl_smallcfg_2step_converted": ("Phased consistency (PCM)", [2], "DDIM"),
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step": ("Wan, step-distilled", [4], "Euler"),
}


@pytest.mark.parametrize("name", NAMES)
def test_published_turbo_files_are_known_by_their_names(name, capsys, tmp_path):
    method, steps, sampler = NAMES[name]
    found = tree(capsys, foreign(tmp_path / f"{name}.safetensors"))
    facts = found["facts"]
    assert found["turbo"] is False
    assert (facts["method"]["value"], facts["steps"]["value"]) == (method, steps)
    assert facts["method"]["from"] == "the file's name"
    assert facts["sampler"]["value"].startswith(sampler)
    assert facts["sampler"]["from"] == "its authors' model card"
    assert facts["model"] == {"value": "SDXL", "from": "the tensors"}
    assert ("sigmas" in facts) == ("dmd2" in name)
    assert "base" in found["unknown"] and "licence" in found["unknown"]


def test_dmd2s_own_times_are_not_those_of_lcm(capsys, tmp_path):
    facts = tree(capsys, foreign(tmp_path / "dmd2_sdxl_4step_lora.safetensors"))["facts"]
    assert facts["timesteps"]["value"] == [999, 749, 499, 249]
    wanted = [14.614641, 4.081729, 1.612886, 0.693205, 0]
    assert facts["sigmas"]["value"] == pytest.approx(wanted, abs=2e-6)


def test_strengths_and_scales_that_differ_from_one_are_said(capsys, tmp_path):
    flux = tree(capsys, foreign(tmp_path / "Hyper-FLUX.1-dev-8steps-lora.safetensors"))["facts"]
    assert "0.125" in flux["strength"]["value"] and flux["cfg"]["value"] == "1"
    guided = tree(capsys, foreign(tmp_path / "Hyper-SDXL-8steps-CFG-lora.safetensors"))["facts"]
    assert guided["cfg"]["value"].startswith("5 to 8")


def test_a_nameless_file_is_known_by_its_folder_or_its_title(capsys, tmp_path):
    path = foreign(tmp_path / "lcm-lora-sdv1-5" / "pytorch_lora_weights.safetensors")
    assert tree(capsys, path)["facts"]["method"]["from"] == "the folder's name"
    titled = foreign(
        tmp_path / "a.safetensors", metadata={"modelspec.title": "SDXL Lightning 2step"}
    )
    facts = tree(capsys, titled)["facts"]
    assert facts["method"]["from"] == "modelspec.title in the header"
    assert facts["steps"]["value"] == [2]


def test_what_cannot_be_known_is_said_and_not_guessed(capsys, tmp_path):
    metadata = {"ss_sd_model_name": "sd_xl_base_1.0", "modelspec.license": "openrail++"}
    path = foreign(tmp_path / "my_style_v2.safetensors", metadata=metadata)
    found = tree(capsys, path)
    assert "method" not in found["facts"]
    assert {"steps", "sampler", "sigmas", "timesteps", "cfg", "strength"} <= found["unknown"].keys()
    assert found["facts"]["base"]["value"] == "sd_xl_base_1.0"
    assert found["facts"]["licence"]["value"] == "openrail++"
    assert "not known: steps, sampler, sigmas, timesteps, cfg, strength; the" in shown(capsys, path)


def test_the_layers_of_distillation_scripts_are_a_hint_and_no_verdict(capsys, tmp_path):
    block = "lora_unet_down_blocks_1_resnets_0_"
    tensors = pair(block + "conv1") | pair(block + "time_emb_proj")
    path = foreign(tmp_path / "renamed.safetensors", tensors)
    found = tree(capsys, path)
    assert found["facts"]["method"]["value"].startswith("unknown; ")
    assert "steps" in found["unknown"]


def test_a_network_that_reads_the_guidance_scale_is_named(capsys, tmp_path):
    tensors = {
        "time_embedding.cond_proj.weight": torch.zeros(2, 2),
        "down_blocks.0.a": torch.ones(1),
    }
    facts = tree(capsys, foreign(tmp_path / "unet.safetensors", tensors))["facts"]
    assert "guidance_input" in facts and facts["kind"]["value"].startswith("weights of one network")


@pytest.mark.parametrize(
    ("layer", "width", "model", "kind"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 768,
         "Stable Diffusion 1.x", "diffusers keys"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024,
         "Stable Diffusion 2.x", "kohya keys"),
        ("transformer.single_transformer_blocks.3.attn.to_q", 3072, "FLUX", "diffusers keys"),
        ("diffusion_model.double_blocks.3.img_attn.qkv", 3072, "FLUX", "ComfyUI keys"),
        ("transformer.transformer_blocks.3.attn.add_k_proj", 1536, "Stable Diffusion 3",
         "diffusers keys"),
        ("transformer.transformer_blocks.3.img_mlp.net.2", 3072, "Qwen-Image", "diffusers keys"),
        ("diffusion_model.blocks.3.cross_attn.k", 5120, "Wan", "ComfyUI keys"),
    ],
)  # fmt: skip
def test_models_are_known_by_their_tensors(layer, width, model, kind, capsys, tmp_path):
    facts = tree(capsys, foreign(tmp_path / "a.safetensors", pair(layer, width=width)))["facts"]
    assert facts["model"]["value"] == model
    assert facts["kind"]["value"] == f"LoRA, {kind}, rank 64, 1 pairs"


def test_a_strangers_text_does_not_move_the_cursor(capsys, tmp_path):
    path = foreign(tmp_path / "a.safetensors", metadata={"modelspec.title": "a\x1b[2Jb\nc"})
    out = shown(capsys, path)
    assert "\x1b" not in out and "a\N{REPLACEMENT CHARACTER}[2Jb c" in out


BIG = "1" + 400 * "0"  # beyond floats


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("turbo.sigmas", f'{{"2": [{BIG}, 1, 0], "1": [1, 0]}}', 2),
        ("turbo.timesteps", f'{{"2": [{BIG}, 1], "1": [1]}}', 0),
        ("turbo.verified", f'{{"max_abs": [{BIG}]}}', 0),
        ("turbo.cfg", 900 * '{"a":' + "1" + 900 * "}", 2),
        ("turbo.cfg", 900 * "[" + 900 * "]", 2),
        ("turbo.\x1b[31m", "{", 2),
    ],
)  # fmt: skip
def test_absurd_facts_are_shown_or_refused(key, value, code, own, capsys, tmp_path):
    path = own / "comfyui_lora.safetensors"
    tensors = {"a.lora_A.weight": torch.zeros(1)[0]}
    save_file(tensors, tmp_path / "a.safetensors", {**read_header(path).metadata, key: value})
    got, out, err = called(capsys, "show", tmp_path / "a.safetensors")
    assert got == code and "\x1b" not in out + err
    if code:
        refused_line(
            err, f"{tmp_path / 'a.safetensors'}", key.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
        )


# ---- other files


class Trap:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_refused_and_never_loaded(capsys, tmp_path):
    sprung, names = tmp_path / "sprung", ("a.ckpt", "b.pt", "c.safetensors")
    torch.save(Trap(sprung), tmp_path / names[0])
    (tmp_path / names[1]).write_bytes(pickle.dumps(Trap(sprung)))
    (tmp_path / names[2]).write_bytes(pickle.dumps(Trap(sprung)))
    for name in names:
        code, _, err = called(capsys, "show", tmp_path / name)
        assert code == 2
        refused_line(err, str(tmp_path / name), "not opened")
    assert not sprung.exists()


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "header"),
        (b"abc", "header"),
        (b"GGUF" + bytes(60), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (safetensors(b"{}", length=1 << 60), "header"),
        (safetensors(b"{}", length=50), "header"),
        (safetensors(b"{not json"), "JSON"),
        (safetensors(b"\xff\xfe{}"), "JSON"),
        (safetensors(b"[1, 2]"), "object"),
        (safetensors(b"[" * 50_000), "JSON"),
        (safetensors(b'{"__metadata__": {"a": 1}}'), "__metadata__"),
        (safetensors(b'{"__metadata__": []}'), "__metadata__"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": [1]}}'), "'a'"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'), "'a'"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}'), "'a'"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'), "'a'"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"ab"), "4"),
        (safetensors(b'{"a": 3}'), "'a'"),
    ],
)
def test_damaged_files_are_refused_in_a_line(content, word, capsys, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    code, _, err = called(capsys, "show", path)
    assert code == 2
    refused_line(err, str(path), word)


def test_folders_and_missing_files_are_refused_in_a_line(capsys, tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        code, _, err = called(capsys, "show", path)
        assert code == 2
        refused_line(err, str(path), "safetensors")


def test_an_empty_file_of_no_tensors_is_whole(capsys, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors(b"{}"))
    assert tree(capsys, tmp_path / "a.safetensors")["facts"]["kind"]["value"] == "no tensors"


def test_a_runs_folder_names_its_files_and_a_recipe_is_no_safetensors_file(capsys, tmp_path):
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "comfyui_lora.safetensors"
    file.touch()
    code, _, err = called(capsys, "show", tmp_path)
    assert code == 2 and "lora" in err
    refused_line(err, str(tmp_path), "it is a folder; give a .safetensors file, such as")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: digits\nstudent: {steps: 1}\n", encoding="utf-8")
    code, _, err = called(capsys, "show", recipe)
    assert code == 2
    refused_line(err, str(recipe), "it is no safetensors file")
