"""Parts of a folder: each is read whole or refused, and alike under transformers 4 and 5."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from students import schedulers
from students.export.folder import export
from students.export.portable import make_portable, older_rope
from students.lora import Adapter
from teachers import load
from teachers.storage import components
from teachers.storage.variants import variant_of
from teachers.teacher import EMBEDDED
from tests.helpers import families
from tests.helpers.refusals import refused

SHAPES = EMBEDDED["shapes"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return families.build("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture
def copy(sd, tmp_path):
    return shutil.copytree(sd, tmp_path / "t")


def renamed(file, change):
    """Rewrite a file of weights under other names."""
    weights = {change(k): v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return sorted(weights)


# ---- whole or refused


def test_the_shapes_text_encoder_has_the_names_that_every_version_reads():
    """Version 4 reads no others, and version 5 reads these as well."""
    names = load_file(SHAPES / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names) and len(names) == 36
    kind = transformers.CLIPTextModel
    _, info = kind.from_pretrained(SHAPES / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {
        p.name for p in (SHAPES / "tokenizer").iterdir()
    }


def test_the_shapes_vocabularies_agree():
    """tokenizer.json, which version 5 reads, and the two files that version 4 does."""
    model = json.loads((SHAPES / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((SHAPES / "tokenizer" / "vocab.json").read_text()) == model["vocab"]
    merges = (SHAPES / "tokenizer" / "merges.txt").read_text().splitlines()[1:]
    assert merges == [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        (
            "text_encoder",
            lambda k: f"odd.{k}",
            ("teacher '*/t'", "text_encoder", "3"),
        ),
        ("unet", lambda k: f"odd.{k}", ("teacher '*/t'", "207")),
        (
            "text_encoder",
            lambda k: k.replace("layers.1", "layers.9"),
            ("teacher '*/t'", "text_encoder"),
        ),
    ],
)
def test_weights_under_other_names_are_refused_with_their_part(copy, part, change, says):
    renamed(next((copy / part).glob("*.safetensors")), change)
    with refused(*says):
        load(str(copy))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_which_the_config_knows_nothing_are_refused(copy, part):
    file = next((copy / part).glob("*.safetensors"))
    weights = load_file(file) | {"another.layer.weight": torch.zeros(2)}
    save_file(weights, file, metadata={"format": "pt"})
    with refused("teacher '*/t'", "another.layer.weight", part, part):
        load(str(copy))


def test_position_numbers_that_older_versions_saved_are_no_weights(copy):
    file = copy / "text_encoder" / "model.safetensors"
    ids = {"text_model.embeddings.position_ids": torch.arange(40)[None]}
    renamed(file, lambda k: f"text_model.{k.removeprefix('text_model.')}")
    save_file(load_file(file) | ids, file, metadata={"format": "pt"})
    load(str(copy))


@pytest.mark.parametrize("change", [lambda k: k.replace("mid_block", "middle"), lambda k: f"{k}.x"])
def test_a_unet_of_pixels_is_read_whole_or_refused(pipelines, tmp_path, change):
    """Diffusers would draw what is missing at random."""
    copy = shutil.copytree(pipelines["edm"], tmp_path / "t")
    renamed(copy / "unet" / "diffusion_pytorch_model.safetensors", change)
    with refused("teacher '*/t'", "whole"):
        load(str(copy))


def test_a_tokenizer_that_cannot_be_read_is_named(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    for name in ("vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink(missing_ok=True)
    with refused("teacher '*/t'", "CLIPTokenizer"):
        load(str(copy))


def test_a_tokenizer_that_its_class_cannot_read_is_read_by_its_fast_form(sd, monkeypatch):
    """As under transformers 4, where a CLIPTokenizer does not read tokenizer.json."""
    before = transformers.CLIPTokenizer.from_pretrained(sd / "tokenizer")

    class Slow(transformers.PreTrainedTokenizerBase):
        @classmethod
        def from_pretrained(cls, *args, **words):
            raise TypeError("expected str, bytes or os.PathLike object, not NoneType")

    monkeypatch.setattr(transformers, "CLIPTokenizer", Slow)
    found = components.tokenizer("CLIPTokenizer", sd / "tokenizer", "teacher 'x'")
    assert found("a red cat").input_ids == before("a red cat").input_ids
    index = json.loads((sd / "model_index.json").read_text())
    with components.naming(sd, index, {"tokenizer": "CLIPTokenizerFast"}) as root:
        told = json.loads((root / "model_index.json").read_text())
        assert told == index | {"tokenizer": ["transformers", "CLIPTokenizerFast"]}
        assert (root / "unet" / "config.json").is_file()


def test_rotary_settings_that_the_installed_version_does_not_read_are_refused(
    tmp_path, monkeypatch
):
    """Version 4 would take a base of its own."""
    tree = {"text_config": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    monkeypatch.setattr(components, "installed", lambda: "5.0.0")
    components.check_rope(tmp_path, "teacher 'x'")
    monkeypatch.setattr(components, "installed", lambda: "4.57.6")
    with refused("teacher 'x'", "rope_parameters", "4.57.6"):
        components.check_rope(tmp_path, "teacher 'x'")
    assert older_rope(tree)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    components.check_rope(tmp_path, "teacher 'x'")


# ---- variants


def test_which_variant_is_read():
    whole, half = "model.safetensors", "model.fp16.safetensors"
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    older = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    plain = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert variant_of([whole, half]) is None
    assert variant_of([*plain, *older]) is None
    assert variant_of([half, "config.json"]) == "fp16"
    assert variant_of(shards) == variant_of(older) == "fp16"
    assert variant_of(["model.bf16.safetensors", half]) == "fp16"
    assert variant_of(["diffusion_pytorch_model.non_ema.safetensors"]) == "non_ema"
    assert variant_of(["model.fp16.bin", "config.json"]) is None


def test_a_folder_of_half_precision_alone_is_read_and_said(sd, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    pipe.to(torch.float16).save_pretrained(tmp_path / "t", variant="fp16")
    assert not (tmp_path / "t" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    capfd.readouterr()
    teacher, whole = load(str(tmp_path / "t")), load(str(sd))
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "unet" in err and "vae" in err and "text_encoder" in err and "*.fp16.safetens" in err
    cond = teacher.codec.condition(["a red cat"])
    x, t = torch.randn(1, *teacher.shape), torch.tensor([0.5])
    assert teacher.denoiser.dtype == torch.float32
    gap = teacher.denoiser(x, t, cond) - whole.denoiser(x, t, whole.codec.condition(["a red cat"]))
    assert 0 < gap.abs().max() < 0.05


def test_a_unet_of_pixels_in_half_precision_alone_is_read_and_said(pipelines, tmp_path, capfd):
    copy = shutil.copytree(pipelines["edm"], tmp_path / "t")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    teacher = load(str(copy))
    assert capfd.readouterr().err.count("*.fp16.safetensors") == 1
    assert teacher.denoiser.dtype == torch.float32


# ---- written for both versions


def test_an_exported_student_is_in_the_form_that_both_versions_read(sd, tmp_path):
    teacher = load(str(sd))
    student = schedulers.student(teacher, 1, None, True, Adapter(rank=2)).eval()
    export(student, teacher, tmp_path / "s", {})
    names = load_file(tmp_path / "s" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    words = {p.name for p in (tmp_path / "s" / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt"} <= words
    vocab = json.loads((tmp_path / "s" / "tokenizer" / "vocab.json").read_text())
    assert vocab == teacher.codec.pipe.tokenizer.get_vocab()
    if "tokenizer.json" in words:  # which version 5 writes
        made = json.loads((tmp_path / "s" / "tokenizer" / "tokenizer.json").read_text())
        assert made["model"]["vocab"] == vocab
    one, two = load(str(tmp_path / "s")).codec, teacher.codec
    for prompt in ("a red cat", "", "Zebras!"):
        torch.testing.assert_close(one.condition([prompt]), two.condition([prompt]))


@pytest.mark.parametrize("name", ["flux-schnell", "sana", "qwen", "zimage", "wan"])
def test_portable_folders_mean_the_same(name, tmp_path):
    folder = families.build(name, tmp_path / "t")
    options = families.OPTIONS.get(name, {})
    before = load(str(folder), **options).codec.condition(["a red cat"])
    make_portable(folder)
    after = load(str(folder), **options).codec
    torch.testing.assert_close(after.condition(["a red cat"]), before)
    index = json.loads((folder / "model_index.json").read_text())
    for part, entry in index.items():
        if not isinstance(entry, list) or entry[0] != "transformers":
            continue
        if "Tokenizer" in entry[1]:
            words = {p.name for p in (folder / part).iterdir()}
            config = json.loads((folder / part / "tokenizer_config.json").read_text())
            assert not isinstance(config.get("extra_special_tokens"), list)
            assert entry[1].endswith("Fast") or {"vocab.json", "merges.txt"} <= words
        else:
            tree = json.loads((folder / part / "config.json").read_text())
            for node in (tree, tree.get("text_config", {})):
                rope = node.get("rope_parameters")
                assert rope is None or node["rope_theta"] == rope["rope_theta"]


def test_a_tokenizers_own_files_come_along(tmp_path):
    """Of sentencepiece's model, which cannot be made of tokenizer.json."""
    folder = families.build("pixart-sigma", tmp_path / "t")
    origin = tmp_path / "origin"
    (origin / "tokenizer").mkdir(parents=True)
    (origin / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    make_portable(folder, origin)
    assert (folder / "tokenizer" / "spiece.model").read_bytes() == b"pieces"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"][1].removesuffix("Fast") == "T5Tokenizer"
