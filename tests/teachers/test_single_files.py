"""Single files as teachers: each is the teacher of the folder that it was made of."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from students import schedulers
from students.export.folder import rehearse
from students.export.formats import single_file
from students.lora import Adapter
from teachers import load
from teachers.storage import download, single_files
from tests.helpers import families
from tests.helpers.disturbed import disturbed
from tests.helpers.formats import sd15, sdxl
from tests.helpers.refusals import refused

KINDS = {"sd15": sd15, "sdxl": sdxl}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of SD and SDXL, and each as one file."""
    root = tmp_path_factory.mktemp("files")
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        pipe = kind(root / f"{name}-words")
        pipe.save_pretrained(root / name)
        state = {k: v.contiguous().clone() for k, v in single_file(pipe).items()}
        save_file(state, root / f"{name}.safetensors")
    return root


def bare(folder, to):
    """The folder's settings without any weights."""
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))


@pytest.mark.parametrize("name", KINDS)
def test_a_single_file_is_the_teacher_of_its_folder(files, name, tmp_path):
    """Every weight of every part, the schedule, and the conditions of captions."""
    settings = bare(files / name, tmp_path / "settings")
    theirs = load(str(files / name))
    ours = load(str(files / f"{name}.safetensors"), config=str(settings))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        made, expected = (getattr(t.codec.pipe, part, None) for t in (ours, theirs))
        assert (made is None) == (expected is None)
        if expected is not None:
            mine, state = made.state_dict(), expected.state_dict()
            assert mine.keys() == state.keys()
            for k, v in state.items():
                torch.testing.assert_close(mine[k], v, atol=1e-7, rtol=1e-6)
    assert ours.shape == theirs.shape
    assert ours.denoiser.schedule.name == theirs.denoiser.schedule.name
    for one, other in zip(ours.codec.condition(["cat"]).values(),
                          theirs.codec.condition(["cat"]).values(), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert ours.options == {"config": str(settings)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_student_is_sampled_by_the_stock_pipeline(files, precision):
    teacher = load(str(files / "sd15.safetensors"), config=str(files / "sd15"), precision=precision)
    rehearse(disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=2))).eval(), teacher)


def test_a_file_of_the_network_alone_takes_the_rest_from_the_folder(files, tmp_path):
    """As FLUX's and SD3's files are; the parts that neither has are named."""
    weights = load_file(files / "sd15.safetensors")
    alone = {k: v for k, v in weights.items() if k.startswith("model.diffusion_model.")}
    save_file(alone, tmp_path / "unet.safetensors")
    teacher = load(str(tmp_path / "unet.safetensors"), config=str(files / "sd15"))
    theirs = load(str(files / "sd15"))
    x, t = torch.randn(1, *theirs.shape), torch.tensor([0.5])
    with torch.no_grad():
        expected = theirs.denoiser(x, t, theirs.codec.condition(["cat"]))
        found = teacher.denoiser(x, t, teacher.codec.condition(["cat"]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    settings = bare(files / "sd15", tmp_path / "settings")
    with refused("teacher '*'", "text_encoder", "config"):
        load(str(tmp_path / "unet.safetensors"), config=str(settings))


@pytest.mark.parametrize("name", ["flux-dev", "sd3.5"])
def test_a_transformers_file_by_diffusers_names_is_read(name, tmp_path):
    folder = families.build(name, tmp_path / "t")
    file = next((folder / "transformer").glob("*.safetensors"))
    alone = str(shutil.copy(file, tmp_path / "alone.safetensors"))
    options = families.OPTIONS.get(name, {})
    teacher, theirs = load(alone, config=str(folder), **options), load(str(folder), **options)
    mine, state = (t.denoiser.backbone.state_dict() for t in (teacher, theirs))
    assert mine.keys() == state.keys() and all(torch.equal(mine[k], state[k]) for k in state)


@pytest.mark.parametrize(
    "part", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."]
)
def test_files_that_are_not_whole_are_refused(files, part, tmp_path):
    weights = load_file(files / "sd15.safetensors")
    gone = sorted(k for k in weights if k.startswith(part) and k.endswith("weight"))[2]
    del weights[gone]
    save_file(weights, tmp_path / "part.safetensors")
    with refused("teacher '*'", "part.safetensors"):
        load(str(tmp_path / "part.safetensors"), config=str(files / "sd15"))


def test_integers_without_scales_are_refused(files, tmp_path):
    weights = load_file(files / "sd15.safetensors")
    name = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, tmp_path / "int8.safetensors")
    with refused("teacher '*'", name):
        load(str(tmp_path / "int8.safetensors"), config=str(files / "sd15"))


def test_what_is_no_such_file_is_refused(files, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"a.weight": torch.ones(2)}, file)
    with refused("teacher '*'", "a.weight"):
        load(str(file))
    file.write_bytes(b"\0" * 20)
    with refused("teacher '*'", "other.safetensors"):
        load(str(file))
    with refused("teacher '*'", "config", "/no/such"):
        load(str(files / "sd15.safetensors"), config="/no/such/folder")
    with refused("teacher '*'", "config", "label_emb"):
        load(str(files / "sd15.safetensors"), config=str(files / "sdxl"))
    with refused("teacher '*'", "config"):
        load(str(files / "sd15"), config=str(files / "sd15"))
    with refused("teacher '*'", "nul_label"):
        load(str(files / "sd15.safetensors"), config=str(files / "sd15"), nul_label=3)


@pytest.mark.parametrize("keys", [
    ("unet.down_blocks.0.to_q.lora_A.weight", "unet.down_blocks.0.to_q.lora_B.weight"),
    ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"),
    ("lora_unet_a.hada_w1_a", "lora_unet_a.alpha"),
])  # fmt: skip
def test_a_lora_is_called_one_and_its_key_is_named(keys, tmp_path):
    save_file({k: torch.ones(2, 2) for k in keys}, tmp_path / "style.safetensors")
    with refused("teacher '*'", "it is a LoRA", "teacher.source", "teacher.adapters: [{file: "):
        load(str(tmp_path / "style.safetensors"))


def test_without_a_config_the_familys_settings_are_downloaded(files, monkeypatch):
    """And the weights of the parts that the file lacks, which here are none."""
    asked = {}

    def fetch(source, keep):
        names = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors",
                 "vae/diffusion_pytorch_model.fp16.safetensors",
                 "tokenizer/vocab.json"]  # fmt: skip
        asked[source] = [n for n in names if keep(n)]
        return files / "sd15"

    monkeypatch.setattr(download, "fetch", fetch)
    load(str(files / "sd15.safetensors"))
    expected = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert asked == {expected: ["unet/config.json", "tokenizer/vocab.json"]}


@pytest.mark.parametrize(
    ("mark", "shape", "expected"),
    [
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (1280,),
         "stabilityai/stable-diffusion-xl-base-1.0"),
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", (9216,),
         "stabilityai/stable-diffusion-3-medium-diffusers"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", (128,),
         "black-forest-labs/FLUX.1-schnell"),
    ],
)  # fmt: skip
def test_families_are_known_by_their_weights(mark, shape, expected, tmp_path):
    names = {"model.diffusion_model.a": (1,), mark: shape}
    names["model.diffusion_model.pos_embed"] = (1, 36864, 1536)
    assert single_files.usual(names, tmp_path / "a", "teacher").startswith(expected[:20])


def test_parts_are_known_by_their_names():
    assert single_files.holds(["conditioner.embedders.1.model.a"], "text_encoder_2")
    assert not single_files.holds(["conditioner.embedders.0.model.a"], "text_encoder_2")
    assert not single_files.holds(["a"], "image_encoder")
