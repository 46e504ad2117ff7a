"""What is asked of the Hub for a teacher, by a repository's list of files alone."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from teachers import load
from teachers.catalogue.loading import find
from teachers.storage.download import escaped, nowhere, wanted
from tests.helpers import families
from tests.helpers.refusals import refused

INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.19.0",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
}  # fmt: skip
WORDS = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
NEEDED = [
    "LICENSE.md", "README.md", "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
    *(f"{part}/{word}" for part in ("tokenizer", "tokenizer_2") for word in WORDS),
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip
BESIDE = [
    ".gitattributes", "01.png", "comparison.png", "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.safetensors", "sd_xl_offset_example-lora_1.0.safetensors",
    "text_encoder/flax_model.msgpack", "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx", "text_encoder/openvino_model.bin", "text_encoder/openvino_model.xml",
    "text_encoder/pytorch_model.bin", "text_encoder_2/model.fp16.safetensors",
    "text_encoder_2/model.onnx_data", "text_encoder_2/pytorch_model.bin.index.json",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/model.onnx",
    "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_flax_model.msgpack",
    "vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/config.json", "vae_decoder/model.onnx", "vae_encoder/model.onnx",
    "safety_checker/config.json", "safety_checker/model.safetensors",
]  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of one repository; the requests that it got."""
    asked = SimpleNamespace(names=[*NEEDED, *BESIDE], index=INDEX, patterns=None, error=None)

    class Api:
        def model_info(self, repo, **more):
            assert repo == "owner/name"
            if asked.error is not None:
                raise asked.error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in asked.names])

    def one(repo, name):
        assert name == "model_index.json"
        (tmp_path / name).write_text(json.dumps(asked.index))
        return str(tmp_path / name)

    def snapshot(repo, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("nothing of it")
        asked.patterns = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_of_sdxls_layout_just_what_its_pipeline_is_loaded_from_is_asked_for(hub, tmp_path):
    assert find("owner/name") == tmp_path
    assert sorted(hub.patterns) == sorted(NEEDED)
    left = huggingface_hub.utils.filter_repo_objects(hub.names, allow_patterns=hub.patterns)
    assert sorted(left) == sorted(NEEDED)


def test_a_part_of_one_variant_alone_is_taken_in_that_one(hub):
    hub.names.remove("unet/diffusion_pytorch_model.safetensors")
    hub.names.remove("unet/diffusion_pytorch_model.non_ema.safetensors")
    find("owner/name")
    taken = {n for n in hub.patterns if n.startswith("unet/")}
    assert taken == {"unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert "vae/diffusion_pytorch_model.fp16.safetensors" not in hub.patterns


def test_weights_in_several_files_come_with_their_own_list_of_them():
    shards = [f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [name.replace(".safe", ".fp16.safe") for name in shards]
    lists = ["transformer/diffusion_pytorch_model.safetensors.index.json",
             "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
             "transformer/diffusion_pytorch_model.bin.index.json"]  # fmt: skip
    index = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    names = ["transformer/config.json", *shards, *halves, *lists, "model_index.json"]
    assert wanted(index, names, "teacher") == sorted(
        ["model_index.json", "transformer/config.json", *shards, lists[0]]
    )
    names = [n for n in names if n not in shards]
    assert wanted(index, names, "teacher") == sorted(
        ["model_index.json", "transformer/config.json", *halves, lists[1]]
    )


def test_vocabularies_and_chat_templates_of_every_kind_are_taken():
    words = ["chat_template.jinja", "merges.txt", "spiece.model", "tokenizer.json", "vocab.txt"]
    names = [f"tokenizer/{w}" for w in words]
    index = {"tokenizer": ["transformers", "Qwen2Tokenizer"]}
    assert wanted(index, [*names, "tokenizer/notes.pdf"], "teacher") == names


def test_old_pipelines_keep_their_parts_at_the_top():
    names = ["config.json", "model_index.json", "scheduler_config.json", "sample.png",
             "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]  # fmt: skip
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    assert wanted(index, names, "teacher") == sorted(
        n for n in names if not n.endswith((".png", ".bin"))
    )


def test_pickles_and_single_files_are_refused_before_anything_large_is_fetched(hub):
    hub.names = [n for n in hub.names if not n.startswith("unet/") or not n.endswith("tensors")]
    with refused("teacher 'owner/name'", "unet/diffusion_py"):
        find("owner/name")
    hub.names = ["sd_xl_base_1.0.safetensors", "README.md"]
    with refused("teacher 'owner/name'", "model_index.json", "from_single_file", "save_pretrained"):
        find("owner/name")
    assert hub.patterns is None


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.RepositoryNotFoundError, ("teacher 'owner/name'", "Hub")),
        (errors.GatedRepoError, ("teacher 'owner/name'", "hf.co/owner/name")),
        (errors.OfflineModeIsEnabled, ("teacher 'owner/name'", "HF_HUB_OFFLINE")),
        (ConnectionError, ("teacher 'owner/name'", "folder")),
    ],
)
def test_what_is_neither_here_nor_there_is_said_to_be_neither(hub, kind, says):
    hub.error = kind.__new__(kind)  # what it is made of differs by version
    Exception.__init__(hub.error, "no\nuse")
    with refused(*says):
        find("owner/name")


def test_a_name_that_was_meant_for_a_folder_beside_is_told_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert nowhere("runs/teachr") == "no such folder here; did you mean 'teacher'? in runs"
    assert nowhere("runs/xyz") == "no such folder here, though there is runs"
    assert nowhere("owner/name") == "no such folder here"


@pytest.mark.parametrize("name", ["v1-5.ckpt", "sub/model.bin"])
def test_single_files_of_other_kinds_are_told_how_to_become_folders(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with refused(f"teacher '{name}'", "from_single_file", "save_pretrained"):
        load(name)


@pytest.mark.parametrize("name", ["model.safetensors", "v1-5.ckpt", "sub/SiT-XL-2-256x256.pt"])
def test_a_single_file_that_is_not_there_is_said_not_to_be(name):
    with refused(f"teacher '{name}'", "does not exist"):
        load(name)


def test_long_names_are_cut(monkeypatch):
    with refused("teacher '/xxx*xxx'", "OWNER/NAME") as error:
        load("/" + "x" * 5000)
    assert len(str(error.value)) < 200


def test_names_are_asked_for_as_they_are():
    assert escaped("unet/model[1]*.json") == "unet/model[[]1][*].json"


def test_a_kept_copy_is_used_where_the_hub_cannot_be_asked(hub, tmp_path, monkeypatch):
    kept = families.build("dit", tmp_path / "kept")
    hub.error = ConnectionError("no route")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, local_files_only=False: str(kept)
    )
    assert load("owner/name").shape == load(str(kept)).shape
    shutil.rmtree(kept)
